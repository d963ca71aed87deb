"""The command `llmrec rank`: ranks a file of requests, resumable."""
