"""Runs a suite: one protocol, one data set, many predictors; its rows are made in `llmrec.commands.compare.suite_row`.

A finished row is kept, so that a killed suite does not make it again.
"""

from __future__ import annotations

import datetime as dt
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmrec import __version__
from llmrec.baselines.parameters import config_of
from llmrec.commands.compare.leaderboard import Reference, all_references, leaderboard, load_reference, read_results
from llmrec.commands.compare.records import PairSlice, SuiteLine, SuitePair, SuiteProtocol, SuiteResult
from llmrec.commands.compare.rows import SuiteModels, family
from llmrec.commands.compare.slices_page import slices_page
from llmrec.commands.compare.suite_row import (
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
from llmrec.durable import write_json, write_text
from llmrec.errors import RecipeError
from llmrec.evaluate.compare import Contrast, Contrasts, Standing, exploratory, planned, reach
from llmrec.evaluate.slices import FEW, target_slices
from llmrec.experiment.claiming import SUITE
from llmrec.experiment.results import describe
from llmrec.experiment.resume import key_of, locked, read_stage
from llmrec.experiment.study import load_split
from llmrec.machine import machine, versions
from llmrec.recipe.comparisons import PlannedPair, Suite, SuiteRow
from llmrec.recipe.load import recipe_hash
from llmrec.resources import resource
from llmrec.results import Figure
from llmrec.types import Case, Probability

log = logging.getLogger(__name__)

# What has no say in a row's figures.
_SILENT = {"suite", "description", "data", "rows", "references", "pairs", "reserved"}
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
        out: Where finished rows are kept, so that a killed suite goes on.
        results: Folder for ``<suite>.json``; ``LEADERBOARD.md`` and ``SLICES.md`` are written beside it.
        say: Told of each row as it is done.

    Raises:
        RecipeError: If a row names no baseline of the task or a parameter that it has not, or a reference page is
            missing.
        DataError: If the data cannot be used.
    """
    for row in suite.rows:
        if row.baseline is None:
            continue
        able = family(suite).baselines
        if row.baseline not in able:
            raise RecipeError(
                f"suite {suite.suite}: {row.baseline!r} does not answer the task {suite.task}; choose from "
                f"{', '.join(able)}",
                kind="unsupported",
                at=suite.suite,
                column="rows",
            )
        config_of(row.baseline, row.parameters, f"suite {suite.suite}: parameters")
        for name, values in row.grid.items():
            for value in values:
                config_of(row.baseline, {**row.parameters, name: value}, f"suite {suite.suite}: grid")
    pages = {name: _reference(name) for name in suite.references}
    with locked(out, SUITE):
        begin = time.monotonic()
        splits = {seed: load_split(suite.data, seed) for seed in suite.split_seeds}
        rows: list[Done] = []
        contenders = SuiteModels(suite, out)
        for place, row in enumerate(suite.rows):
            found = _row(suite, row, place, splits, contenders)
            contenders.chosen[row.label] = {table: found.line.parameters_of(table) for table in tables_of(suite)}
            rows.append(found)
            say(_line(suite, found.line))
        written = _results(suite, rows, splits[suite.split_seeds[0]], time.monotonic() - begin)
        file = results / f"{suite.suite}.json"
        write_json(file, written.as_json())
    page = None
    if results.name == "results":
        page, suites = results.parent / "LEADERBOARD.md", read_results(results)
        write_text(page, leaderboard(suites, pages | all_references()))
        write_text(results.parent / "SLICES.md", slices_page(suites))
    return Ran(written, file, page)


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
    key = key_of(
        llmrec=__version__,
        packages={name: version for name, version in versions().items() if name in _MATTERS},
        # Without defaults, so that a key which is new here does not make finished rows anew.
        row=row.model_dump(exclude_defaults=True),
        grid=grid_of(suite, row) if row.baseline else None,
        parts=[contenders.chosen[label] for label in row.parts],
        inputs=contenders.inputs(row) if row.baseline is None else None,
        data={seed: data.fingerprint for seed, data in splits.items()},
        reserved=suite.reserved if any(other.fuse for other in suite.rows) else None,
        protocol=suite.model_dump(
            exclude=_SILENT if family(suite).answer is Probability else _SILENT | {"liked"}, exclude_defaults=True
        ),
    )
    stored = read_stage(path, key)
    if stored is None:
        tried = path.with_name(f"{path.stem}.trials.json")
        done = make_row(suite, row, splits, contenders, Trials(tried, key))
        stored = {"key": key, **done.line.as_json(), "values": done.values}
        write_json(path, stored)
    else:
        log.info("suite: reusing %s", path)
    return Done(SuiteLine.model_validate(stored), stored["values"])


# --------------------------------------------------------------------------- all rows


def _results(suite: Suite, rows: Sequence[Done], data: SplitDataset, seconds: float) -> SuiteResult:
    lines, metric, cases = [row.line for row in rows], headline_of(suite), cases_of(suite, data)
    users = [case.request.user_id for case in cases]
    meant: list[tuple[dict[str, str | int], Contrast]] = []
    described: list[SuitePair] = []
    for seen in tables_of(suite):
        standings = [
            Standing(row.line.name, row.line.tables[seen].metrics[metric].value, np.array(row.values[seen][metric]))
            for row in rows
        ]
        table = Contrasts(metric, standings, users)
        for asked in suite.pairs:
            if isinstance(asked, PlannedPair):
                part = _part(table, asked.items, cases, data)
                where: dict[str, str | int] = {"seen": seen, "items": asked.items, "n": len(part.users)}
                meant += [(where, pair) for pair in part.named([asked.rows])]
            else:
                meant += [({"seen": seen}, pair) for pair in table.named([asked])]
        found = exploratory(table.best_with_others(), resamples=suite.bootstrap)
        described += [SuitePair(seen=seen, metric=metric, **pair.as_json()) for pair in found]
    tested = planned([pair for _, pair in meant], resamples=suite.bootstrap)
    named = [
        SuitePair.model_validate({**where, "metric": metric, **pair.as_json()})
        for (where, _), pair in zip(meant, tested, strict=True)
    ]
    parts = target_slices(cases, data) if suite.task == "ranking" else {}
    named = [
        pair.model_copy(update={"slices": _sliced(contrast, parts, suite.bootstrap)}) if pair.items is None else pair
        for pair, (_, contrast) in zip(named, meant, strict=True)
    ]
    people = len(set(users))
    detectable = {
        seen: reach(
            metric,
            [pair for pair in (*named, *described) if pair.seen == seen and pair.items is None],
            users=people,
            comparisons=len(named),
        )
        for seen in tables_of(suite)
    }
    return SuiteResult(
        kind="suite",
        suite=suite.suite,
        description=suite.description,
        llmrec=__version__,
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        command=" ".join(["llmrec", *sys.argv[1:]]),
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
            users=len(set(users)),
            requests=lines[0].tables[tables_of(suite)[0]].n,
        ),
        rows=tuple(lines),
        comparisons=tuple(described),
        pairs=tuple(named),
        detectable=detectable,
        references=suite.references,
        seconds=max(seconds, sum(sum(line.seconds.values()) for line in lines)),
    )


def _part(table: Contrasts, items: str, cases: Sequence[Case], data: SplitDataset) -> Contrasts:
    """Return a table on the requests for cold items, which are few and so are clustered by item, or on all others."""
    known = set(data.train["item_id"].to_list())
    places = np.flatnonzero([(case.truth in known) == (items == "warm") for case in cases])
    rows = [replace(row, values=row.values[places]) for row in table.rows] if len(places) else []
    owners = [str(cases[place].truth) if items == "cold" else table.users[place] for place in places.tolist()]
    return Contrasts(table.metric, rows, owners)


def _sliced(contrast: Contrast, parts: Mapping[str, NDArray[np.bool_]], resamples: int) -> tuple[PairSlice, ...]:
    """Return a comparison over some of its requests; without a figure where they are too few to say anything."""
    found = []
    for name, member in parts.items():
        places = np.flatnonzero(member)
        if not len(places):
            continue
        if len(places) < FEW:
            found.append(PairSlice(name=name, n=len(places)))
            continue
        one, other = (replace(row, values=row.values[places]) for row in (contrast.a, contrast.b))
        owners = [contrast.users[place] for place in places.tolist()]
        (pair,) = exploratory([Contrast(contrast.metric, one, other, owners)], resamples=resamples)
        found.append(PairSlice(name=name, n=len(places), value=pair.value, low=pair.low, high=pair.high))
    return tuple(found)


def _line(suite: Suite, row: SuiteLine) -> str:
    metrics = row.tables[tables_of(suite)[0]].metrics
    shown = "  ".join(f"{name} {_shown(metrics[name])}" for name in metrics_of(suite))
    return f"{row.name:<20} {shown}  {sum(row.seconds.values()):.0f} s"


def _shown(figure: Figure) -> str:
    """Return a figure for the terminal; one that is not defined with its reason, which older results do not say."""
    if figure.value is not None:
        return f"{figure.value:.4f}"
    return f"undefined ({figure.undefined})" if figure.undefined else "undefined"
