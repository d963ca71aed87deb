"""Recipes: all keys with their defaults, reading of YAML files, and benchmarks."""
