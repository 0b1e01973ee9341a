"""Scoring the result before it is published, and its parents beside it, in a process of its own."""
