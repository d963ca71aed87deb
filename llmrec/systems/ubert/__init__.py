"""U-BERT: rating prediction from reviews, with users and items that attend to the tokens of their reviews."""
