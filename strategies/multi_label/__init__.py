"""Methods for streams whose samples carry any number of classes."""
