"""V-Triune's kernel: the commands and messages; rooms for configuration, data, the run, its records, weights, runtime and transport."""
