"""Supervised fine-tuning with adapters."""
