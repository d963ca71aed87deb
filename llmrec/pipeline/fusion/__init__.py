"""Rows that join others: their parts and weights, how they are kept, and fusions of finished runs."""
