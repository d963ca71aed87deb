"""Classic predictors under the same contract as language models; torch and implicit are imported when one is fitted."""
