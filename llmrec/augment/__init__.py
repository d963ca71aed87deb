"""What a language model knows, written once and stored as features."""
