"""Conversational recommendation over a catalogue: dialogue state, tools, managers and a simulated user."""
