"""How a version's weights travel from the learner to the engines: where members meet, the group they send in, the layout of buckets."""
