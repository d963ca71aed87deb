"""`llmrec export`: writes the model of a run to a self-contained folder."""
