"""The card's pictures."""
