"""Inference engines, which generate, score, search and embed; `encode` tokenises their prompts."""
