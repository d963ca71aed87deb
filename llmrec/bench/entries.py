"""Registry entries of benchmarks."""

from llmrec.entries import Command

COMMANDS = {
    "compare": Command(
        "llmrec.bench.command:compare", "Train and evaluate", "Compare two finished runs on the same cases."
    ),
}
FUNCTIONS = {"compare": "llmrec.bench.runs:compare"}
HOOKS = {
    "run-page": "llmrec.bench.run:run_page",
    "check-page": "llmrec.bench.run:check_page",
    "rewrite-pages": "llmrec.bench.leaderboard:rewrite",
}
