"""What methods are composed of."""
