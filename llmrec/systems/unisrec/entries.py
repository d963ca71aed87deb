"""What UniSRec adds to the registry."""

from llmrec.entries import BaselineEntry

BASELINES = {
    "unisrec": BaselineEntry("llmrec.systems.unisrec.baseline:UniSRec", ("sequential", "direct"), needs="torch")
}
