"""Getting started: a recipe for a table (init), a recommender within a time budget (auto), searched keys (tune)."""
