"""Recipes: all keys with their defaults, YAML files, and suites."""
