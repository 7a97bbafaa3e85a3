"""Exact checks of answers: one file per verifier."""
