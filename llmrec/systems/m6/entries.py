"""The registry entries of M6-Rec: retrieval heads, late interaction, and smaller versions of a fine-tuned model."""

from llmrec.entries import BaselineEntry, Command

COMMANDS = {
    "compress": Command(
        "llmrec.systems.m6.compress.command:compress",
        "Advanced",
        "Export the best model below a latency limit.",
    ),
}

BASELINES = {
    "state-tower": BaselineEntry("llmrec.systems.m6.states:StateTower", ("sequential", "direct"), needs="torch"),
    "late-interaction": BaselineEntry("llmrec.systems.m6.late:LateInteraction", ("ctr",), needs="torch"),
}
