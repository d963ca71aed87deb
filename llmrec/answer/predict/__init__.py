"""The command `llmrec predict`: predictions about single items, from a file to a file."""
