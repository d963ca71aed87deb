"""What M6-Rec adds to the registry: smaller versions of a tuned model."""

from llmrec.command import Command

COMMANDS = {
    "compress": Command(
        "llmrec.systems.m6.compress.command:compress",
        "Advanced",
        "Export the best smaller version that is fast enough.",
    ),
}
