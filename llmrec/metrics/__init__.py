"""Metrics, their statistics and their signatures: numpy and scipy only."""
