"""Runs a suite: each model is tuned on validation users per table, fitted with every seed, and evaluated.

`llmrec.baselines.tune` chooses a baseline's parameters; `llmrec.bench.models` fits recipes and ensembles.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil

from llmrec.baselines.item_texts import STORE_PREFIX
from llmrec.baselines.parameters import baseline_config
from llmrec.baselines.tune import ChosenSetting, Grid, TuningResult, tune
from llmrec.baselines.tune import Trial as Tried
from llmrec.bench.engine import BenchmarkProgress, FinishedRow, RequestSubsets, RequestValues, read_or_compute
from llmrec.bench.models import Models, suite_family
from llmrec.bench.records import BenchmarkProtocol, BenchmarkRow, BenchmarkTable, RowFigures, Trial
from llmrec.bench.references import reference
from llmrec.data.features import FeatureStore
from llmrec.data.split import SplitDataset, liked_threshold, request_of, scale_of
from llmrec.data.stats import wide_cutoff_warning
from llmrec.durable import write_checked_json
from llmrec.ensembles.members import ensemble_weights_record
from llmrec.entries import MetricKind
from llmrec.errors import RecipeError, did_you_mean
from llmrec.evaluate.catalogue import evaluate_catalogue, parse_seen_conventions
from llmrec.evaluate.compare import average_over_seeds
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.lists import cold_target_figures
from llmrec.evaluate.predictor import EvaluationResult, evaluate
from llmrec.evaluate.slices import target_slices
from llmrec.fingerprint import fingerprint
from llmrec.machine import package_versions
from llmrec.models.text_encoder import text_embedder
from llmrec.pipeline.results import data_info
from llmrec.pipeline.resume import SUITE_FILES, lock_folder, read_stage
from llmrec.pipeline.study import load_split
from llmrec.progress import Progress
from llmrec.recipe.comparisons import Suite, SuiteRow
from llmrec.registry import BASELINES, compared_metrics, import_component
from llmrec.results import Figure
from llmrec.tasks.family import is_family_supported
from llmrec.terminal import set_command_folder
from llmrec.types import Case, Interaction, Probability, Rating

# The name of the only table for these tasks; ranking has one table for each treatment of history items.
TABLES: Mapping[str, tuple[str, ...]] = {"rating": ("rating",), "ctr": ("yes-no",)}
_KINDS: Mapping[str, MetricKind] = {"rating": "rating", "ctr": "probability"}

# Keys that do not affect results.
_IGNORED_KEYS = {
    "suite",
    "description",
    "plugins",
    "data",
    "rows",
    "references",
    "pairs",
    "explored",
    "skip",
    "reserved",
}
_KEY_PACKAGES = ("numpy", "scipy", "torch", "implicit", "polars")

# shape (requests,) or (seeds, requests)
Values: TypeAlias = list[float] | list[list[float]]


@dataclass(frozen=True)
class FinishedModel:
    """A finished model, with its values by table and metric."""

    row: BenchmarkRow
    values: Mapping[str, Mapping[str, Values]]


@dataclass(frozen=True)
class SeedResult:
    """The results of a model in one table with one seed."""

    evaluated: EvaluationResult
    cold: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Trials:
    """Stores the hyperparameter settings tried, so that an interrupted suite does not fit them again."""

    path: Path
    key: str

    def known(self) -> list[Tried]:
        """Return the settings that an earlier call tried for the same model."""
        stored = read_stage(self.path, self.key, _parse_trials)
        return _parse_trials(stored) if stored else []

    def keep(self, trials: Sequence[Tried]) -> None:
        """Store all settings tried so far."""
        points = [{"parameters": dict(trial.parameters), "values": dict(trial.values)} for trial in trials]
        write_checked_json(self.path, {"key": self.key, "trials": points})


def _parse_trials(stored: Mapping[str, Any]) -> list[Tried]:
    return [Tried(trial["parameters"], trial["values"]) for trial in stored["trials"]]


def run_suite(suite: Suite, out: Path, say: Callable[[str], None]) -> Iterator[BenchmarkProgress]:
    """Run all missing models, and yield the results.

    Args:
        suite: From `llmrec.recipe.load.load_suite`.
        out: Folder of finished rows, from which a killed suite resumes.
        say: Called with a line on each finished row.

    Raises:
        RecipeError: If a row names an unknown baseline or parameter, or a reference is missing.
        DataError: If the data cannot be used.
    """
    check_rows(suite)
    for name in suite.references:
        reference(name)
    with lock_folder(out, SUITE_FILES):
        set_command_folder(out)
        splits = {seed: load_split(suite.data, seed) for seed in suite.split_seeds}
        if suite.task == "ranking":
            fewest = min(len(data.dataset.items) for data in splits.values())
            if wide := wide_cutoff_warning(suite.cutoffs, fewest):
                say(wide)
        rows: list[FinishedModel] = []
        models = Models(suite, out)
        for number, row in enumerate(suite.rows):
            if row.label in suite.skipped:
                continue
            done = _read_or_evaluate(suite, row, number, splits, models)
            models.chosen[row.label] = {name: figures.parameters for name, figures in done.row.tables.items()}
            rows.append(done)
            say(_format_progress_line(suite, done.row))
        yield _suite_progress(suite, rows, splits[suite.split_seeds[0]])


def check_rows(suite: Suite) -> None:
    """Reject models with an unknown baseline or parameter.

    Raises:
        RecipeError: If there is one; the message names the suite and the row.
    """
    for row in suite.rows:
        if row.baseline is None:
            continue
        supported = suite_family(suite).baselines
        if not is_family_supported(suite_family(suite), BASELINES, row.baseline):
            raise RecipeError(
                f"suite {suite.suite}: {row.baseline!r} does not support the task {suite.task}"
                f"{did_you_mean(row.baseline, supported)}; choose from {', '.join(supported)}",
                kind="unsupported",
                at=suite.suite,
                column="rows",
            )
        baseline_config(row.baseline, row.parameters, f"suite {suite.suite}, row {row.label!r}: parameters")
        for name, values in row.grid.items():
            for value in values:
                baseline_config(
                    row.baseline, {**row.parameters, name: value}, f"suite {suite.suite}, row {row.label!r}: grid"
                )


def _suite_progress(suite: Suite, rows: Sequence[FinishedModel], data: SplitDataset) -> BenchmarkProgress:
    cases, metric = suite_cases(suite, data), headline_metric(suite)
    users, requests = [case.request.user_id for case in cases], range(len(cases))
    tables = [
        BenchmarkTable(
            name=name,
            task=suite.task,
            metric=metric,
            metrics=tuple(metric_names(suite)),
            requests=rows[0].row.tables[name].n,
            users=len(set(users)),
        )
        for name in table_names(suite)
    ]
    protocol = BenchmarkProtocol(
        split=f"{data.kind}/{suite.split}",
        candidates="full" if suite.task == "ranking" else None,
        seeds=suite.seeds,
        split_seeds=suite.split_seeds,
        min_history=suite.min_history,
        users=len(set(users)),
        requests=tables[0].requests,
    )
    facts = {"data": data_info(data), "protocol": protocol, "skipped": suite.skipped, "references": suite.references}
    finished = [
        FinishedRow(
            done.row,
            {name: RequestValues(np.array(values[metric]), users, requests) for name, values in done.values.items()},
        )
        for done in rows
    ]
    parts = RequestSubsets()
    if suite.task == "ranking":
        parts = RequestSubsets(target_slices(cases, data), [str(case.truth) for case in cases])
    return BenchmarkProgress(
        tables, finished, facts, parts, seconds=sum(sum(done.row.seconds.values()) for done in rows)
    )


def _format_progress_line(suite: Suite, row: BenchmarkRow) -> str:
    metrics = row.tables[table_names(suite)[0]].metrics
    shown = "  ".join(f"{name} {_format_figure(metrics[name])}" for name in metric_names(suite))
    return f"{row.name:<20} {shown}  {sum(row.seconds.values()):.0f} s"


def _format_figure(figure: Figure) -> str:
    """Return a value for the terminal, or the reason why it is undefined."""
    return f"{figure.value:.4f}" if figure.value is not None else f"undefined ({figure.undefined})"


# --------------------------------------------------------------------------- one model


def _read_or_evaluate(
    suite: Suite, row: SuiteRow, number: int, splits: Mapping[int, SplitDataset], models: Models
) -> FinishedModel:
    """Return the stored result of a model with the same key, or compute and store it."""
    path = models.folder / "rows" / f"{number:02d}-{row.label}.json"
    key = fingerprint(
        "suite",
        made_by=[(BASELINES, each.baseline) for each in (row, *models.members(row)) if each.baseline],
        modules=("llmrec.ensembles.members",) if row.fuse else (),
        packages={name: version for name, version in package_versions().items() if name in _KEY_PACKAGES},
        # Without defaults, so that a new key does not invalidate stored results.
        row=row.model_dump(exclude_defaults=True),
        grid=parameter_grid(suite, row) if row.baseline else None,
        parts=[models.chosen[label] for label in row.fuse],
        inputs=models.inputs(row) if row.baseline is None else None,
        files=models.read(row) if row.baseline else None,
        data={seed: data.fingerprint for seed, data in splits.items()},
        reserved=suite.reserved if any(other.fuse for other in suite.rows) else None,
        protocol=suite.model_dump(
            exclude=_IGNORED_KEYS if suite_family(suite).answer is Probability else _IGNORED_KEYS | {"liked"},
            exclude_defaults=True,
        ),
    )

    def make() -> Mapping[str, Any]:
        done = evaluate_row(suite, row, splits, models, Trials(path.with_name(f"{path.stem}.trials.json"), key))
        return {"row": done.row.as_json(), "values": done.values}

    return read_or_compute(
        path, key, lambda stored: FinishedModel(BenchmarkRow.model_validate(stored["row"]), stored["values"]), make
    )


def evaluate_row(
    suite: Suite, row: SuiteRow, splits: Mapping[int, SplitDataset], models: Models, tried: Trials
) -> FinishedModel:
    """Tune a model on the first split, fit it with every seed on every split, and evaluate it.

    Args:
        suite: The suite.
        row: The row.
        splits: By seed of the tie rule.
        models: Fits rows that are not baselines.
        tried: The settings tried by earlier calls; new ones are added.
    """
    first = suite.split_seeds[0]
    seconds: dict[str, float] = {}
    with _measure_peak_memory() as memory:
        begin = time.monotonic()
        tuned = (
            _tune_baseline(suite, row, models.choosing(splits[first]), tried)
            if row.baseline
            else models.choose(row, splits[first], table_names(suite))
        )
        seconds["tune"] = time.monotonic() - begin + tuned.recalled
        drawn = models.stochastic(row)
        seeds = suite.seeds_of(row) if drawn else suite.seeds[:1]
        measure = partial(_fit_and_evaluate, models, row, tuned, seconds)
        # Tuning has already fitted the chosen setting with the first seed.
        runs = [measure(splits[first], seed, seed == seeds[0]) for seed in seeds]
        others = [measure(splits[seed], suite.seeds[0], False) for seed in suite.split_seeds[1:]]
    tables = {}
    for name, choice in tuned.choices.items():
        table = _average_figures(
            [run[name] for run in runs], [run[name] for run in (runs[0], *others)], suite.bootstrap
        )
        fusion = ensemble_weights_record(choice.model)
        if fusion is not None:
            # The texts of trees are very large.
            fusion = fusion.model_copy(update={"trees": None})
        chosen = {"parameters": dict(choice.parameters), "border": choice.border, "fusion": fusion}
        tables[name] = table.model_copy(update=chosen)
    result = BenchmarkRow(
        name=row.label,
        baseline=row.baseline,
        reads=models.reads(row),
        trials=tuple(Trial(parameters=dict(trial.parameters), values=dict(trial.values)) for trial in tuned.trials),
        chosen_by=tuned.metric,
        **_encoder_settings(row),
        seeds=len(seeds),
        **({"fewer_seeds": True} if drawn and len(seeds) < len(suite.seeds) else {}),
        tables=tables,
        seconds={name: round(value, 2) for name, value in seconds.items()},
        memory_gb=round(memory[0] / 2**30, 2),
    )
    return FinishedModel(result, {name: _request_values([run[name] for run in runs]) for name in tables})


def _encoder_settings(row: SuiteRow) -> dict[str, dict[str, str]]:
    """Return the settings of a model's text encoder for its record; empty without one."""
    if row.baseline is None:
        return {}
    config = baseline_config(row.baseline, row.parameters, row.label)
    name = import_component(BASELINES, row.baseline, "baseline").text_encoder(config.model_dump())
    if name is None:
        return {}
    if name.startswith(STORE_PREFIX):
        source = FeatureStore.open(name.removeprefix(STORE_PREFIX)).provenance("item")
        return {
            "encoder": {
                "store": name.removeprefix(STORE_PREFIX),
                **{key: str(value) for key, value in source.encoder.items()},
            }
        }
    return {"encoder": text_embedder(name).record}


