"""Evaluates models on test cases, and compares their results."""
