"""`llmrec auto`: from a table to a recommender within a budget of time."""
