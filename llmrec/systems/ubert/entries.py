"""What U-BERT adds to the registry."""

BASELINES = {"ubert": "llmrec.systems.ubert.baseline:UBert"}
