"""Item indexes: items written as titles, numbers, tokens, or codes from categories, co-occurrence or text."""
