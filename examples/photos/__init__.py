"""Eleven photographs that Python packages ship, with questions: how your own pictures become a run."""
