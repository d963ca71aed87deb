"""Evaluation of predictors on cases."""
