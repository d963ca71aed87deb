"""Suites, benchmarks and the leaderboard, which compare many models."""
