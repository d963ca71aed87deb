"""What stands behind a model's states in place of the language-model head's loss: ratings, tied labels, a teacher."""
