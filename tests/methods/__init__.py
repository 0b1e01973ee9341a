"""Tests of the mathematics: laws over the registry, the shared pieces, each departure from mergekit."""
