"""Answering requests with any model."""
