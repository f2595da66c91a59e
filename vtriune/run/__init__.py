"""What happens while a run runs: the controller, its groups and generators, and the processes it rests on."""
