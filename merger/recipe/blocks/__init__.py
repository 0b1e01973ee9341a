"""The blocks of a recipe, each with its own words."""
