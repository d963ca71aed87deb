"""The command `llmrec rank`: ranks a file of requests, and can be resumed."""
