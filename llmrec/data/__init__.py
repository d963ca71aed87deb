"""Loading of interactions, splits and candidate sets; uses polars, not torch."""
