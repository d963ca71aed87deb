"""Writes the pages of stored results again: no row is run, and no figure changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from llmrec.bench.benchmark_page import pages
from llmrec.bench.conversations_page import page_of
from llmrec.bench.leaderboard import all_references, leaderboard, read_results
from llmrec.bench.records import BenchmarkResult, ChatResult
from llmrec.bench.slices_page import slices_page
from llmrec.durable import write_text
from llmrec.errors import DataError
from llmrec.report.escape import without_surrogates


def holds_results(folder: Path) -> bool:
    """Whether a folder holds results of suites or benchmarks, and none of a run."""
    return folder.is_dir() and not (folder / "results.json").is_file() and bool(_contents(folder))


def rewrite(folder: Path) -> list[Path]:
    """Write the leaderboard and the benchmarks' pages beside a folder of results, and return them.

    Args:
        folder: Such as ``eval/results``.

    Raises:
        DataError: If a file is not JSON, or lacks something.
        LlmrecError: If the rows of one table were measured under different protocols.
    """
    written: dict[str, str] = {}
    suites = read_results(folder)
    if suites:
        written["LEADERBOARD.md"] = leaderboard(suites, all_references())
        written["SLICES.md"] = slices_page(suites)
    for file, content in _contents(folder).items():
        try:
            written |= own_pages(without_surrogates(dict(content)))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(map(str, problem["loc"]))
            what = f"{file}: key {place!r}: {problem['msg']}; write it again with `llmrec eval`"
            raise DataError(what, kind="bad-value", at=file, column=place) from error
    for name, text in written.items():
        write_text(folder.parent / name, text)
    return [folder.parent / name for name in written]


def own_pages(content: Mapping[str, object]) -> dict[str, str]:
    """Return the pages of a benchmark or of conversations by name; suites share theirs, and have none of their own.

    Raises:
        ValidationError: If something is lacking.
    """
    if content.get("kind") == "benchmark":
        return pages(BenchmarkResult.model_validate(content))
    if content.get("kind") == "chat":
        talks = ChatResult.model_validate(content)
        return {f"{talks.chat}.md": page_of(talks)}
    return {}


def _contents(folder: Path) -> dict[Path, dict[str, object]]:
    """Return the results of suites and benchmarks by file."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            what = f"{file}: is not JSON ({error}); write it again with `llmrec eval`"
            raise DataError(what, kind="syntax", at=file) from error
        if isinstance(content, dict) and content.get("kind") in ("suite", "benchmark", "chat"):
            found[file] = content
    return found
