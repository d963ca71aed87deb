"""What U-BERT adds to the registry."""

from llmrec.entries import BaselineEntry

# It reads what others wrote before, and is no use beside the review itself.
BASELINES = {"ubert": BaselineEntry("llmrec.systems.ubert.baseline:UBert", ("rating",), needs="torch")}
