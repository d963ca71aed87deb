"""Runs a benchmark: recipes beside each other on the same cases, with figures, comparisons and what each row costs."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec import __version__
from llmrec.bench.benchmark_page import pages
from llmrec.bench.records import BenchmarkLine, BenchmarkResult, BenchmarkTable
from llmrec.durable import write_json, write_text
from llmrec.errors import RecipeError, did_you_mean
from llmrec.evaluate.compare import Contrasts, Standing, exploratory, over_runs, planned, reach
from llmrec.machine import command_line, machine, versions
from llmrec.pipeline import run as pipeline
from llmrec.recipe.comparisons import Benchmark, BenchmarkRun
from llmrec.recipe.load import load_recipe, recipe_hash
from llmrec.results import Figure, Pair, Results, Row, lower

log = logging.getLogger(__name__)

Shared = tuple[str, str, str, str | None]
"""What rows of one table share: family, headline metric, its signature, and the hash of the candidates, if any."""

_UNEQUAL = (
    "asked different users, or about different items of theirs; give them the same data, split, seed, eval.users and "
    "questions a user"
)


@dataclass(frozen=True)
class Point:
    """One run: a recipe with its changes.

    Attributes:
        run: Where it comes from.
        changes: The point of the grid, by key.
        seed: Value of ``train.seed``; None: the recipe's own.
    """

    run: BenchmarkRun
    changes: Mapping[str, Any]
    seed: int | None

    @property
    def label(self) -> str:
        """The label in tables, which all seeds share."""
        short = (f"{key.rpartition('.')[2]}={_written(value)}" for key, value in self.changes.items())
        return ", ".join([self.run.name, *short])

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return _folder(self.label, self.seed)


def _folder(label: str, seed: int | None) -> str:
    plain = "".join(c if c.isalnum() or c in "-._" else "-" for c in label)
    return plain if seed is None else f"{plain}-seed{seed}"


@dataclass
class Line:
    """One row of a table, over all its seeds.

    Attributes:
        table: Family and protocol: rows of one table may be compared.
        name: Unique in its table.
        label: Of the run that it is a row of; empty for a baseline, which every run may have.
        run: Of the run that it was found in first.
        figures: Rows of results.json, one a seed.
        values: Per-request values by metric, one mapping a seed.
        users: The user of each request.
        requests: Their ids: a user may have several.
        members: Of an ensemble, the names of the rows that it joins.
    """

    table: Shared
    name: str
    label: str
    run: str = ""
    figures: list[Row] = field(default_factory=list)
    values: list[Mapping[str, NDArray[np.float64]]] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    members: Sequence[str] | None = None


def run_benchmark(
    benchmark: Benchmark, *, out: Path, results: Path, say: Callable[[str], None] = log.info, quiet: bool = False
) -> dict[str, Path]:
    """Make every run that is not there yet; after each of them write the figures, a page and a picture for each table.

    A killed benchmark resumes with the row that it was at: each run resumes as any run does. What is written before the
    end says how many runs are missing.

    Args:
        benchmark: From `llmrec.recipe.load.load_benchmark`.
        out: Where the run folders are.
        results: Folder for ``<benchmark>.json``; the page and the pictures are written beside it.
        say: Told of each run as it is done.
        quiet: Show no progress bars.

    Returns:
        The written files by what they are.

    Raises:
        RecipeError: If a recipe, a grid or a pair cannot be used.
    """
    todo = list(points(benchmark))
    _refuse_shared_folders(benchmark, todo)
    recipes = [recipe_of(benchmark, point, out) for point in todo]  # every mistake is found before the first hour
    lines: dict[tuple[Shared, str], Line] = {}
    spent, made = 0.0, {}
    for number, (point, recipe) in enumerate(zip(todo, recipes, strict=True), start=1):
        done = pipeline.run(recipe, out / point.folder, quiet=quiet)
        spent += float(done.results["seconds"])
        for line in _lines(point, done):
            _add(lines, line)
        made = _write(benchmark, lines, results, spent, missing=len(todo) - number)
        say(f"{point.folder}: {done.results['seconds']:.0f} s, {done.report}")
    _check_pairs(benchmark, lines)
    return made


def _check_pairs(benchmark: Benchmark, lines: Mapping[tuple[Shared, str], Line]) -> None:
    """Refuse pairs that no table holds, once all that was made is written.

    Raises:
        RecipeError: If there is one; the message names the row that is missing and the closest one.
    """
    tables = [{line.name for line in own} for own in _by_table(lines).values()]
    rows = sorted(set().union(*tables))
    for pair in benchmark.pairs:
        if any(set(pair) <= names for names in tables):
            continue
        unknown = next((name for name in pair if name not in rows), None)
        why = "its rows stand in no table together" if unknown is None else f"there is no row {unknown!r}"
        near = "" if unknown is None else did_you_mean(unknown, rows)
        raise RecipeError(
            f"benchmark {benchmark.benchmark}, pairs: {why}{near}; all runs are done and written, so fix the pair and "
            "run the same command again",
            kind="unknown-name",
            column="pairs",
        )


def _write(
    benchmark: Benchmark,
    lines: Mapping[tuple[Shared, str], Line],
    results: Path,
    spent: float,
    *,
    missing: int,
) -> dict[str, Path]:
    """Write what there is so far, and return the files by what they are."""
    written = BenchmarkResult(
        kind="benchmark",
        benchmark=benchmark.benchmark,
        description=benchmark.description,
        llmrec=__version__,
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        command=command_line(),
        benchmark_hash=recipe_hash(benchmark),
        versions=versions(),
        machine=machine(),
        seconds=spent,
        missing=missing,
        tables=_tables(benchmark, _by_table(lines), missing=missing),
    )
    file = results / f"{benchmark.benchmark}.json"
    write_json(file, written.as_json())
    made = {"results": file}
    for name, text in pages(written).items():
        path = results.parent / name
        write_text(path, text)
        made["page" if name.endswith(".md") else f"picture {path.stem}"] = path
    return made


def points(benchmark: Benchmark) -> Iterator[Point]:
    """Yield the runs of a benchmark, one seed after the other, so that a killed one has whole tables."""
    seeds = sorted({seed for run in benchmark.runs for seed in run.seeds})
    for now in (None, *seeds):
        for run in benchmark.runs:
            for values in itertools.product(*run.grid.values()):
                for seed in run.seeds or (None,):
                    if seed == now:
                        yield Point(run, dict(zip(run.grid, values, strict=True)), seed)


def _refuse_shared_folders(benchmark: Benchmark, todo: Sequence[Point]) -> None:
    """Refuse runs whose names differ in signs alone that a folder's name cannot hold."""
    known: dict[str, Point] = {}
    for point in todo:
        other = known.setdefault(point.folder, point)
        if other is not point:
            raise RecipeError(
                f"benchmark {benchmark.benchmark}: the runs {other.label!r} and {point.label!r} would share the folder "
                f"{point.folder}; give one another name, and no value twice in a grid or in seeds",
                kind="duplicate",
                column="runs",
            )


