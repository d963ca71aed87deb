"""Runs or checks benchmarks of any kind."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from llmrec.baselines.retrieve import check_retriever
from llmrec.bench.conversations import run_conversations
from llmrec.bench.engine import BenchmarkProgress, FinishedBenchmark, Page, benchmark_name, write_result
from llmrec.bench.recipes import planned_runs, run_recipes
from llmrec.bench.suite import check_rows, run_suite
from llmrec.cli.console import say, show_written_files, store_facts
from llmrec.pipeline.results import overwrite_warning
from llmrec.recipe.comparisons import Benchmark, Suite
from llmrec.recipe.load import load_benchmark, load_chat_suite, load_recipe, load_suite, recipe_hash

log = logging.getLogger(__name__)


def run_benchmark(page: Page, *, out: Path, results: Path, say: Callable[[str], None] = log.info) -> FinishedBenchmark:
    """Run everything that is missing, compare the models, and write the result with its pages.

    Args:
        page: From `llmrec.recipe.load`.
        out: Folder of finished rows, from which a killed benchmark resumes.
        results: Folder for ``<name>.json``; pages are written to its parent folder.
        say: Called with a line on each finished row.

    Raises:
        RecipeError: If a key of the page, or a component that it names, cannot be used.
        DataError: If the data cannot be used.
    """
    begin, result = time.monotonic(), None
    if note := overwrite_warning(results / f"{benchmark_name(page)}.json", "hash", recipe_hash(page)):
        say(note)
    # Intermediate results are also written, so that an interrupted benchmark of recipes has a page.
    for finished in _iterate_progress(page, out, say):
        result = write_result(page, finished, results, time.monotonic() - begin)
    assert result is not None
    return result


def _iterate_progress(page: Page, out: Path, say: Callable[[str], None]) -> Iterator[BenchmarkProgress]:
    if isinstance(page, Suite):
        return run_suite(page, out, say)
    if isinstance(page, Benchmark):
        return run_recipes(page, out, say)
    return run_conversations(page, out, say)


def run_page(
    kind: Literal["suite", "benchmark", "chat"], path: str, overrides: Sequence[str], out: Path | None, results: Path
) -> None:
    """Run a benchmark file, as ``llmrec eval`` does.

    Args:
        kind: From `llmrec.recipe.load.detect_page_kind`.
        path: The file of the page.
        overrides: Changed keys.
        out: Folder of finished rows; None for one below ``runs``.
        results: Folder for its results.

    Raises:
        LlmrecError: If a key is wrong, or a component that it names cannot be used.
    """
    load: dict[str, Callable[..., Page]] = {"suite": load_suite, "benchmark": load_benchmark, "chat": load_chat_suite}
    page = load[kind](path, overrides)
    folder = out or Path("runs") / ("benchmarks" if kind == "benchmark" else "suites") / benchmark_name(page)
    ran = run_benchmark(page, out=folder, results=results, say=say)
    store_facts(benchmark=ran.results.benchmark, rows=ran.results.rows)
    show_written_files(ran.files)


def check_page(kind: Literal["suite", "benchmark", "chat"], page: str, overrides: Sequence[str]) -> None:
    """Check a benchmark file and the recipes that it names.

    Raises:
        RecipeError: If a key or value of the page, or of a recipe that it names, is wrong.
    """
    if kind == "suite":
        suite = load_suite(page, overrides)
        check_rows(suite)
        for row in suite.rows:
            if row.recipe:
                load_recipe(row.recipe, row.overrides)
        store_facts(name=suite.suite, rows=[row.label for row in suite.rows], pairs=suite.pairs)
        say(f"suite {suite.suite} is valid: {len(suite.rows)} models, {len(suite.pairs)} planned comparisons")
    elif kind == "benchmark":
        bench = load_benchmark(page, overrides)
        todo = planned_runs(bench, Path("runs"))
        store_facts(name=bench.benchmark, runs=[run.name for run in bench.runs], models=len(todo), pairs=bench.pairs)
        say(
            f"benchmark {bench.benchmark} is valid: {len(bench.runs)} runs, {len(todo)} models, "
            f"{len(bench.pairs)} planned comparisons"
        )
    else:
        talks = load_chat_suite(page, overrides)
        load_recipe(talks.recipe, talks.overrides)
        check_retriever(talks.recommender, "recommender")
        store_facts(name=talks.chat, rows=[row.label for row in talks.rows], pairs=talks.pairs)
        say(f"conversations {talks.chat} are valid: {len(talks.rows)} models, {len(talks.pairs)} planned comparisons")
