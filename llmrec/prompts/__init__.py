"""The template language of prompts."""
