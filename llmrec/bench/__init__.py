"""Benchmarks that compare many models, and the leaderboard."""
