"""Strategies that turn a backend into a predictor."""
