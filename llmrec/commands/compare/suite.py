"""Runs a suite: one protocol, one data set, many predictors; each row tuned on validation, kept, and written down."""

from __future__ import annotations

import datetime as dt
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from llmrec import __version__
from llmrec.baselines.parameters import config_of
from llmrec.baselines.tuning import Tuned, tune
from llmrec.commands.compare.leaderboard import Reference, leaderboard, load_reference, read_results
from llmrec.commands.compare.records import SuiteLine, SuitePair, SuiteProtocol, SuiteResult, Table, Trial
from llmrec.commands.compare.rows import SuiteModels
from llmrec.data.split import SplitDataset, request_of, scale_of, threshold
from llmrec.durable import write_json, write_text
from llmrec.errors import RecipeError
from llmrec.evaluate.catalogue import evaluate_catalogue
from llmrec.evaluate.compare import Comparing, Standing, over_runs
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.lists import cold_figures
from llmrec.evaluate.predictor import Evaluated, evaluate
from llmrec.experiment.claiming import SUITE
from llmrec.experiment.results import describe
from llmrec.experiment.resume import Bar, key_of, locked, read_stage
from llmrec.experiment.study import load_split
from llmrec.machine import machine, versions
from llmrec.metrics.significance import over_seeds
from llmrec.recipe.comparisons import Suite, SuiteRow
from llmrec.recipe.load import recipe_hash
from llmrec.registry import BASELINES, lookup
from llmrec.resources import resource
from llmrec.results import Figure
from llmrec.tasks.family import Family, family_of
from llmrec.types import Case, Interaction, Probability, Rating

log = logging.getLogger(__name__)