def recipe_of(benchmark: Benchmark, point: Point, out: Path) -> Any:
    """Return the recipe of a point; ``out`` is where the folders of runs are.

    Raises:
        RecipeError: If a key or a value is wrong; the message names the run.
    """
    changes = [f"{key}={json.dumps(value)}" for key, value in point.changes.items()]
    seed = [] if point.seed is None else [f"train.seed={point.seed}"]
    above = [
        f"{key}={json.dumps(str(_above(benchmark, name, point, out)))}"
        for key, name in (("train.start", point.run.start), ("train.teacher.run", point.run.teacher))
        if name
    ]
    overrides = [*benchmark.overrides, *point.run.overrides, *changes, *seed, *above, f"name={point.folder}"[:80]]
    try:
        return load_recipe(point.run.recipe or benchmark.recipe, overrides)
    except RecipeError as error:
        raise RecipeError(
            f"benchmark {benchmark.benchmark}, run {point.label!r}: {error}",
            kind=error.kind,
            at=error.place,
            column=error.column,
        ) from None


def _above(benchmark: Benchmark, name: str, point: Point, out: Path) -> Path:
    """Return the folder of the run that a point builds on: that of its seed, or the only one."""
    first = next(run for run in benchmark.runs if run.name == name)
    return out / _folder(first.name, point.seed if first.seeds else None)


