"""What `llmrec eval` does with a page that compares: reads it, runs it, and says what was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llmrec.bench.benchmark import run_benchmark
from llmrec.bench.conversations import run_chat
from llmrec.bench.suite import run_suite
from llmrec.cli.show.console import say, tell, written
from llmrec.recipe.load import load_benchmark, load_chat, load_suite


def run_page(
    kind: Literal["suite", "benchmark", "chat"], page: str, overrides: Sequence[str], out: Path | None, results: Path
) -> None:
    """Run a suite, a benchmark or a suite of conversations.

    Args:
        kind: From `llmrec.recipe.load.kind_of_page`.
        page: Its file.
        overrides: Changed keys.
        out: Where finished parts are kept; None: below ``runs``.
        results: Folder for its results.

    Raises:
        LlmrecError: If a key is wrong, or what it names cannot be used.
    """
    if kind == "benchmark":
        bench = load_benchmark(page, overrides)
        written(run_benchmark(bench, out=out or Path("runs/benchmarks") / bench.benchmark, results=results, say=say))
    elif kind == "chat":
        talks = load_chat(page, overrides)
        written(run_chat(talks, out=out or Path("runs/suites") / talks.chat, results=results, say=say))
    else:
        suite = load_suite(page, overrides)
        ran = run_suite(suite, out=out or Path("runs/suites") / suite.suite, results=results, say=say)
        tell(suite=suite.suite, rows=ran.results.rows)
        written({"results": ran.file, **({"leaderboard": ran.leaderboard} if ran.leaderboard else {})})
