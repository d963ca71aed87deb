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
from llmrec.commands.compare.leaderboard import leaderboard, load_reference, read_results
from llmrec.commands.compare.rows import Contenders
from llmrec.data.split import SplitDataset, request_of, scale_of, threshold
from llmrec.durable import write_json, write_text
from llmrec.errors import RecipeError
from llmrec.evaluate.catalogue import evaluate_catalogue
from llmrec.evaluate.compare import Comparing, over_runs
from llmrec.evaluate.lists import cold_figures
from llmrec.evaluate.predictor import Evaluated, Protocol, evaluate
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

    results: dict[str, Any]
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
        rows: list[dict[str, Any]] = []
        contenders = Contenders(suite, out)
        for place, row in enumerate(suite.rows):
            found = _row(suite, row, place, splits, contenders)
            contenders.chosen[row.label] = found["parameters"]
            rows.append(found)
            say(_line(suite, found))
        written = _results(suite, rows, splits[suite.split_seeds[0]], time.monotonic() - begin)
        file = results / f"{suite.suite}.json"
        write_json(file, written)
    page = None
    if results.name == "results":
        page = results.parent / "LEADERBOARD.md"
        write_text(page, leaderboard(read_results(results), pages | _all_references()))
    return Ran(written, file, page)


def _reference(name: str) -> Any:
    folder = resource("eval", "references")
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(page.stem for page in folder.glob("*.yaml")))
        raise RecipeError(f"references: there is no page {name!r} under eval/references; known: {known}")
    return load_reference(path)


def _all_references() -> dict[str, Any]:
    return {page.stem: load_reference(page) for page in sorted(resource("eval", "references").glob("*.yaml"))}


def _family(suite: Suite) -> Family:
    """Return the family whose predictors a suite compares; what ranks the catalogue is asked as the next item is."""
    return family_of("sequential" if suite.task == "ranking" else suite.task)


# --------------------------------------------------------------------------- one row


def _row(
    suite: Suite, row: SuiteRow, place: int, splits: Mapping[int, SplitDataset], contenders: Contenders
) -> dict[str, Any]:
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
        stored = {"key": key, **_make(suite, row, splits, contenders)}
        write_json(path, stored)
    else:
        log.info("suite: reusing %s", path)
    return stored


def _make(suite: Suite, row: SuiteRow, splits: Mapping[int, SplitDataset], contenders: Contenders) -> dict[str, Any]:
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
    return {
        "name": row.label,
        "baseline": row.baseline,
        "parameters": dict(tuned.parameters),
        "trials": [{"parameters": dict(trial.parameters), "value": trial.value} for trial in tuned.trials],
        "chosen_by": tuned.metric,
        "seeds": list(seeds),
        "tables": {seen: {k: v for k, v in table.items() if k != "values"} for seen, table in tables.items()},
        "values": {seen: table["values"] for seen, table in tables.items()},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "memory_gb": round(memory[0] / 2**30, 2),
    }


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


def _fit(contenders: Contenders, row: SuiteRow, tuned: Tuned, data: SplitDataset, seed: int, first: bool) -> Any:
    """Return a fitted row; tuning a baseline has fitted its chosen point with the first seed."""
    if first and tuned.model is not None:
        contenders.keep(row, data, seed, tuned.model)
        return tuned.model
    return contenders.fit(row, data, seed, tuned.parameters)


