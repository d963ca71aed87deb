"""Chooses the parameters of baselines on the validation split."""
