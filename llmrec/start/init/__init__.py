"""The command init: a recipe for a table nobody described."""
