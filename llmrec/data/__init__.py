"""From interactions to splits and candidate sets; polars throughout, without torch."""
