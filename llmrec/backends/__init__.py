"""Inference engines, which generate, score and search; `encode` tokenises their prompts."""
