"""The registry entries of U-BERT."""

from llmrec.entries import BaselineEntry

# It reads earlier reviews, so it does not apply if the review itself is given.
BASELINES = {"ubert": BaselineEntry("llmrec.systems.ubert.baseline:UBert", ("rating",), needs="torch")}
