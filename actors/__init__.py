"""The actors around the learner: generator, verifier pool, recorder. Never imports `learner`."""
