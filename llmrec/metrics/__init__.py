"""Metrics, their statistics and their signatures, with numpy and scipy only."""
