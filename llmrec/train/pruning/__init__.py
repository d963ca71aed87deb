"""Pruning: weights that are 0 in the end, chosen while the others learn."""
