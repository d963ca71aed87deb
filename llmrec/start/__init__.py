"""Getting started: recipes for tables (init), the best recommender in a time budget (auto), hyperparameters (tune)."""
