"""U-BERT: ratings from reviews, by users and items that attend to the tokens of what they wrote or what was written."""
