"""Strategies that run a learner on each task."""