def parameter_grid(suite: Suite, row: SuiteRow) -> Grid:
    """Return the grid of a baseline, with the values and fixed parameters that the suite sets."""
    declared = (
        {**import_component(BASELINES, str(row.baseline), "baseline").GRID, **_sort_grid_values(row.grid)}
        if row.tune
        else {}
    )
    grid = {name: values for name, values in declared.items() if name not in row.parameters}
    fixed: dict[str, tuple[Any, ...]] = {name: (value,) for name, value in row.parameters.items()}
    if suite_family(suite).answer is Probability:
        fixed["liked"] = (suite.liked,)
    return grid | fixed


def _sort_grid_values(grid: Grid) -> Grid:
    numbers = {name: all(isinstance(value, int | float) for value in values) for name, values in grid.items()}
    return {name: tuple(sorted(values)) if numbers[name] else values for name, values in grid.items()}


def _tune_baseline(suite: Suite, row: SuiteRow, data: SplitDataset, tried: Trials) -> TuningResult:
    """Return the parameters selected for each table; fixed ones are evaluated on validation users once."""
    grid, tables = parameter_grid(suite, row), table_names(suite)
    if data.valid.is_empty() and all(len(values) == 1 for values in grid.values()):
        only = ChosenSetting({name: values[0] for name, values in grid.items()})
        return TuningResult(choices=dict.fromkeys(tables, only), trials=(), metric="nothing to choose")
    return tune(
        str(row.baseline),
        data,
        seed=suite.seeds[0],
        tables=tables,
        grid=grid,
        known=tried.known(),
        kept=tried.keep,
    )


