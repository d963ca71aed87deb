"""`llmrec tune`: a recipe's own keys, searched on validation."""
