"""The policy: a family's model built sharded, its packed attention, its log-probs.

Hands on nothing: most of it loads torch.
"""
