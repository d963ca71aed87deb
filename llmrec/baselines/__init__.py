"""Classic predictors under the same contract as language models: numpy and scipy only."""
