"""Compares the models of any kind of benchmark, and writes the result with its pages.

Rows are made in `llmrec.bench.models`, `llmrec.bench.recipes` and `llmrec.bench.conversations`.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmrec import __version__
from llmrec.bench import leaderboard
from llmrec.bench.pages import benchmark_pages
from llmrec.bench.records import BenchmarkPair, BenchmarkResult, BenchmarkRow, BenchmarkTable, PairSlice
from llmrec.bench.references import read_references
from llmrec.durable import write_checked_json, write_json, write_text
from llmrec.evaluate.compare import ComparisonPlan, Contrast, ModelValues, compare_exploratory, compare_tables
from llmrec.evaluate.slices import SMALL_SLICE
from llmrec.machine import command_line, commit_hash, machine_facts, package_versions
from llmrec.pipeline.resume import read_stage
from llmrec.recipe.comparisons import AnyPair, Benchmark, ChatSuite, PartialPair, Suite, compared_names
from llmrec.recipe.load import recipe_hash
from llmrec.registry import is_lower_better
from llmrec.results import Pair

log = logging.getLogger(__name__)

Page = Suite | Benchmark | ChatSuite
T = TypeVar("T")

# Prefixes of subsets defined by target items, which are resampled by item.
_TARGET_PREFIXES = ("count:", "words:")
# The subset whose targets have no training interactions.
_COLD_SLICE = "count:0-0"


@dataclass(frozen=True)
class RequestValues:
    """The per-request values of a model in a table.

    Attributes:
        values: Shape (n,), or (seeds, n).
        users: The user of each request.
        requests: The request ids.
    """

    values: NDArray[np.float64]
    users: Sequence[str]
    requests: Sequence[object]


@dataclass(frozen=True)
class FinishedRow:
    """A model with its values in each table."""

    row: BenchmarkRow
    samples: Mapping[str, RequestValues]


@dataclass(frozen=True)
class RequestSubsets:
    """Subsets of the requests in a table, and the target of each request."""

    masks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    targets: Sequence[str] = ()


@dataclass(frozen=True)
class BenchmarkProgress:
    """The models of a benchmark that are finished so far.

    Attributes:
        tables: The tables, without detectable differences.
        rows: The rows.
        facts: Further fields of the result.
        parts: Slices of planned comparisons.
        missing: Number of runs to come.
        seconds: Time spent on these rows in all calls.
    """

    tables: Sequence[BenchmarkTable]
    rows: Sequence[FinishedRow]
    facts: Mapping[str, Any] = field(default_factory=dict)
    parts: RequestSubsets = field(default_factory=RequestSubsets)
    missing: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class FinishedBenchmark:
    """A finished benchmark: its result, and the written files by type."""

    results: BenchmarkResult
    files: dict[str, Path]


def benchmark_name(page: Page) -> str:
    """Return the name of a benchmark."""
    return page.suite if isinstance(page, Suite) else page.benchmark if isinstance(page, Benchmark) else page.chat


def write_result(page: Page, done: BenchmarkProgress, results: Path, seconds: float) -> FinishedBenchmark:
    """Compare the finished models, and write the result with its pages.

    Args:
        page: The benchmark page.
        done: The rows.
        results: Folder for ``<name>.json``; pages are written to its parent folder.
        seconds: Time spent in this call.
    """
    kind = "suite" if isinstance(page, Suite) else "benchmark" if isinstance(page, Benchmark) else "chat"
    result = BenchmarkResult(
        kind=kind,
        benchmark=benchmark_name(page),
        description=page.description,
        llmrec=__version__,
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        command=command_line(),
        commit=commit_hash(),
        hash=recipe_hash(page),
        versions=package_versions(),
        machine=machine_facts(),
        rows=tuple(row.row for row in done.rows),
        missing=done.missing,
        seconds=max(seconds, done.seconds),
        **compare_models(page, done),
        **done.facts,
    )
    file = results / f"{result.benchmark}.json"
    write_json(file, result.as_json())
    pages = benchmark_pages(result, read_references()) | leaderboard.leaderboard_pages(results)
    for name, text in pages.items():
        write_text(results.parent / name, text)
    titles = {leaderboard.PAGE: "leaderboard", f"{result.benchmark}.md": "page"}
    return FinishedBenchmark(
        result, {"results": file} | {titles[name]: results.parent / name for name in pages if name in titles}
    )


def read_or_compute(
    path: Path, key: str, read: Callable[[Mapping[str, Any]], T], make: Callable[[], Mapping[str, Any]]
) -> T:
    """Return a stored result with the same key, or compute it and store it.

    Args:
        path: The file of the row.
        key: See `llmrec.fingerprint.fingerprint`.
        read: Returns the row of stored content.
        make: Returns the content to store.
    """
    stored = read_stage(path, key, read)
    if stored is None:
        stored = {"key": key, **make()}
        write_checked_json(path, stored)
    else:
        log.info("benchmark: reusing %s", path)
    return read(stored)


# --------------------------------------------------------------------------- comparisons


def compare_models(page: Page, done: BenchmarkProgress) -> dict[str, Any]:
    """Compare the models: planned comparisons of all tables as one family of tests, then exploratory ones.

    Returns:
        Fields of a result.
    """
    explored = page.explored if isinstance(page, Suite) else ()
    by_table = [_collect_comparisons(table, done, page.pairs) for table in done.tables]
    explored_by_table = [_collect_comparisons(table, done, explored) for table in done.tables]
    unrun = _count_unrun_pairs(page, done)
    described = [
        _exploratory_contrasts(page, table, done, planned) for table, planned in zip(done.tables, by_table, strict=True)
    ]
    plans = [
        ComparisonPlan(
            table.metric,
            [contrast for frame, contrast in planned if contrast is not None and frame.items is None],
            others,
            [contrast for frame, contrast in planned if contrast is not None and frame.items is not None],
        )
        for table, planned, others in zip(done.tables, by_table, described, strict=True)
    ]
    tested = compare_tables(plans, resamples=page.bootstrap, more=unrun)
    pairs, comparisons, afterwards = list[BenchmarkPair](), list[BenchmarkPair](), list[BenchmarkPair]()
    for table, planned, more, results in zip(done.tables, by_table, explored_by_table, tested, strict=True):
        full, partial = iter(results.planned), iter(results.partial)
        pairs += _fill_results(planned, full, partial, done.parts, page.bootstrap)
        comparisons += [
            BenchmarkPair(table=table.name, metric=table.metric, **pair.as_json()) for pair in results.described
        ]
        able = iter(
            compare_exploratory([contrast for _, contrast in more if contrast is not None], resamples=page.bootstrap)
        )
        afterwards += _fill_results(more, able, able, done.parts, page.bootstrap)
    detectable = zip(done.tables, (results.detectable for results in tested), strict=True)
    return {
        "tables": tuple(table.model_copy(update={"detectable": text}) for table, text in detectable),
        "pairs": tuple(pairs),
        "comparisons": tuple(comparisons),
        **({"explored": tuple(afterwards), "unrun": unrun} if isinstance(page, Suite) else {}),
    }


def _count_unrun_pairs(page: Page, done: BenchmarkProgress) -> int:
    """Return the number of planned comparisons with models that were not run yet."""
    tables = [{row.row.name for row in done.rows if table.name in row.samples} for table in done.tables]
    absent = [pair for pair in page.pairs if not any(names.issuperset(compared_names(pair)) for names in tables)]
    if isinstance(page, Suite):
        return len(absent) * len(tables)
    return len(absent) if done.missing else 0


def _rows_with_value(table: BenchmarkTable, done: BenchmarkProgress) -> dict[str, tuple[ModelValues, RequestValues]]:
    """Return the models in a table that have a value, by name."""
    standings = {}
    for entry in done.rows:
        if (sample := entry.samples.get(table.name)) is not None:
            value = entry.row.tables[table.name].value(table.metric)
            if value is not None:
                standings[entry.row.name] = ModelValues(entry.row.name, value, sample.values), sample
    return standings


def _contrast_on_common_requests(
    metric: str, a: tuple[ModelValues, RequestValues], b: tuple[ModelValues, RequestValues]
) -> Contrast:
    """Pair two models on the requests that both have answered."""
    (one, first), (other, second) = a, b
    if first.requests == second.requests:
        return Contrast(metric, one, other, first.users)
    positions = {request: index for index, request in enumerate(second.requests)}
    both = [(index, positions[request]) for index, request in enumerate(first.requests) if request in positions]
    left, right = ([pair[side] for pair in both] for side in (0, 1))
    return Contrast(
        metric,
        replace(one, values=one.values[..., left]),
        replace(other, values=other.values[..., right]),
        [first.users[index] for index in left],
    )


def _collect_comparisons(
    table: BenchmarkTable, done: BenchmarkProgress, pairs: Sequence[AnyPair]
) -> list[tuple[BenchmarkPair, Contrast | None]]:
    """Return the comparisons to make in a table; None for comparisons without requests.

    Rows that were not run or have no figure are not compared.
    """
    rows, comparisons = _rows_with_value(table, done), list[tuple[BenchmarkPair, Contrast | None]]()
    for pair in pairs:
        names = compared_names(pair)
        if not rows.keys() >= set(names):
            continue
        contrast = _contrast_on_common_requests(table.metric, rows[names[0]], rows[names[1]])
        frame = BenchmarkPair(table=table.name, metric=table.metric, a=names[0], b=names[1])
        if isinstance(pair, PartialPair):
            cold = pair.items == "cold"
            indices = np.flatnonzero(done.parts.masks[_COLD_SLICE] == cold).tolist()
            # Cold-start interactions are few and concentrate on few items, so items are resampled.
            owners = [(done.parts.targets if cold else contrast.users)[index] for index in indices]
            clusters = len(set(owners)) if cold else None
            frame = frame.model_copy(update={"items": pair.items, "n": len(indices), "clusters": clusters})
            comparisons.append((frame, _restrict_contrast(contrast, indices, owners) if indices else None))
            continue
        if len(contrast.users) < table.requests:
            frame = frame.model_copy(update={"n": len(contrast.users), "users": len(set(contrast.users))})
        comparisons.append((frame, contrast))
    return comparisons


def _exploratory_contrasts(
    page: Page, table: BenchmarkTable, done: BenchmarkProgress, planned: Sequence[tuple[BenchmarkPair, Contrast | None]]
) -> list[Contrast]:
    """Return the exploratory comparisons of a table.

    For runs of recipes these compare the language models with the best baseline, unless that is planned; for models
    under one protocol they compare the best one with every other.
    """
    rows = _rows_with_value(table, done)
    if isinstance(page, ChatSuite):
        return []
    if isinstance(page, Benchmark):
        tested = {(frame.a, frame.b) for frame, _ in planned}
        best = rows.get(table.best_baseline or "")
        arms = {entry.row.name: entry.row.arm for entry in done.rows}
        return [
            _contrast_on_common_requests(table.metric, row, best)
            for name, row in rows.items()
            if best is not None and arms[name] != "baseline" and (name, table.best_baseline) not in tested
        ]
    sign = -1 if is_lower_better(table.metric) else 1
    first = max(rows.values(), key=lambda row: sign * (row[0].value or 0.0), default=None)
    return [
        _contrast_on_common_requests(table.metric, first, row)
        for row in rows.values()
        if first is not None and row is not first
    ]


def _fill_results(
    comparisons: Sequence[tuple[BenchmarkPair, Contrast | None]],
    full: Iterator[Pair],
    partial: Iterator[Pair],
    parts: RequestSubsets,
    resamples: int,
) -> Iterator[BenchmarkPair]:
    """Yield comparisons with the next result on all requests or a part of them, also on subsets of the requests."""
    for frame, contrast in comparisons:
        if contrast is None:
            yield frame
            continue
        update = dict(next(full if frame.items is None else partial))
        if parts.masks and frame.items is None:
            update["slices"] = _compare_slices(contrast, parts, resamples)
        yield frame.model_copy(update=update)


def _compare_slices(contrast: Contrast, parts: RequestSubsets, resamples: int) -> tuple[PairSlice, ...]:
    """Return a comparison on each subset; subsets with too few requests have no result."""
    slices = []
    for name, mask in parts.masks.items():
        indices = np.flatnonzero(mask).tolist()
        if not indices:
            continue
        by_target = name.startswith(_TARGET_PREFIXES)
        owners = [(parts.targets if by_target else contrast.users)[index] for index in indices]
        part = PairSlice(name=name, n=len(indices), clusters=len(set(owners)) if by_target else None)
        if len(indices) >= SMALL_SLICE:
            (pair,) = compare_exploratory([_restrict_contrast(contrast, indices, owners)], resamples=resamples)
            part = part.model_copy(update={"value": pair.value, "low": pair.low, "high": pair.high})
        slices.append(part)
    return tuple(slices)


def _restrict_contrast(contrast: Contrast, indices: Sequence[int], owners: Sequence[str]) -> Contrast:
    """Return a comparison on some of its requests, resampled by ``owners``."""
    one, other = (replace(row, values=row.values[..., list(indices)]) for row in (contrast.a, contrast.b))
    return Contrast(contrast.metric, one, other, owners)
