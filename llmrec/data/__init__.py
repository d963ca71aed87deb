"""Interactions in, splits and candidate sets out; polars throughout, free of torch."""