def _fit_and_evaluate(
    models: Models,
    row: SuiteRow,
    tuned: TuningResult,
    seconds: dict[str, float],
    data: SplitDataset,
    seed: int,
    first: bool,
) -> dict[str, SeedResult]:
    """Fit and evaluate the selected hyperparameters of a model."""
    results: dict[str, SeedResult] = {}
    together: dict[str, list[str]] = {}
    # An ensemble has separate members for each table, whatever its form is.
    for table, choice in tuned.choices.items():
        together.setdefault(f"{table if row.fuse else ''}{dict(choice.parameters)}", []).append(table)
    for tables in together.values():
        choice = tuned.choices[tables[0]]
        begin, before = time.monotonic(), models.earlier
        if first and choice.model is not None:
            model = choice.model
            models.keep(row, data, seed, model)
        else:
            model = models.fit(row, data, seed, tables[0], choice.parameters)
        seconds["fit"] = seconds.get("fit", 0.0) + time.monotonic() - begin + models.earlier - before
        results |= _evaluate_tables(models, row, data, seconds, model, tables)
    return {table: results[table] for table in tuned.choices}


def _evaluate_tables(
    models: Models,
    row: SuiteRow,
    data: SplitDataset,
    seconds: dict[str, float],
    predictor: Any,
    tables: Sequence[str],
) -> dict[str, SeedResult]:
    suite = models.suite
    protocol = EvalProtocol(
        split=f"{data.kind}/{suite.split}",
        candidates="full",
        cutoffs=suite.cutoffs,
        resamples=suite.bootstrap,
        seed=0,
        catalogue=len(data.dataset.items),
    )
    begin = time.monotonic()
    cases = suite_cases(suite, data)
    results: dict[str, SeedResult] = {}
    if suite.task == "ranking":
        background = models.background(data)
        with Progress(row.label, len(cases)) as bar:
            ranked = evaluate_catalogue(
                predictor,
                cases,
                protocol,
                seen=parse_seen_conventions(tables),
                background=background,
                progress=bar.advance,
            )
        for table, evaluated in ranked.items():
            results[table] = SeedResult(
                evaluated, cold_target_figures(cases, background, evaluated.values, metric_names(suite))
            )
    else:
        (table,) = tables
        measured = evaluate(predictor, cases, name=suite.task, kind=suite_family(suite).answer, protocol=protocol)
        results[table] = SeedResult(measured)
    seconds["answer"] = seconds.get("answer", 0.0) + time.monotonic() - begin
    return results


