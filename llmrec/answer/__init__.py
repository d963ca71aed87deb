"""Requests to answers, by any model."""
