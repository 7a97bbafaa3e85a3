"""What writes the stream of events: one file per sink."""
