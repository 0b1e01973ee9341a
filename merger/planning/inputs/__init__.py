"""Where an input's entries come from."""