def _measure(
    contenders: Contenders, row: SuiteRow, data: SplitDataset, seconds: dict[str, float], fit: Callable[[], Any]
) -> dict[str, Any]:
    suite = contenders.suite
    begin = time.monotonic()
    predictor = fit()
    seconds["fit"] = seconds.get("fit", 0.0) + time.monotonic() - begin
    protocol = Protocol(
        split=f"{data.kind}/{suite.split}",
        candidates="full",
        cutoffs=suite.cutoffs,
        resamples=suite.bootstrap,
        seed=0,
        catalogue=len(data.dataset.items),
    )
    begin = time.monotonic()
    cases = _cases(suite, data)
    found: dict[str, Evaluated] = {}
    if suite.task == "ranking":
        background = contenders.background(data)
        with Bar(row.label, len(cases), quiet=row.recipe is None) as advance:
            found |= evaluate_catalogue(
                predictor, cases, protocol, seen=suite.seen, background=background, progress=advance
            )
        for each in found.values():
            each.figures["cold"] = cold_figures(cases, background, each.values, metrics_of(suite))
    else:
        (table,) = tables_of(suite)
        found[table] = evaluate(predictor, cases, name=suite.task, kind=_family(suite).answer, protocol=protocol)
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


def _table(runs: Sequence[Any], splits: Sequence[Any]) -> dict[str, Any]:
    """Average a convention's figures over seeds; over tie rules of the split give the range."""
    metrics: dict[str, Any] = {}
    values: dict[str, list[float]] = {}
    for name in runs[0].figures["metrics"]:
        metrics[name] = over_runs([run.figures["metrics"][name] for run in runs])
        if len(splits) > 1:
            spread = [run.figures["metrics"][name]["value"] for run in splits]
            metrics[name]["range"] = None if None in spread else [min(spread), max(spread)]
        if name in runs[0].values:
            values[name] = [float(v) for v in over_seeds([run.values[name] for run in runs]).values]
    return {
        "metrics": metrics,
        "tie_rate": float(np.mean([run.figures["tie_rate"] for run in runs])),
        "n": runs[0].figures["n"],
        **({"cold": _mean_of([run.figures["cold"] for run in runs])} if "cold" in runs[0].figures else {}),
        "values": values,
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


def _results(suite: Suite, rows: Sequence[Mapping[str, Any]], data: SplitDataset, seconds: float) -> dict[str, Any]:
    spent = sum(sum(row["seconds"].values()) for row in rows)
    users = [case.request.user_id for case in _cases(suite, data)]
    asked = Comparing(suite, rows, users, headline_of(suite))
    compared = {seen: asked.best_with_others(seen) for seen in tables_of(suite)}
    return {
        "kind": "suite",
        "suite": suite.suite,
        "description": suite.description,
        "llmrec": __version__,
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["llmrec", *sys.argv[1:]]),
        "suite_hash": recipe_hash(suite),
        "versions": versions(),
        "machine": machine(),
        "data": describe(data),
        "protocol": {
            "split": f"{data.kind}/{suite.split}",
            "task": suite.task,
            "candidates": "full" if suite.task == "ranking" else None,
            "seen": list(tables_of(suite)),
            "metrics": metrics_of(suite),
            "seeds": list(suite.seeds),
            "split_seeds": list(suite.split_seeds),
            "users": len(set(users)),
            "requests": rows[0]["tables"][tables_of(suite)[0]]["n"],
        },
        "rows": [{k: v for k, v in row.items() if k not in ("key", "values")} for row in rows],
        "comparisons": [line for lines, _ in compared.values() for line in lines],
        "pairs": [line for seen in tables_of(suite) for line in asked.pairs(seen)],
        "detectable": {seen: line for seen, (_, line) in compared.items()},
        "references": list(suite.references),
        "seconds": max(seconds, spent),
    }


def _line(suite: Suite, row: Mapping[str, Any]) -> str:
    metrics = row["tables"][tables_of(suite)[0]]["metrics"]
    shown = "  ".join(f"{name} {_shown(metrics[name])}" for name in metrics_of(suite))
    return f"{row['name']:<20} {shown}  {sum(row['seconds'].values()):.0f} s"


def _shown(figure: Mapping[str, Any]) -> str:
    """Return a figure for the terminal; one that is not defined with its reason, which older results do not say."""
    if figure["value"] is not None:
        return f"{figure['value']:.4f}"
    return f"undefined ({figure['undefined']})" if figure.get("undefined") else "undefined"


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
