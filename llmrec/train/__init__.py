"""Fine-tuning of adapters, of all weights, or of a rating head."""
