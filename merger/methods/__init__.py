"""The mathematics: pure functions of blocks. Importing nothing here imports torch."""