def suite_cases(suite: Suite, data: SplitDataset) -> list[Case]:
    """Return the held-out interactions of the suite's users as requests, except those without a true answer.

    Raises:
        RecipeError: If no user has a history of the length that the suite requires.
    """
    cases, held_out = [], data.holdouts(suite.split)
    # If a user has several held-out interactions, use all of them or none.
    for held in held_out.of(None if suite.users is None else held_out.first_users(suite.users)):
        truth = _true_answer(suite, data, held)
        if truth is None:
            continue  # without a true answer there is nothing to compare with
        request = request_of(data, held, suite.split, item=None if suite.task == "ranking" else held.item_id)
        if len(request.history) >= suite.min_history:
            cases.append(Case(request=request, truth=truth))
    if not cases:
        raise RecipeError(
            f"suite {suite.suite}: no user has {suite.min_history} known interactions before a held-out one; lower "
            "min_history",
            kind="too-few",
            column="min_history",
        )
    return cases


def _true_answer(suite: Suite, data: SplitDataset, held: Interaction) -> str | float | None:
    if suite.task == "ranking":
        return held.item_id
    if suite_family(suite).answer is Rating or held.rating is None:
        return held.rating
    return float(held.rating >= liked_threshold(scale_of(data), suite.liked))


def _average_figures(runs: Sequence[SeedResult], splits: Sequence[SeedResult], resamples: int) -> RowFigures:
    """Return results averaged over seeds, with their range over different orders of tied interactions."""
    first = runs[0].evaluated.figures
    users = [record.user_id for record in runs[0].evaluated.records]
    metrics = {
        name: average_over_seeds(
            [run.evaluated.figures.metrics[name] for run in runs],
            [run.evaluated.values[name] for run in runs if name in run.evaluated.values],
            metric=name,
            users=users,
            resamples=resamples,
        )
        for name in first.metrics
    }
    if len(splits) > 1:
        for name, figure in metrics.items():
            spread = [run.evaluated.figures.metrics[name].value for run in splits]
            known = [value for value in spread if value is not None]
            ends = (min(known), max(known)) if len(known) == len(spread) else None
            metrics[name] = figure.model_copy(update={"range": ends})
    table = RowFigures(
        metrics=metrics, tie_rate=float(np.mean([run.evaluated.figures.tie_rate for run in runs])), n=first.n
    )
    colds = [run.cold for run in runs if run.cold is not None]
    return table.model_copy(update={"cold": _mean_by_name(colds)}) if colds else table


