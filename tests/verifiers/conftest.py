"""Kernels compile at their first call and machines are shared: how long one example takes says nothing here."""

from hypothesis import settings

settings.register_profile("verifiers", deadline=None)
settings.load_profile("verifiers")
