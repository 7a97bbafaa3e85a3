"""What learns: one file per method, by family."""