def _request_values(runs: Sequence[SeedResult]) -> dict[str, Values]:
    """Return the values by request, and by seed if there are several seeds."""
    values: dict[str, Values] = {}
    for name in runs[0].evaluated.figures.metrics:
        if name in runs[0].evaluated.values:
            seeds = [[float(value) for value in run.evaluated.values[name]] for run in runs]
            values[name] = seeds if len(seeds) > 1 else seeds[0]
    return values


def _mean_by_name(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in figures])) for name in figures[0]}


@contextmanager
def _measure_peak_memory() -> Iterator[list[float]]:
    """Measure the peak resident memory of this process; yields a list with the size in bytes."""
    process, over = psutil.Process(), threading.Event()
    peak = [float(process.memory_info().rss)]

    def watch() -> None:
        while not over.wait(0.05):
            peak[0] = max(peak[0], float(process.memory_info().rss))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def table_names(suite: Suite) -> tuple[str, ...]:
    """Return the names of a suite's result tables."""
    return TABLES.get(suite.task, suite.seen)


def metric_names(suite: Suite) -> list[str]:
    """Return the metrics of a suite's tables, with the sort metric last."""
    if suite.task in _KINDS:
        return [*reversed(compared_metrics(_KINDS[suite.task]))]
    return [f"{name}@{k}" for k in suite.cutoffs for name in ("HR", "NDCG")]


def headline_metric(suite: Suite) -> str:
    """Return the metric used for comparisons."""
    return f"NDCG@{max(suite.cutoffs)}" if suite.task == "ranking" else metric_names(suite)[-1]
