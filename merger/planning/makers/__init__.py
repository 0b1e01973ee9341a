"""Jobs of other kinds than merging models."""
