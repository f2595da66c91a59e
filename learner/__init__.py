"""The FSDP2 learner: model, packing, attention, log-probs, loss, optimiser, publishing, state. Never imports `actors`."""
