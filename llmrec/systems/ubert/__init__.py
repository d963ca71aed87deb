"""U-BERT: rating prediction by attention over the reviews of user and item."""