# --------------------------------------------------------------------------- rows


def _lines(point: Point, done: pipeline.Run) -> Iterator[Line]:
    results = Results.model_validate(done.results)
    for row, made in zip(results.rows, done.rows, strict=True):
        headline = results.headline[row.task]
        if headline not in row.metrics:
            continue
        baseline = row.arm == "baseline"
        label = "" if baseline else point.label
        yield Line(
            # The metric's signature holds split, candidates and whatever else two figures must share.
            table=(row.task, headline, row.metrics[headline].signature, row.candidates),
            name=_name(row, point.label),
            label=label,
            run=point.label,
            figures=[row],
            values=[made.values],
            users=[record.user_id for record in made.records],
            requests=[record.request_id for record in made.records],
            members=[_name(member, point.label) for member in results.members(row)] if row.fusion else None,
        )


def _name(row: Row, label: str) -> str:
    """Return what a row of a run is called in tables."""
    return " · ".join(
        [row.predictor, *([] if row.arm == "baseline" else [(row.template or "").partition("/")[2], label])]
    )


def _add(lines: dict[tuple[Shared, str], Line], line: Line) -> None:
    """Take a row in: another seed of one that is there, a baseline that every run has, or a new one."""
    known = lines.setdefault((line.table, line.name), line)
    if known is line:
        return
    if known.requests != line.requests:
        raise RecipeError(f"{line.name}: two runs of one table {_UNEQUAL}", kind="mismatch")
    if line.label:
        known.figures += line.figures
        known.values += line.values
    elif known.run != line.run and not _alike(known, line):
        # Such as a fusion of other parts.
        _add(lines, replace(line, name=f"{line.name} · {line.run}"))


def _alike(one: Line, other: Line) -> bool:
    """Whether a baseline has the same values in two runs, but for what another order of additions makes of them."""
    metric = one.table[1]
    return np.allclose(_values(one, metric), _values(other, metric), rtol=0, atol=1e-6, equal_nan=True)


def _by_table(lines: Mapping[tuple[Shared, str], Line]) -> dict[Shared, list[Line]]:
    found: dict[Shared, list[Line]] = {}
    for (table, _), line in lines.items():
        found.setdefault(table, []).append(line)
    return found


# --------------------------------------------------------------------------- tables


def _tables(
    benchmark: Benchmark, lines: Mapping[Shared, Sequence[Line]], *, missing: int
) -> tuple[BenchmarkTable, ...]:
    """Return all tables; the planned pairs of all of them are tested as one family, those of missing runs with them."""
    tables = [_table(name, own, benchmark.bootstrap) for name, own in lines.items()]
    contrasts = [_contrasts(table, own) for table, own in zip(tables, lines.values(), strict=True)]
    meant = [
        (place, pair)
        for place, own in enumerate(contrasts)
        for pair in own.named([names for names in benchmark.pairs if {row.name for row in own.rows}.issuperset(names)])
    ]
    held = {(pair.a.name, pair.b.name) for _, pair in meant}
    more = sum(names not in held for names in benchmark.pairs) if missing else 0
    tested = planned([pair for _, pair in meant], resamples=benchmark.bootstrap, more=more)
    found = []
    for place, (table, own) in enumerate(zip(tables, contrasts, strict=True)):
        pairs = [pair for (at, _), pair in zip(meant, tested, strict=True) if at == place]
        against = _against(table, own, pairs, benchmark.bootstrap)
        every = [*pairs, *(pair for pair in against if pair.verdict is None)]
        line = reach(table.metric, every, users=table.users, comparisons=len(tested) + more)
        update = {"against_best_baseline": tuple(against), "pairs": tuple(pairs), "detectable": line}
        found.append(BenchmarkTable(**{**dict(table), **update}))
    return tuple(found)


