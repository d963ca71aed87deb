"""Only real items, and the best of them: search over the tokens of a whole catalogue, and scores of candidate sets."""
