"""Learning from reward: questions about training events, rewards of rollouts, and the loss of a step."""
