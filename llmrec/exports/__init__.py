"""The command `llmrec export`: writes a run's model to a self-contained folder."""
