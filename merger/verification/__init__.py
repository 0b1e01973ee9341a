"""Proving what was published, and comparing models."""
