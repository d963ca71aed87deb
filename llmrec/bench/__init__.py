"""Suites, benchmarks and the leaderboard: rows of many models side by side."""
