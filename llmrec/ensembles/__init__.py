"""Ensembles of models: members, weights, cross-fitting, storage, and choice of the model to serve."""
