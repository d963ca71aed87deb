"""The registry entries of U-BERT."""

from llmrec.entries import BaselineEntry

# It uses earlier reviews and does not apply if the review itself is given.
BASELINES = {"ubert": BaselineEntry("llmrec.systems.ubert.baseline:UBert", ("rating",), needs="torch")}
