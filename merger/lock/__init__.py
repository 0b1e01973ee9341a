"""Every model of a recipe pinned to a commit, with its headers read."""