# What the one table of these tasks is called; rankings have one for each treatment of the history.
TABLES: Mapping[str, tuple[str, ...]] = {"rating": ("rating",), "ctr": ("yes-no",)}
METRICS: Mapping[str, tuple[str, ...]] = {"rating": ("MAE", "RMSE"), "ctr": ("LogLoss", "GAUC", "AUC")}
# What has no say in a row's figures.
_SILENT = {"suite", "description", "data", "rows", "references", "pairs"}
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
        results: Folder for ``<suite>.json``; ``LEADERBOARD.md`` is written beside it.
        say: Told of each row as it is done.

    Raises:
        RecipeError: If a row names no baseline of the task or a parameter that it has not, or a reference page is
            missing.
        DataError: If the data cannot be used.
    """
    for row in suite.rows:
        if row.baseline is None:
            continue
        able = _family(suite).baselines
        if row.baseline not in able:
            raise RecipeError(
                f"suite {suite.suite}: {row.baseline!r} does not answer the task {suite.task}; choose from "
                f"{', '.join(able)}"
            )
        config_of(row.baseline, row.parameters, f"suite {suite.suite}: parameters")
    pages = {name: _reference(name) for name in suite.references}
    with locked(out, SUITE):
        begin = time.monotonic()
        splits = {seed: load_split(suite.data, seed) for seed in suite.split_seeds}
        rows: list[Done] = []
        contenders = SuiteModels(suite, out)
        for place, row in enumerate(suite.rows):
            found = _row(suite, row, place, splits, contenders)
            contenders.chosen[row.label] = found.line.parameters
            rows.append(found)
            say(_line(suite, found.line))
        written = _results(suite, rows, splits[suite.split_seeds[0]], time.monotonic() - begin)
        file = results / f"{suite.suite}.json"
        write_json(file, written.as_json())
    page = None
    if results.name == "results":
        page = results.parent / "LEADERBOARD.md"
        write_text(page, leaderboard(read_results(results), pages | _all_references()))
    return Ran(written, file, page)


@dataclass(frozen=True)
class Done:
    """A finished row, and its values by table, metric and request."""

    line: SuiteLine
    values: Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Once:
    """One table of a row with one seed; for rankings also the figures of items without training interactions."""

    found: Evaluated
    cold: Mapping[str, float] | None = None


def _reference(name: str) -> Reference:
    folder = resource("eval", "references")
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(page.stem for page in folder.glob("*.yaml")))
        raise RecipeError(f"references: there is no page {name!r} under eval/references; known: {known}")
    return load_reference(path)


def _all_references() -> dict[str, Reference]:
    return {page.stem: load_reference(page) for page in sorted(resource("eval", "references").glob("*.yaml"))}


def _family(suite: Suite) -> Family:
    """Return the family whose predictors a suite compares; what ranks the catalogue is asked as the next item is."""
    return family_of("sequential" if suite.task == "ranking" else suite.task)


# --------------------------------------------------------------------------- one row


def _row(suite: Suite, row: SuiteRow, place: int, splits: Mapping[int, SplitDataset], contenders: SuiteModels) -> Done:
    """Return a stored row with the same key, or make it and store it."""
    path = contenders.folder / "rows" / f"{place:02d}-{row.label}.json"
    key = key_of(
        llmrec=__version__,
        packages={name: version for name, version in versions().items() if name in _MATTERS},
        row=row.model_dump(),
        inputs=contenders.inputs(row) if row.baseline is None else None,
        data={seed: data.fingerprint for seed, data in splits.items()},
        protocol=suite.model_dump(exclude=_SILENT if _family(suite).answer is Probability else _SILENT | {"liked"}),
    )
    stored = read_stage(path, key)
    if stored is None:
        done = _make(suite, row, splits, contenders)
        stored = {"key": key, **done.line.as_json(), "values": done.values}
        write_json(path, stored)
    else:
        log.info("suite: reusing %s", path)
    return Done(SuiteLine.model_validate(stored), stored["values"])


def _make(suite: Suite, row: SuiteRow, splits: Mapping[int, SplitDataset], contenders: SuiteModels) -> Done:
    first = suite.split_seeds[0]
    fit, measure = partial(_fit, contenders, row), partial(_measure, contenders, row)
    seconds: dict[str, float] = {}
    with _peak() as memory:
        begin = time.monotonic()
        tuned = _tuned(suite, row, splits[first]) if row.baseline else contenders.choose(row, splits[first])
        seconds["tune"] = time.monotonic() - begin
        seeds = suite.seeds if contenders.stochastic(row) else suite.seeds[:1]
        runs = [
            # Tuning has fitted the chosen point with the first seed.
            measure(splits[first], seconds, partial(fit, tuned, splits[first], seed, seed == seeds[0]))
            for seed in seeds
        ]
        others = [
            measure(splits[seed], seconds, partial(fit, tuned, splits[seed], suite.seeds[0], False))
            for seed in suite.split_seeds[1:]
        ]
    tables = {
        seen: _table([run[seen] for run in runs], [run[seen] for run in (runs[0], *others)])
        for seen in tables_of(suite)
    }
    line = SuiteLine(
        name=row.label,
        baseline=row.baseline,
        parameters=dict(tuned.parameters),
        trials=tuple(Trial(parameters=dict(trial.parameters), value=trial.value) for trial in tuned.trials),
        chosen_by=tuned.metric,
        seeds=seeds,
        tables=tables,
        seconds={name: round(value, 2) for name, value in seconds.items()},
        memory_gb=round(memory[0] / 2**30, 2),
    )
    return Done(line, {seen: _values([run[seen] for run in runs]) for seen in tables})


def _tuned(suite: Suite, row: SuiteRow, data: SplitDataset) -> Tuned:
    """Choose among the declared grid, with the row's own parameters fixed."""
    name = str(row.baseline)
    declared = lookup(BASELINES, name, "baseline").GRID if row.tune else {}
    grid = {name: values for name, values in declared.items() if name not in row.parameters}
    fixed: dict[str, tuple[Any, ...]] = {name: (value,) for name, value in row.parameters.items()}
    if _family(suite).answer is Probability:
        fixed["liked"] = (suite.liked,)
    if all(len(values) == 1 for values in grid.values()):
        only = {name: values[0] for name, values in (grid | fixed).items()}
        return Tuned(parameters=only, trials=(), metric="nothing to choose")
    return tune(name, data, seed=suite.seeds[0], grid=grid | fixed)


def _fit(contenders: SuiteModels, row: SuiteRow, tuned: Tuned, data: SplitDataset, seed: int, first: bool) -> Any:
    """Return a fitted row; tuning a baseline has fitted its chosen point with the first seed."""
    if first and tuned.model is not None:
        contenders.keep(row, data, seed, tuned.model)
        return tuned.model
    return contenders.fit(row, data, seed, tuned.parameters)


def _measure(
    contenders: SuiteModels, row: SuiteRow, data: SplitDataset, seconds: dict[str, float], fit: Callable[[], Any]
) -> dict[str, Once]:
    suite = contenders.suite
    begin = time.monotonic()
    predictor = fit()
    seconds["fit"] = seconds.get("fit", 0.0) + time.monotonic() - begin
    protocol = EvalProtocol(
        split=f"{data.kind}/{suite.split}",
        candidates="full",
        cutoffs=suite.cutoffs,
        resamples=suite.bootstrap,
        seed=0,
        catalogue=len(data.dataset.items),
    )
    begin = time.monotonic()
    cases = _cases(suite, data)
    found: dict[str, Once] = {}
    if suite.task == "ranking":
        background = contenders.background(data)
        with Bar(row.label, len(cases), quiet=row.recipe is None) as advance:
            ranked = evaluate_catalogue(
                predictor, cases, protocol, seen=suite.seen, background=background, progress=advance
            )
        for seen, each in ranked.items():
            found[seen] = Once(each, cold_figures(cases, background, each.values, metrics_of(suite)))
    else:
        (table,) = tables_of(suite)
        measured = evaluate(predictor, cases, name=suite.task, kind=_family(suite).answer, protocol=protocol)
        found[table] = Once(measured)
    seconds["answer"] = seconds.get("answer", 0.0) + time.monotonic() - begin
    return found


