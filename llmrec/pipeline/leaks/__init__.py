"""What the audit looks at: splits, candidates and fitted models; rows, examples and prompts; the alignment task."""
