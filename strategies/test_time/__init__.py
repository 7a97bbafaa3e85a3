"""Strategies that adapt a trained model to what it serves."""
