"""What UniSRec adds to the registry."""

BASELINES = {"unisrec": "llmrec.systems.unisrec.baseline:UniSRec"}
