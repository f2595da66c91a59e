"""Supervised processes around the library, which no response can stall, crash or fool."""

from verifiers.pool.pool import VerifierPool

__all__ = ["VerifierPool"]
