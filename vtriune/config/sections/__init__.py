"""The sections of a configuration file, one module each: every key with its range, its default and a text that says what it does."""
