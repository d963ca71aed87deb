"""The command compress: the trade-off between quality, latency and size of a fine-tuned model."""
