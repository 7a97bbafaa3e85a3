"""Losses, regularisers and gradient modulators that any gradient strategy can carry."""
