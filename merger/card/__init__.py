"""Saying what was made: the model card and the lock file."""
