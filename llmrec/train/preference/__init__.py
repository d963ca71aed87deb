"""Learning from preference: losses that compare a model with the one that it started from."""
