"""The task families, and what they share."""
