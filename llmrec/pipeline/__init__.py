"""One run: study, training, evaluation, audit, results, and what lets it be resumed."""
