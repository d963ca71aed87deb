"""Reinforcement learning (GRPO): rollouts for training interactions, their rewards, and the loss."""
