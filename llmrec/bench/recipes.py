"""Runs a benchmark of recipes on the same cases, and collects the results and costs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.bench.engine import BenchmarkProgress, FinishedRow, RequestValues
from llmrec.bench.records import BenchmarkRow, BenchmarkTable, RowFigures, sort_key
from llmrec.ensembles.members import ENSEMBLE_NAMES
from llmrec.errors import RecipeError, did_you_mean
from llmrec.evaluate.compare import average_over_seeds
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.study import TEXT_BASELINE
from llmrec.prompts.template import load_templates
from llmrec.recipe.comparisons import Benchmark, BenchmarkRun
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.results import Figure, Results, Row, arm_name
from llmrec.tasks.family import family_of

TableKey = tuple[str, str, str, str | None]
"""The key of a table: family, headline metric, its signature, and the hash of the candidates, if any."""

_UNEQUAL_CASES = (
    "evaluated different users or items; use the same data, split, seed, eval.users and cases per user for both"
)
# Metrics that the page shows in addition to the metric of comparisons.
_MAX_OTHER_METRICS = 3


@dataclass(frozen=True)
class RunVariant:
    """A run: a recipe with its changes.

    Attributes:
        run: The entry of the benchmark.
        changes: The hyperparameter setting of the grid, by key.
        seed: Value of ``train.seed``; None for that of the recipe.
    """

    run: BenchmarkRun
    changes: Mapping[str, Any]
    seed: int | None

    @property
    def label(self) -> str:
        """Label in tables, which all seeds share."""
        short = (f"{key.rpartition('.')[2]}={_format_value(value)}" for key, value in self.changes.items())
        return ", ".join([self.run.name, *short])

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return _folder_name(self.label, self.seed)


def _folder_name(label: str, seed: int | None) -> str:
    plain = "".join(c if c.isalnum() or c in "-._" else "-" for c in label)
    return plain if seed is None else f"{plain}-seed{seed}"


@dataclass
class VariantRow:
    """A model in a table, over all its seeds.

    Attributes:
        table: Family and protocol: rows of one table are comparable.
        name: Name, unique in its table.
        label: Label of its run; empty for a baseline, which every run may have.
        run: The run whose results had it first.
        figures: Rows of results.json, one per seed.
        values: Per-request values by metric, one mapping per seed.
        users: The user of each request.
        requests: The request ids: a user may have several.
        members: Names of the members of an ensemble.
    """

    table: TableKey
    name: str
    label: str
    run: str = ""
    figures: list[Row] = field(default_factory=list)
    values: list[Mapping[str, NDArray[np.float64]]] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    members: Sequence[str] = ()


def run_recipes(benchmark: Benchmark, out: Path, say: Callable[[str], None]) -> Iterator[BenchmarkProgress]:
    """Run everything that is missing, and yield the results after each run.

    A killed benchmark resumes at the interrupted run, as any run does.

    Args:
        benchmark: From `llmrec.recipe.load.load_benchmark`.
        out: Folder of the run folders.
        say: Called with a line on each finished run.

    Raises:
        RecipeError: If a recipe, a grid or a pair cannot be used.
    """
    todo = planned_runs(benchmark, out)
    lines: dict[tuple[TableKey, str], VariantRow] = {}
    spent = 0.0
    for number, (point, recipe) in enumerate(todo, start=1):
        done = pipeline.run(recipe, out / point.folder)
        spent += float(done.results["seconds"])
        for line in _variant_rows(point, done, several=_has_several_arms(recipe)):
            _add_row(lines, line)
        yield combine_rows(lines.values(), benchmark.bootstrap, seconds=spent, missing=len(todo) - number)
        say(f"{point.folder}: {done.results['seconds']:.0f} s, {done.report}")
    tables: dict[TableKey, set[str]] = {}
    for table, name in lines:
        tables.setdefault(table, set()).add(name)
    if apart := next(
        (pair for pair in benchmark.pairs if not any(set(pair) <= rows for rows in tables.values())), None
    ):
        raise RecipeError(
            f"benchmark {benchmark.benchmark}, pairs: no table contains both {apart[0]!r} and {apart[1]!r}; all runs "
            "are finished and stored, so correct the pair and run the same command again",
            kind="mismatch",
            column="pairs",
        )


def planned_runs(benchmark: Benchmark, out: Path) -> list[tuple[RunVariant, Recipe]]:
    """Return the runs of a benchmark with their recipes, and check everything that can be checked without data.

    Args:
        benchmark: From `llmrec.recipe.load.load_benchmark`.
        out: Folder of the run folders.

    Raises:
        RecipeError: If a recipe or a grid cannot be used, or a pair names a model that no run has.
    """
    todo = list(iterate_variants(benchmark))
    _check_unique_folders(benchmark, todo)
    runs = [(point, load_variant_recipe(benchmark, point, out)) for point in todo]
    known = (
        {name for point, recipe in runs for name in _possible_model_names(point, recipe)} if benchmark.pairs else set()
    )
    if unknown := next((name for pair in benchmark.pairs for name in pair if name not in known), None):
        raise RecipeError(
            f"benchmark {benchmark.benchmark}, pairs: unknown model {unknown!r}{did_you_mean(unknown, sorted(known))}; "
            "baselines are named as in the recipe, language models as METHOD · TEMPLATE · RUN, or as METHOD · "
            "TEMPLATE · RUN · SETTING if a run evaluates several settings",
            kind="unknown-name",
            column="pairs",
        )
    return runs


def _possible_model_names(point: RunVariant, recipe: Recipe) -> Iterator[str]:
    """Yield the names that models of a run can have; the data determine which of them occur."""
    for family, section in recipe.tasks.present().items():
        for name in (*(baseline.label for baseline in section.baselines), TEXT_BASELINE, *ENSEMBLE_NAMES.values()):
            yield from (name, f"{name} · {point.label}")
        chosen = section.eval_templates or section.templates
        named = {name.rpartition("/")[2] for name in (*chosen, *section.untuned_templates)}
        templates = named if chosen else load_templates(family, family_of(family).prompts, *recipe.prompts)
        methods = (*section.strategies, ENSEMBLE_NAMES["language model"])
        for parts in itertools.product(methods, templates, recipe.eval.arms):
            yield _model_name(*parts, point.label, several=_has_several_arms(recipe))


def iterate_variants(benchmark: Benchmark) -> Iterator[RunVariant]:
    """Yield the runs seed by seed, so that an interrupted benchmark has complete tables."""
    seeds = sorted({seed for run in benchmark.runs for seed in run.seeds})
    for now in (None, *seeds):
        for run in benchmark.runs:
            for values in itertools.product(*run.grid.values()):
                for seed in run.seeds or (None,):
                    if seed == now:
                        yield RunVariant(run, dict(zip(run.grid, values, strict=True)), seed)


def _check_unique_folders(benchmark: Benchmark, todo: Sequence[RunVariant]) -> None:
    """Reject runs whose names differ only in characters that a folder name cannot contain."""
    known: dict[str, RunVariant] = {}
    for point in todo:
        other = known.setdefault(point.folder, point)
        if other is not point:
            raise RecipeError(
                f"benchmark {benchmark.benchmark}: the runs {other.label!r} and {point.label!r} would share the "
                f"folder {point.folder}; rename one run, and remove repeated values of a grid or of seeds",
                kind="duplicate",
                column="runs",
            )


def load_variant_recipe(benchmark: Benchmark, point: RunVariant, out: Path) -> Recipe:
    """Return the recipe of a run; ``out`` contains the run folders.

    Raises:
        RecipeError: If a key or a value is wrong; the message names the run.
    """
    changes = [f"{key}={json.dumps(value)}" for key, value in point.changes.items()]
    seed = [] if point.seed is None else [f"train.seed={point.seed}"]
    above = [
        f"{key}={json.dumps(str(_earlier_run_folder(benchmark, name, point, out)))}"
        for key, name in (("train.start", point.run.start), ("train.teacher.run", point.run.teacher))
        if name
    ]
    overrides = [*benchmark.overrides, *point.run.overrides, *changes, *seed, *above, f"name={point.folder}"[:80]]
    try:
        return load_recipe(point.run.recipe or benchmark.recipe, overrides)
    except RecipeError as error:
        raise error.reworded(f"benchmark {benchmark.benchmark}, run {point.label!r}: {error}") from None


def _earlier_run_folder(benchmark: Benchmark, name: str, point: RunVariant, out: Path) -> Path:
    """Return the folder of the earlier run that a run continues."""
    first = next(run for run in benchmark.runs if run.name == name)
    return out / _folder_name(first.name, point.seed if first.seeds else None)


# --------------------------------------------------------------------------- results


def _has_several_arms(recipe: Recipe) -> bool:
    """Whether a run evaluates several settings of the language model, whose names must differ."""
    return len(recipe.eval.arms) > 1


def _variant_rows(point: RunVariant, done: pipeline.Run, *, several: bool) -> Iterator[VariantRow]:
    results = Results.model_validate(done.results)
    for row, evaluated in zip(results.rows, done.rows, strict=True):
        headline = results.headline[row.task]
        if headline not in row.metrics:
            continue
        baseline = row.arm == "baseline"
        label = "" if baseline else point.label
        yield VariantRow(
            # The signature of the metric includes split, candidates and everything else that results must share.
            table=(row.task, headline, row.metrics[headline].signature, row.candidates),
            name=_row_name(row, point.label, several=several),
            label=label,
            run=point.label,
            figures=[row],
            values=[evaluated.values],
            users=[record.user_id for record in evaluated.records],
            requests=[record.request_id for record in evaluated.records],
            members=[_row_name(part, point.label, several=several) for part in results.members(row)]
            if row.fusion
            else (),
        )


def _row_name(row: Row, label: str, *, several: bool) -> str:
    """Return the name of a model in tables."""
    if row.arm == "baseline":
        return row.predictor
    return _model_name(row.predictor, (row.template or "").partition("/")[2], row.arm, label, several=several)


def _model_name(method: str, template: str, arm: str, label: str, *, several: bool) -> str:
    """Return the name of a language model in tables; ``several``: the run evaluates several settings."""
    return " · ".join([method, template, label, *([arm_name(arm)] if several else [])])


def _add_row(lines: dict[tuple[TableKey, str], VariantRow], line: VariantRow) -> None:
    """Add a result: another seed of a known model, a shared baseline, or a new model."""
    known = lines.setdefault((line.table, line.name), line)
    if known is line:
        return
    if known.requests != line.requests:
        raise RecipeError(f"{line.name}: two runs of one table {_UNEQUAL_CASES}", kind="mismatch")
    if line.label:
        known.figures += line.figures
        known.values += line.values
    elif known.run != line.run and not _has_same_values(known, line):
        # for example an ensemble of different members
        _add_row(lines, replace(line, name=f"{line.name} · {line.run}"))


def _has_same_values(one: VariantRow, other: VariantRow) -> bool:
    """Whether a baseline has the same values in two runs, up to rounding."""
    metric = one.table[1]
    return np.allclose(_request_values(one, metric), _request_values(other, metric), rtol=0, atol=1e-6, equal_nan=True)


def combine_rows(
    lines: Iterable[VariantRow], resamples: int, *, seconds: float = 0.0, missing: int = 0
) -> BenchmarkProgress:
    """Return tables and models; a model in several tables has the same name in all of them.

    Raises:
        RecipeError: If the runs of one table have different users or items.
    """
    by_table: dict[TableKey, list[VariantRow]] = {}
    for line in lines:
        by_table.setdefault(line.table, []).append(line)
    tables, rows = list[BenchmarkTable](), dict[str, FinishedRow]()
    for shared, group in by_table.items():
        if any(line.requests != group[0].requests for line in group):
            raise RecipeError(f"{shared[0]}: the runs of one table {_UNEQUAL_CASES}", kind="mismatch")
        same = sum(table.task == shared[0] for table in tables)
        name = f"{shared[0]}-{same + 1}" if same else shared[0]
        figures = {line.name: _average_figures(line, resamples) for line in group}
        tables.append(_benchmark_table(name, shared, group, figures))
        for line in group:
            sample = RequestValues(_request_values(line, shared[1]), line.users, line.requests)
            known = rows.get(line.name)
            row = _benchmark_row(line) if known is None else known.row
            rows[line.name] = FinishedRow(
                row.model_copy(update={"tables": {**row.tables, name: figures[line.name]}}),
                {**({} if known is None else known.samples), name: sample},
            )
    return BenchmarkProgress(tables, list(rows.values()), missing=missing, seconds=seconds)


def _benchmark_table(
    name: str, shared: TableKey, lines: Sequence[VariantRow], figures: Mapping[str, RowFigures]
) -> BenchmarkTable:
    family, metric, signature, candidates = shared
    ordered = sorted(lines, key=lambda line: sort_key(figures[line.name].value(metric), metric))
    others = [entry for entry in figures[ordered[0].name].metrics if entry != metric]
    baselines = (line.name for line in ordered if line.figures[0].arm == "baseline")
    return BenchmarkTable(
        name=name,
        task=family,
        metric=metric,
        metrics=(metric, *others[:_MAX_OTHER_METRICS]),
        signature=signature,
        candidates=candidates,
        requests=len(lines[0].users),
        users=len(set(lines[0].users)),
        best_baseline=next(baselines, None),
    )


def _benchmark_row(line: VariantRow) -> BenchmarkRow:
    first = line.figures[0]
    return BenchmarkRow(
        name=line.name,
        seeds=len(line.figures),
        arm=first.arm,
        predictor=first.predictor,
        template=first.template,
        run=line.label,
        shots=first.shots,
        engine=first.engine,
        tables={},
    )


def _average_figures(line: VariantRow, resamples: int) -> RowFigures:
    first = line.figures[0]
    metrics = {
        name: average_over_seeds(
            [_value_with_interval(row.metrics[name]) for row in line.figures],
            [values[name] for values in line.values if name in values],
            metric=name,
            users=line.users,
            resamples=resamples,
        )
        for name in first.metrics
    }
    costs = [row.cost for row in line.figures]
    tokens = _mean_none_as_zero([cost.prompt_tokens for cost in costs]) + _mean_none_as_zero(
        [cost.completion_tokens for cost in costs]
    )
    requests = max(1, first.n)
    return RowFigures(
        metrics=metrics,
        n=first.n,
        parse_rate=_mean_none_as_zero([row.parse_rate for row in line.figures]),
        **({"members": tuple(line.members)} if line.members else {}),
        tokens_per_request=tokens / requests,
        forwards_per_request=_mean_none_as_zero([cost.forwards for cost in costs]) / requests,
        seconds_per_request=_mean_none_as_zero([cost.seconds for cost in costs]) / requests,
    )


def _mean_none_as_zero(values: Sequence[float | None]) -> float:
    return float(np.mean([value or 0.0 for value in values]))


def _value_with_interval(figure: Figure) -> Figure:
    """Return a metric value with its interval, but without the settings of its computation."""
    return Figure.model_validate(figure.model_dump(include={"value", "low", "high", "undefined"}, exclude_unset=True))


def _request_values(line: VariantRow, metric: str) -> NDArray[np.float64]:
    """Return the per-request values of a model, shape (seeds, n)."""
    return np.array([values[metric] for values in line.values], dtype=np.float64)


def _format_value(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
