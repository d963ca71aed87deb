"""The vLLM backend, and what watches its engine."""
