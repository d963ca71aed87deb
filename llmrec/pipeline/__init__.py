"""The stages of `llmrec run` (data, training, evaluation, audit, results), and how an interrupted run is resumed."""
