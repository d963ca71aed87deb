"""What a recipe may name as data."""
