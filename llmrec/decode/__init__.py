"""Constrained decoding over a catalogue: exact search that returns only real items, and scores of candidate sets."""
