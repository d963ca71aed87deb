"""How an item is written: titles, numbers, tokens, and codes that say what it is or who chose it."""
