"""The template language of prompts; `llmrec.backends.encode` makes the final model input."""
