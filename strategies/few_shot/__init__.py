"""Few-shot strategies: a base session rich in data, then a few samples of each new class."""
