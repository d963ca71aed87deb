"""Figures of the documentation, bound to the results that they come from: `python -m eval.benchmarks.figures`."""
