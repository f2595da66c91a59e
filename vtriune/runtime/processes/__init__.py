"""Processes of a run: who starts them, here or on a Ray cluster, watches them, restarts them and ends them.

Knows the rest of the runtime and is not known by it; what is public stands in `vtriune.runtime`.
"""
