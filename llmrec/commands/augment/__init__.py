"""`llmrec augment`: texts that a language model writes of users and items, as features."""
