"""How a group's completions are sampled."""
