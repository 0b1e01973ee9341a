"""Finding a recipe's numbers: candidates made in memory, scored, and forgotten; the best is written out."""
