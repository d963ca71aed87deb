"""The command chat: a conversation in the terminal, and transcripts that are replayed."""
