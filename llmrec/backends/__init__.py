"""Engines that continue prompts: generate, score, search, embed; `encode` makes the token ids that they read."""
