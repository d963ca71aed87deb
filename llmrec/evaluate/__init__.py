"""Evaluates models on test cases, and compares the results."""
