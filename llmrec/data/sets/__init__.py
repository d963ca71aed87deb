"""The data sources that a recipe may name."""
