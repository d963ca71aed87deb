"""Registry entries of this package: `llmrec init`, `llmrec auto` and `llmrec tune`."""

from llmrec.entries import Command

COMMANDS = {
    "init": Command("llmrec.start.command:init", "Start", "Write a recipe for a table of interactions."),
    "auto": Command(
        "llmrec.start.command:auto", "Start", "Build a recommender from a table within a time budget.", resumes=True
    ),
    "tune": Command(
        "llmrec.start.command:tune",
        "Train and evaluate",
        "Tune hyperparameters of a recipe on validation users.",
        resumes=True,
    ),
}
FUNCTIONS = {
    "auto": "llmrec.start.functions:auto",
    "fit": "llmrec.start.functions:fit",
    "init": "llmrec.start.functions:init",
    "tune": "llmrec.start.functions:tune",
}
