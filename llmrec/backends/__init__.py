"""Engines that continue prompts: generate, score, embed."""
