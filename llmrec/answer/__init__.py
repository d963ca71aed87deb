"""Answers requests with any model: rankings, ratings, probabilities and texts."""
