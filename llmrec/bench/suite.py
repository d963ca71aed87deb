"""Runs a suite: one protocol, one data set, many predictors; its rows are made in `llmrec.bench.suite_row`.

A finished row is kept, so that a killed suite does not make it again.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrec import __version__
from llmrec.baselines.parameters import config_of
from llmrec.bench.contrasts import compared
from llmrec.bench.leaderboard import Reference, all_references, leaderboard, load_reference, read_results
from llmrec.bench.records import SuiteLine, SuiteProtocol, SuiteResult
from llmrec.bench.rows import SuiteModels, family
from llmrec.bench.slices_page import slices_page
from llmrec.bench.suite_row import (
    Done,
    Trials,
    cases_of,
    grid_of,
    headline_of,
    make_row,
    metrics_of,
    tables_of,
)
from llmrec.data.split import SplitDataset
from llmrec.data.stats import wide_cutoffs
from llmrec.durable import write_checked, write_json, write_text
from llmrec.errors import RecipeError, did_you_mean
from llmrec.evaluate.compare import Standing
from llmrec.fingerprint import fingerprint
from llmrec.machine import command_line, machine, versions
from llmrec.pipeline.results import describe, of_another
from llmrec.pipeline.resume import SUITE, locked, read_stage
from llmrec.pipeline.study import load_split
from llmrec.recipe.comparisons import Suite, SuiteRow
from llmrec.recipe.load import recipe_hash
from llmrec.registry import BASELINES
from llmrec.resources import resource
from llmrec.results import Figure
from llmrec.tasks.family import answers
from llmrec.terminal import works_in
from llmrec.types import Probability

log = logging.getLogger(__name__)

# What has no say in a row's figures.
_SILENT = {"suite", "description", "plugins", "data", "rows", "references", "pairs", "explored", "skip", "reserved"}
_MATTERS = ("numpy", "scipy", "torch", "implicit", "polars")


@dataclass(frozen=True)
class Ran:
    """A finished suite: its results, the file that holds them, and the leaderboard, if there is one to write."""

    results: SuiteResult
    file: Path
    leaderboard: Path | None


def run_suite(suite: Suite, *, out: Path, results: Path, say: Callable[[str], None] = log.info) -> Ran:
    """Run every row that is not there yet, then write the suite's results and the leaderboard.

    Args:
        suite: From `llmrec.recipe.load.load_suite`.
        out: Where finished rows are kept, so that a killed suite resumes.
        results: Folder for ``<suite>.json``; ``LEADERBOARD.md`` and ``SLICES.md`` are written beside it.
        say: Told of each row as it is done.

    Raises:
        RecipeError: If a row names no baseline of the task or a parameter that it has not, or a reference page is
            missing.
        DataError: If the data cannot be used.
    """
    check_rows(suite)
    pages = {name: _reference(name) for name in suite.references}
    with locked(out, SUITE):
        works_in(out)
        begin, file = time.monotonic(), results / f"{suite.suite}.json"
        if told := of_another(file, "suite_hash", recipe_hash(suite)):
            say(told)
        splits = {seed: load_split(suite.data, seed) for seed in suite.split_seeds}
        if suite.task == "ranking":
            fewest = min(len(data.dataset.items) for data in splits.values())
            if wide := wide_cutoffs(suite.cutoffs, fewest):
                say(wide)
        rows: list[Done] = []
        contenders = SuiteModels(suite, out)
        for place, row in enumerate(suite.rows):
            if row.label in suite.skipped:
                continue
            found = _row(suite, row, place, splits, contenders)
            contenders.chosen[row.label] = {table: found.line.parameters_of(table) for table in tables_of(suite)}
            rows.append(found)
            say(_line(suite, found.line))
        written = _results(suite, rows, splits[suite.split_seeds[0]], time.monotonic() - begin)
        write_json(file, written.as_json())
    page = None
    if results.name == "results":
        page, suites = results.parent / "LEADERBOARD.md", read_results(results)
        write_text(page, leaderboard(suites, pages | all_references()))
        write_text(results.parent / "SLICES.md", slices_page(suites))
    return Ran(written, file, page)


def check_rows(suite: Suite) -> None:
    """Refuse rows that name no baseline of the task, or a parameter that it does not have.

    Raises:
        RecipeError: If there is one; the message names the suite and the row.
    """
    for row in suite.rows:
        if row.baseline is None:
            continue
        able = family(suite).baselines
        if not answers(family(suite), BASELINES, row.baseline):
            raise RecipeError(
                f"suite {suite.suite}: {row.baseline!r} does not answer the task {suite.task}"
                f"{did_you_mean(row.baseline, able)}; choose from {', '.join(able)}",
                kind="unsupported",
                at=suite.suite,
                column="rows",
            )
        config_of(row.baseline, row.parameters, f"suite {suite.suite}, row {row.label!r}: parameters")
        for name, values in row.grid.items():
            for value in values:
                config_of(
                    row.baseline, {**row.parameters, name: value}, f"suite {suite.suite}, row {row.label!r}: grid"
                )


def _reference(name: str) -> Reference:
    folder = resource("eval", "references")
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(page.stem for page in folder.glob("*.yaml")))
        raise RecipeError(
            f"references: there is no page {name!r} under eval/references; known: {known}",
            kind="unknown-name",
            column="references",
        )
    return load_reference(path)


# --------------------------------------------------------------------------- one row


def _row(suite: Suite, row: SuiteRow, place: int, splits: Mapping[int, SplitDataset], contenders: SuiteModels) -> Done:
    """Return a stored row with the same key, or make it and store it."""
    path = contenders.folder / "rows" / f"{place:02d}-{row.label}.json"
    key = fingerprint(
        "suite",
        made_by=[(BASELINES, row.baseline)] if row.baseline else [],
        packages={name: version for name, version in versions().items() if name in _MATTERS},
        # Without defaults, so that a key which is new here does not make finished rows anew.
        row=row.model_dump(exclude_defaults=True),
        grid=grid_of(suite, row) if row.baseline else None,
        parts=[contenders.chosen[label] for label in row.parts],
        inputs=contenders.inputs(row) if row.baseline is None else None,
        files=contenders.read(row) if row.baseline else None,
        data={seed: data.fingerprint for seed, data in splits.items()},
        reserved=suite.reserved if any(other.fuse for other in suite.rows) else None,
        protocol=suite.model_dump(
            exclude=_SILENT if family(suite).answer is Probability else _SILENT | {"liked"}, exclude_defaults=True
        ),
    )
    stored = read_stage(path, key, _done)
    if stored is not None and row.fuse:
        line = SuiteLine.model_validate(stored)
        # An earlier version chose the form with every seed anew, and named no "of".
        stored = stored if all("of" in line.parameters_of(seen) for seen in line.tables) else None
    if stored is None:
        tried = path.with_name(f"{path.stem}.trials.json")
        done = make_row(suite, row, splits, contenders, Trials(tried, key))
        stored = {"key": key, **done.line.as_json(), "values": done.values}
        write_checked(path, stored)
    else:
        log.info("suite: reusing %s", path)
    # What a row knows items by is not measured: an earlier version may have named it otherwise.
    return _done({**stored, "reads": contenders.reads(row)})


def _done(stored: Mapping[str, Any]) -> Done:
    return Done(SuiteLine.model_validate(stored), stored["values"])


# --------------------------------------------------------------------------- all rows


def _results(suite: Suite, rows: Sequence[Done], data: SplitDataset, seconds: float) -> SuiteResult:
    lines, cases = [row.line for row in rows], cases_of(suite, data)
    metric = headline_of(suite)
    tables = {
        seen: [
            Standing(row.line.name, row.line.tables[seen].metrics[metric].value, np.array(row.values[seen][metric]))
            for row in rows
        ]
        for seen in tables_of(suite)
    }
    found = compared(suite, metric, tables, cases, data)
    return SuiteResult(
        kind="suite",
        suite=suite.suite,
        description=suite.description,
        llmrec=__version__,
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        command=command_line(),
        suite_hash=recipe_hash(suite),
        versions=versions(),
        machine=machine(),
        data=describe(data),
        protocol=SuiteProtocol(
            split=f"{data.kind}/{suite.split}",
            task=suite.task,
            candidates="full" if suite.task == "ranking" else None,
            seen=tables_of(suite),
            metrics=tuple(metrics_of(suite)),
            seeds=suite.seeds,
            split_seeds=suite.split_seeds,
            min_history=suite.min_history,
            users=len({case.request.user_id for case in cases}),
            requests=lines[0].tables[tables_of(suite)[0]].n,
        ),
        rows=tuple(lines),
        comparisons=found.described,
        pairs=found.planned,
        explored=found.explored,
        skipped=suite.skipped,
        unrun=found.unrun,
        detectable=found.detectable,
        references=suite.references,
        seconds=max(seconds, sum(sum(line.seconds.values()) for line in lines)),
    )


def _line(suite: Suite, row: SuiteLine) -> str:
    metrics = row.tables[tables_of(suite)[0]].metrics
    shown = "  ".join(f"{name} {_shown(metrics[name])}" for name in metrics_of(suite))
    return f"{row.name:<20} {shown}  {sum(row.seconds.values()):.0f} s"


def _shown(figure: Figure) -> str:
    """Return a figure for the terminal; one that is not defined with its reason, which older results do not say."""
    if figure.value is not None:
        return f"{figure.value:.4f}"
    return f"undefined ({figure.undefined})" if figure.undefined else "undefined"
