"""A conversation over the user's own catalogue: what was said, tools, who chooses among them, a simulated user."""
