"""`llmrec predict`: questions about one item each, from a file to a file."""
