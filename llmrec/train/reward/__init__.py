"""Reinforcement learning: questions about training interactions, rewards of rollouts, and the loss of a step."""
