"""Weights and tokenizers, without an engine."""
