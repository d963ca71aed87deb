"""Ensembles of models: members, weights, cross-fitting, storage, and the choice of the model to serve."""