def _against(table: BenchmarkTable, own: Contrasts, pairs: Sequence[Pair], resamples: int) -> list[Pair]:
    """Compare every row of a language model with the best baseline, without a verdict unless the pair is planned."""
    if table.best_baseline is None:
        return []
    known = {(pair.a, pair.b): pair for pair in pairs}
    asked = own.named([(row.name, table.best_baseline) for row in table.rows if row.arm != "baseline"])
    found = {pair.a: pair for pair in exploratory(asked, resamples=resamples)}
    return [known.get((each.a.name, each.b.name), found[each.a.name]) for each in asked]


def _contrasts(table: BenchmarkTable, lines: Sequence[Line]) -> Contrasts:
    values = {line.name: _values(line, table.metric) for line in lines}
    standings = [Standing(row.name, row.value(table.metric), values[row.name]) for row in table.rows]
    return Contrasts(table.metric, standings, lines[0].users)


def _table(name: Shared, lines: Sequence[Line], resamples: int) -> BenchmarkTable:
    """Return a table without its comparisons."""
    family, metric, signature, candidates = name
    users = lines[0].users
    if any(line.requests != lines[0].requests for line in lines):
        raise RecipeError(f"{family}: the runs of one table {_UNEQUAL}", kind="mismatch")
    sign = -1 if lower(metric) else 1
    # A figure that is not defined, such as the AUC of answers that are all alike, stands last.
    rows = sorted((_row(line, resamples) for line in lines), key=lambda row: -sign * (row.value(metric) or 0.0))
    rows.sort(key=lambda row: row.value(metric) is None)
    return BenchmarkTable(
        task=family,
        metric=metric,
        signature=signature,
        candidates=candidates,
        requests=len(users),
        users=len(set(users)),
        rows=tuple(rows),
        best_baseline=next((row.name for row in rows if row.arm == "baseline"), None),
    )


def _row(line: Line, resamples: int) -> BenchmarkLine:
    first = line.figures[0]
    metrics = {
        name: over_runs(
            [_bare(row.metrics[name]) for row in line.figures],
            [values[name] for values in line.values if name in values],
            metric=name,
            users=line.users,
            resamples=resamples,
        )
        for name in first.metrics
    }
    costs = [row.cost for row in line.figures]
    tokens = _mean([cost.prompt_tokens for cost in costs]) + _mean([cost.completion_tokens for cost in costs])
    requests = max(1, first.n)
    return BenchmarkLine(
        name=line.name,
        arm=first.arm,
        predictor=first.predictor,
        template=first.template,
        run=line.label,
        shots=first.shots,
        engine=first.engine,
        seeds=len(line.figures),
        parse_rate=_mean([row.parse_rate for row in line.figures]),
        metrics=metrics,
        **({} if line.members is None else {"members": tuple(line.members)}),
        tokens_per_request=tokens / requests,
        forwards_per_request=_mean([cost.forwards for cost in costs]) / requests,
        seconds_per_request=_mean([cost.seconds for cost in costs]) / requests,
    )


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([value or 0.0 for value in values]))


def _bare(figure: Figure) -> Figure:
    """Return a figure without its signature, which the table has."""
    return Figure.model_validate(figure.model_dump(include={"value", "low", "high", "undefined"}, exclude_unset=True))


def _values(line: Line, metric: str) -> NDArray[np.float64]:
    """Return the values of a row's requests, shape (seeds, n)."""
    return np.array([values[metric] for values in line.values], dtype=np.float64)


def _written(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
