"""The registry entries of UniSRec."""

from llmrec.entries import BaselineEntry

BASELINES = {
    "unisrec": BaselineEntry("llmrec.systems.unisrec.baseline:UniSRec", ("sequential", "direct"), needs="torch")
}
