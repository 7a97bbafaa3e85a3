"""Where tasks come from: one file per kind of stream."""
