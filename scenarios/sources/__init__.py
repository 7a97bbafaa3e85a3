"""The data behind the scenarios: one file per source."""
