"""The configurations that travel in the wheel."""
