"""From scored groups to packed micro-batches: the inbox, advantages, the plan of an update, prompts and their image features.

Hands on nothing; `learner.learner` puts the parts together.
"""
