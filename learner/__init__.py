"""The FSDP2 learner: trains the policy on scored groups and publishes its weights. Hands on nothing, since most of it loads torch."""
