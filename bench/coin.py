"""The reward of `bench.whole_step`, in a module of its own: verifier workers import it, and nothing heavy with it."""

import hashlib


def coin(response: str, gold: str) -> float:
    """1 for the gold answer, else a fair coin that depends on the text alone."""
    return 1.0 if response == gold else float(hashlib.sha1(response.encode()).digest()[0] % 2)
