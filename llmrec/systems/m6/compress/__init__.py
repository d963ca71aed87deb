"""`llmrec compress`: trades quality against latency and size of a fine-tuned model."""
