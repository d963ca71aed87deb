"""The stages of a run: study, training, evaluation, audit and results, and how a run is resumed."""
