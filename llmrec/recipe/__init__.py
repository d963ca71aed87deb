"""Recipes: every key and its default, pages of YAML, and suites."""
