"""Saying what was made: the model card and its pictures."""
