"""Conversational recommendation over a catalogue: dialogue state, tools, dialogue managers, simulated users."""
