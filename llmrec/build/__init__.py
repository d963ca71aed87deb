"""From a recipe to objects and runs; the only package that reads a whole recipe."""
