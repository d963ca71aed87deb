"""The template language of prompts; what a model finally reads is made in `llmrec.backends.encode`."""
