"""The command `llmrec predict`: predictions about single items, from file to file."""
