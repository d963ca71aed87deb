"""Checks the numbers of the documentation against the committed results: `python -m eval.benchmarks.figures`."""
