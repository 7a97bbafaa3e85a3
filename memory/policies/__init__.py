"""Which samples are kept: one file per selection policy."""
