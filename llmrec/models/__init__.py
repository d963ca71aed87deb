"""Loads and changes the weights and tokenizers of models, without an inference engine."""
