"""What happens to a batch of inputs before the model sees it: one file per transform."""
