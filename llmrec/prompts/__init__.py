"""Prompt templates and their language; see `llmrec.backends.encode` for the final model input."""
