"""`llmrec refresh`: new events and items into what a service answers from."""
