"""The commands: one module each, with a record of its options and what it prints."""
