"""Methods for streams of new classes."""
