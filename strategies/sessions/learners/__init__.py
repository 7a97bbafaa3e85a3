"""Learners: one session of training for a language model."""
