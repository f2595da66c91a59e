"""Complete runs, one YAML file each, and what they need."""
