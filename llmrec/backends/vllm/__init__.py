"""The vLLM backend, and the supervision of its engine processes."""
