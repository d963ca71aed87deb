"""Ensembles: several rows become one: members and their weights, cross-fitting, how they are stored and chosen."""
