"""How numbers lie in files."""
