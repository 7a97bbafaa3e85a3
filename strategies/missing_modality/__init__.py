"""Methods for samples that lack some of their modalities."""