def _cases(suite: Suite, data: SplitDataset) -> list[Case]:
    cases = []
    for held in data.holdouts(suite.split)[: suite.users]:
        truth = _truth(suite, data, held)
        if truth is None:
            continue  # there is nothing to compare an answer with
        request = request_of(data, held, suite.split, item=None if suite.task == "ranking" else held.item_id)
        cases.append(Case(request=request, truth=truth))
    return cases


def _truth(suite: Suite, data: SplitDataset, held: Interaction) -> str | float | None:
    if suite.task == "ranking":
        return held.item_id
    if _family(suite).answer is Rating or held.rating is None:
        return held.rating
    return float(held.rating >= threshold(scale_of(data), suite.liked))


def _table(runs: Sequence[Once], splits: Sequence[Once]) -> Table:
    """Average a convention's figures over seeds; over tie rules of the split give the range."""
    first = runs[0].found.figures
    metrics = {name: over_runs([run.found.figures.metrics[name] for run in runs]) for name in first.metrics}
    if len(splits) > 1:
        for name, figure in metrics.items():
            spread = [run.found.figures.metrics[name].value for run in splits]
            known = [value for value in spread if value is not None]
            ends = (min(known), max(known)) if len(known) == len(spread) else None
            metrics[name] = figure.model_copy(update={"range": ends})
    table = Table(metrics=metrics, tie_rate=float(np.mean([run.found.figures.tie_rate for run in runs])), n=first.n)
    colds = [run.cold for run in runs if run.cold is not None]
    return table.model_copy(update={"cold": _mean_of(colds)}) if colds else table


def _values(runs: Sequence[Once]) -> dict[str, list[float]]:
    """Return values by request, averaged over seeds."""
    return {
        name: [float(v) for v in over_seeds([run.found.values[name] for run in runs]).values]
        for name in runs[0].found.figures.metrics
        if name in runs[0].found.values
    }


def _mean_of(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([each[name] for each in figures])) for name in figures[0]}


@contextmanager
def _peak() -> Iterator[list[float]]:
    """Watch this process's memory; the list's one entry is the highest resident size in bytes seen."""
    process, over = psutil.Process(), threading.Event()
    found = [float(process.memory_info().rss)]

    def watch() -> None:
        while not over.wait(0.05):
            found[0] = max(found[0], float(process.memory_info().rss))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


# --------------------------------------------------------------------------- all rows


def _results(suite: Suite, rows: Sequence[Done], data: SplitDataset, seconds: float) -> SuiteResult:
    lines, metric = [row.line for row in rows], headline_of(suite)
    users = [case.request.user_id for case in _cases(suite, data)]
    best: list[SuitePair] = []
    named: list[SuitePair] = []
    detectable = {}
    for seen in tables_of(suite):
        standings = [
            Standing(row.line.name, row.line.tables[seen].metrics[metric].value, np.array(row.values[seen][metric]))
            for row in rows
        ]
        asked = Comparing(metric, standings, users, suite.bootstrap)
        found, detectable[seen] = asked.best_with_others()
        best += [SuitePair(seen=seen, metric=metric, **pair.as_json()) for pair in found]
        named += [SuitePair(seen=seen, metric=metric, **pair.as_json()) for pair in asked.pairs(suite.pairs)]
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
            users=len(set(users)),
            requests=lines[0].tables[tables_of(suite)[0]].n,
        ),
        rows=tuple(lines),
        comparisons=tuple(best),
        pairs=tuple(named),
        detectable=detectable,
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


def tables_of(suite: Suite) -> tuple[str, ...]:
    """Return the names of a suite's tables: the conventions about the history, or the one of ratings or yes/no."""
    return TABLES.get(suite.task, suite.seen)


def metrics_of(suite: Suite) -> list[str]:
    """Return the metrics of a suite's tables, the one that it is sorted by last."""
    ranked = [f"{name}@{k}" for k in suite.cutoffs for name in ("HR", "NDCG")]
    return list(METRICS.get(suite.task, ranked))


def headline_of(suite: Suite) -> str:
    """Return the metric that rows are compared by."""
    return f"NDCG@{max(suite.cutoffs)}" if suite.task == "ranking" else metrics_of(suite)[-1]
