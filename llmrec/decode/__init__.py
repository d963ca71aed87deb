"""Constrained decoding: exact search over a catalogue that returns only existing items, and scoring of candidates."""
