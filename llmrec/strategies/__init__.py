"""Strategies: a backend and a task make a predictor."""
