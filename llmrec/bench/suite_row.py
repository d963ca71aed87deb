"""Makes one row of a suite: tuned on validation for each table, fitted with every seed, and measured.

`llmrec.baselines.tuning.tune` chooses a baseline's parameters, `llmrec.bench.rows` what other rows need.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil

from llmrec.baselines.ctr.align import Align
from llmrec.baselines.item_texts import LSA, STORE
from llmrec.baselines.tuning.search import Grid
from llmrec.baselines.tuning.tune import Choice, Tuned, tune
from llmrec.baselines.tuning.tune import Trial as Tried
from llmrec.bench.records import SuiteLine, Table, Trial
from llmrec.bench.rows import SuiteModels, family
from llmrec.data.features import FeatureStore
from llmrec.data.split import SplitDataset, request_of, scale_of, threshold
from llmrec.durable import write_checked
from llmrec.errors import RecipeError
from llmrec.evaluate.catalogue import conventions, evaluate_catalogue
from llmrec.evaluate.compare import BY_SEED, over_runs
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.lists import cold_figures
from llmrec.evaluate.predictor import Evaluated, evaluate
from llmrec.metrics.significance import over_seeds
from llmrec.models.embedder import text_embedder
from llmrec.pipeline.fusion.parts import weights_of
from llmrec.pipeline.resume import read_stage
from llmrec.progress import Bar
from llmrec.recipe.comparisons import Suite, SuiteRow
from llmrec.registry import BASELINES, lookup
from llmrec.types import Case, Interaction, Probability, Rating

# What the one table of these tasks is called; rankings have one for each treatment of the history.
TABLES: Mapping[str, tuple[str, ...]] = {"rating": ("rating",), "ctr": ("yes-no",)}
METRICS: Mapping[str, tuple[str, ...]] = {"rating": ("MAE", "RMSE"), "ctr": ("LogLoss", "GAUC", "AUC")}


# By request, or by seed and request.
Values: TypeAlias = list[float] | list[list[float]]


@dataclass(frozen=True)
class Done:
    """A finished row, and its values by table and metric, as `llmrec.evaluate.compare.sampled` takes them."""

    line: SuiteLine
    values: Mapping[str, Mapping[str, Values]]


@dataclass(frozen=True)
class Once:
    """One table of a row with one seed; for rankings also the figures of items without training interactions."""

    found: Evaluated
    cold: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Trials:
    """The points that tuning has tried, in a file, so that a killed suite does not fit them again."""

    path: Path
    key: str

    def known(self) -> list[Tried]:
        """Return the points of an earlier call for the same row."""
        stored = read_stage(self.path, self.key, _tried)
        return _tried(stored) if stored else []

    def keep(self, trials: Sequence[Tried]) -> None:
        """Store all points."""
        points = [{"parameters": dict(trial.parameters), "values": dict(trial.values)} for trial in trials]
        write_checked(self.path, {"key": self.key, "trials": points})


def _tried(stored: Mapping[str, Any]) -> list[Tried]:
    return [Tried(each["parameters"], each["values"]) for each in stored["trials"]]


def make_row(
    suite: Suite, row: SuiteRow, splits: Mapping[int, SplitDataset], contenders: SuiteModels, tried: Trials
) -> Done:
    """Tune a row on the first split, fit what was chosen with every seed and on every split, and measure it.

    Args:
        suite: The suite.
        row: The row.
        splits: By seed of the tie rule.
        contenders: What fits rows that are no baselines.
        tried: The points that an earlier call has tried; new ones are added.
    """
    first = suite.split_seeds[0]
    seconds: dict[str, float] = {}
    with _peak() as memory:
        begin = time.monotonic()
        tuned = (
            _tuned(suite, row, contenders.choosing(splits[first]), tried)
            if row.baseline
            else contenders.choose(row, splits[first], tables_of(suite))
        )
        seconds["tune"] = time.monotonic() - begin + tuned.recalled
        drawn = contenders.stochastic(row)
        seeds = suite.seeds_of(row) if drawn else suite.seeds[:1]
        measure = partial(_measured, contenders, row, tuned, seconds)
        # Tuning has fitted the chosen point with the first seed.
        runs = [measure(splits[first], seed, seed == seeds[0]) for seed in seeds]
        others = [measure(splits[seed], suite.seeds[0], False) for seed in suite.split_seeds[1:]]
    tables = {}
    for name, choice in tuned.choices.items():
        table = _table([run[name] for run in runs], [run[name] for run in (runs[0], *others)], suite.bootstrap)
        chosen = {"parameters": dict(choice.parameters), "border": choice.border, "fusion": weights_of(choice.model)}
        tables[name] = table.model_copy(update=chosen)
    line = SuiteLine(
        name=row.label,
        baseline=row.baseline,
        reads=contenders.reads(row),
        trials=tuple(Trial(parameters=dict(trial.parameters), values=dict(trial.values)) for trial in tuned.trials),
        chosen_by=tuned.metric,
        **_encoder(row),
        seeds=seeds,
        **({"fewer_seeds": True} if drawn and len(seeds) < len(suite.seeds) else {}),
        tables=tables,
        seconds={name: round(value, 2) for name, value in seconds.items()},
        memory_gb=round(memory[0] / 2**30, 2),
    )
    return Done(line, {seen: _values([run[seen] for run in runs]) for seen in tables})


def _encoder(row: SuiteRow) -> dict[str, dict[str, str]]:
    """Return how the text encoder that a row names makes its vectors, by the key of the record; nothing without one."""
    align = row.parameters.get("align")
    read = Align.model_validate(align).model_dump() if isinstance(align, dict) else row.parameters
    name = str(read.get("encoder", LSA))
    if name == LSA or read.get("longer"):
        return {}
    if name.startswith(STORE):
        made = FeatureStore.open(name.removeprefix(STORE)).provenance("item")
        return {
            "encoder": {"store": name.removeprefix(STORE), **{key: str(said) for key, said in made.encoder.items()}}
        }
    return {"encoder": text_embedder(name).record}


def grid_of(suite: Suite, row: SuiteRow) -> Grid:
    """Return the declared grid, with the values that the row names itself, and its parameters fixed."""
    declared = {**lookup(BASELINES, str(row.baseline), "baseline").GRID, **_ascending(row.grid)} if row.tune else {}
    grid = {name: values for name, values in declared.items() if name not in row.parameters}
    fixed: dict[str, tuple[Any, ...]] = {name: (value,) for name, value in row.parameters.items()}
    if family(suite).answer is Probability:
        fixed["liked"] = (suite.liked,)
    return grid | fixed


def _ascending(grid: Grid) -> Grid:
    numbers = {name: all(isinstance(value, int | float) for value in values) for name, values in grid.items()}
    return {name: tuple(sorted(values)) if numbers[name] else values for name, values in grid.items()}


def _tuned(suite: Suite, row: SuiteRow, data: SplitDataset, tried: Trials) -> Tuned:
    """Choose parameters for each table."""
    grid, tables = grid_of(suite, row), tables_of(suite)
    if all(len(values) == 1 for values in grid.values()):
        only = Choice({name: values[0] for name, values in grid.items()})
        return Tuned(choices=dict.fromkeys(tables, only), trials=(), metric="nothing to choose")
    return tune(
        str(row.baseline),
        data,
        seed=suite.seeds[0],
        tables=tables,
        grid=grid,
        known=tried.known(),
        kept=tried.keep,
    )


def _measured(
    contenders: SuiteModels,
    row: SuiteRow,
    tuned: Tuned,
    seconds: dict[str, float],
    data: SplitDataset,
    seed: int,
    first: bool,
) -> dict[str, Once]:
    """Fit what was chosen and measure it, tables of the same choice together; ``first``: with the seed of tuning."""
    found: dict[str, Once] = {}
    together: dict[str, list[str]] = {}
    # A mixture has parts of its own for each table, whatever its weights are.
    for table, choice in tuned.choices.items():
        together.setdefault(f"{table if row.parts else ''}{dict(choice.parameters)}", []).append(table)
    for tables in together.values():
        choice = tuned.choices[tables[0]]
        begin, before = time.monotonic(), contenders.earlier
        if first and choice.model is not None:
            model = choice.model
            contenders.keep(row, data, seed, model)
        else:
            model = contenders.fit(row, data, seed, tables[0], choice.parameters)
        seconds["fit"] = seconds.get("fit", 0.0) + time.monotonic() - begin + contenders.earlier - before
        found |= _measure(contenders, row, data, seconds, model, tables)
    return {table: found[table] for table in tuned.choices}


def _measure(
    contenders: SuiteModels,
    row: SuiteRow,
    data: SplitDataset,
    seconds: dict[str, float],
    predictor: Any,
    tables: Sequence[str],
) -> dict[str, Once]:
    suite = contenders.suite
    protocol = EvalProtocol(
        split=f"{data.kind}/{suite.split}",
        candidates="full",
        cutoffs=suite.cutoffs,
        resamples=suite.bootstrap,
        seed=0,
        catalogue=len(data.dataset.items),
    )
    begin = time.monotonic()
    cases = cases_of(suite, data)
    found: dict[str, Once] = {}
    if suite.task == "ranking":
        background = contenders.background(data)
        with Bar(row.label, len(cases)) as bar:
            ranked = evaluate_catalogue(
                predictor, cases, protocol, seen=conventions(tables), background=background, progress=bar.advance
            )
        for seen, each in ranked.items():
            found[seen] = Once(each, cold_figures(cases, background, each.values, metrics_of(suite)))
    else:
        (table,) = tables
        measured = evaluate(predictor, cases, name=suite.task, kind=family(suite).answer, protocol=protocol)
        found[table] = Once(measured)
    seconds["answer"] = seconds.get("answer", 0.0) + time.monotonic() - begin
    return found


def cases_of(suite: Suite, data: SplitDataset) -> list[Case]:
    """Return the held-out interactions of the suite's users as requests, less those that have no truth.

    Raises:
        RecipeError: If no user has as long a history as the suite asks for.
    """
    cases, held_out = [], data.holdouts(suite.split)
    # A user may have several held-out interactions: all of them are asked about, or none.
    for held in held_out.of(None if suite.users is None else held_out.first_users(suite.users)):
        truth = _truth(suite, data, held)
        if truth is None:
            continue  # there is nothing to compare an answer with
        request = request_of(data, held, suite.split, item=None if suite.task == "ranking" else held.item_id)
        if len(request.history) >= suite.min_history:
            cases.append(Case(request=request, truth=truth))
    if not cases:
        raise RecipeError(
            f"suite {suite.suite}: no held-out interaction of its users has {suite.min_history} known events before "
            "it; lower min_history",
            kind="too-few",
            column="min_history",
        )
    return cases


def _truth(suite: Suite, data: SplitDataset, held: Interaction) -> str | float | None:
    if suite.task == "ranking":
        return held.item_id
    if family(suite).answer is Rating or held.rating is None:
        return held.rating
    return float(held.rating >= threshold(scale_of(data), suite.liked))


def _table(runs: Sequence[Once], splits: Sequence[Once], resamples: int) -> Table:
    """Average a convention's figures over seeds; over tie rules of the split give the range."""
    first = runs[0].found.figures
    users = [record.user_id for record in runs[0].found.records]
    metrics = {
        name: over_runs(
            [run.found.figures.metrics[name] for run in runs],
            [run.found.values[name] for run in runs if name in run.found.values],
            metric=name,
            users=users,
            resamples=resamples,
        )
        for name in first.metrics
    }
    if len(splits) > 1:
        for name, figure in metrics.items():
            spread = [run.found.figures.metrics[name].value for run in splits]
            known = [value for value in spread if value is not None]
            ends = (min(known), max(known)) if len(known) == len(spread) else None
            metrics[name] = figure.model_copy(update={"range": ends})
    table = Table(metrics=metrics, tie_rate=float(np.mean([run.found.figures.tie_rate for run in runs])), n=first.n)
    colds = [run.cold for run in runs if run.cold is not None]
    return table.model_copy(update={"cold": _mean_of(colds)}) if colds else table


def _values(runs: Sequence[Once]) -> dict[str, Values]:
    """Return values by request, averaged over seeds; those of `BY_SEED` as each seed gave them."""
    found: dict[str, Values] = {}
    for name in runs[0].found.figures.metrics:
        if name in runs[0].found.values:
            seeds = [run.found.values[name] for run in runs]
            by_seed = name in BY_SEED and len(seeds) > 1
            found[name] = [[float(v) for v in one] for one in seeds] if by_seed else over_seeds(seeds).values.tolist()
    return found


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
