"""Item indexes: how items are written, as titles, numbers, tokens, or codes made from categories, users or texts."""
