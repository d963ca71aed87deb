"""`llmrec serve`: options of a service, and its start."""
