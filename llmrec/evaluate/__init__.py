"""Evaluation: a predictor and cases in, figures out."""
