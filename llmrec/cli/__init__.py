"""One folder a command: its files, options and printing."""
