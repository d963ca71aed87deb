"""Selects the model comparisons of a run: planned comparisons, corrected for multiple testing, and exploratory ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmrec.errors import RecipeError, did_you_mean
from llmrec.evaluate.compare import ComparisonPlan, Contrast, ModelValues, compare_tables
from llmrec.pipeline.evaluation import ResultRow
from llmrec.pipeline.row_specs import specs_for_arm
from llmrec.pipeline.study import Study
from llmrec.recipe.schema import BEST_BASELINE
from llmrec.registry import is_lower_better
from llmrec.results import Arm, Choice, Comparison
from llmrec.tasks.family import family_of


@dataclass(frozen=True)
class ModelComparison:
    """A comparison of models a and b on the main metric of a task."""

    family: str
    metric: str
    a: ResultRow
    b: ResultRow

    @property
    def ids(self) -> tuple[str, str]:
        """Ids of the two models."""
        return self.a.figures.id, self.b.figures.id

    def contrast(self) -> Contrast:
        """The comparison as an argument of `compare`."""
        users = [record.user_id for record in self.a.records]
        return Contrast(self.metric, _model_values(self.a, self.metric), _model_values(self.b, self.metric), users)


def compare_rows(
    study: Study, rows: Sequence[ResultRow], choice: Choice | None = None
) -> tuple[list[Comparison], dict[str, str]]:
    """Compare the models of a run: planned comparisons of all tasks as one family of tests, then exploratory ones.

    ``choice`` is the row that is served. Returns the comparisons, and for each task one line on their statistical
    power.
    """
    meant = list(planned_comparisons(study, rows))
    known = {ends for pair in meant for ends in (pair.ids, pair.ids[::-1])}
    other = [pair for pair in exploratory_comparisons(study, rows, choice) if pair.ids not in known]
    families = [name for name in study.tasks if any(pair.family == name for pair in (*meant, *other))]
    plans = [
        ComparisonPlan(
            next(pair.metric for pair in (*meant, *other) if pair.family == name),
            [pair.contrast() for pair in meant if pair.family == name],
            [pair.contrast() for pair in other if pair.family == name],
        )
        for name in families
    ]
    tested = compare_tables(plans, resamples=study.recipe.eval.bootstrap, seed=study.recipe.seed)
    planned = {name: iter(results.planned) for name, results in zip(families, tested, strict=True)}
    described = {name: iter(results.described) for name, results in zip(families, tested, strict=True)}
    entries = [
        Comparison(task=pair.family, metric=pair.metric, **next(results[pair.family]).as_json())
        for pairs, results in ((meant, planned), (other, described))
        for pair in pairs
    ]
    return entries, {name: results.detectable for name, results in zip(families, tested, strict=True)}


def planned_comparisons(study: Study, rows: Sequence[ResultRow]) -> Iterator[ModelComparison]:
    """Yield the planned comparisons, from ``eval.planned`` or by default.

    By default the tuned row of each family, under its scored strategy and first template, is compared with the untuned
    row of the same strategy and template, and with each of `_models_to_beat`. If there is an ensemble with the tuned
    row, it is compared with the ensemble without it.

    The scored strategy is the rating head if there is one, otherwise the first strategy of the recipe. The base model
    has no head and uses the first strategy that it can answer. A row with an undefined metric is not compared.
    """
    if study.recipe.eval.planned is not None:
        yield from _configured_comparisons(study, rows, study.recipe.eval.planned)
        return
    for family, metric, family_rows in _rows_by_family(study, rows):
        tuned = _representative_row(study, family, family_rows)
        if tuned is None:
            continue
        untuned = [row for row in family_rows if row.figures.arm == "zero-shot" and _has_same_setup(study, tuned, row)]
        for row in untuned[:1]:
            yield ModelComparison(family, metric, tuned, row)
        for rival in _models_to_beat(family_rows, metric):
            yield ModelComparison(family, metric, tuned, rival)
        yield from _ensemble_comparisons(family, metric, family_rows)


def _models_to_beat(family_rows: Sequence[ResultRow], metric: str) -> list[ResultRow]:
    """Return the models that a tuned model must beat: the best baseline, and the ensemble of all baselines.

    The best one is selected on the same requests as the test, which favours the control: the test is conservative for
    a claim that the model is better, but not for a claim that it is worse.
    """
    controls = [row for row in family_rows if row.figures.arm == "baseline"]
    best = best_row([row for row in controls if row.figures.fusion is None], metric)
    return [*([] if best is None else [best]), *(row for row in controls if row.figures.fusion is not None)]


def _ensemble_comparisons(family: str, metric: str, family_rows: Sequence[ResultRow]) -> Iterator[ModelComparison]:
    """Yield the comparison between the ensembles with and without the tuned model."""
    joined = [row for row in family_rows if row.figures.fusion is not None]
    for row in joined:
        if row.figures.arm == "tuned":
            yield from (
                ModelComparison(family, metric, row, entry) for entry in joined if entry.figures.arm == "baseline"
            )
            return


def exploratory_comparisons(
    study: Study, rows: Sequence[ResultRow], choice: Choice | None = None
) -> Iterator[ModelComparison]:
    """Yield the exploratory comparisons; some of them may also be planned.

    Every tuned and few-shot row is compared with its zero-shot row; a rating head with the zero-shot rows of all
    strategies, since the base model has no head. Tuned rows of a head, or otherwise of the recipe's first strategy, are
    compared with every baseline, and all other language-model rows with the best baseline. Without a language model,
    each ensemble is compared with the best single baseline, and a served single baseline with the best other row.
    """
    for family, metric, family_rows in _rows_by_family(study, rows):
        controls = [row for row in family_rows if row.figures.arm == "baseline"]
        best = best_row(controls, metric)
        if len(controls) == len(family_rows):
            single = best_row([row for row in controls if row.figures.fusion is None], metric)
            joined = [row for row in controls if row.figures.fusion is not None]
            yield from (ModelComparison(family, metric, row, single) for row in joined if single is not None)
            served = next((row for row in controls if choice is not None and row.figures.id == choice.row), None)
            if served is not None and served.figures.fusion is None:
                facing = best_row([row for row in controls if row.figures.differs(served.figures)], metric)
                # The ensemble and the best single model are already compared.
                if facing is not None and not (facing in joined and served is single):
                    yield ModelComparison(family, metric, served, facing)
        for row in family_rows:
            if row.figures.arm in ("tuned", "few-shot"):
                untuned = [other for other in family_rows if other.figures.arm == "zero-shot"]
                zero = [other for other in untuned if _has_same_setup(study, row, other)]
                yield from (ModelComparison(family, metric, row, other) for other in zero)
            if row.figures.arm == "tuned" and row.figures.predictor in ("head", study.section(family).strategies[0]):
                yield from (ModelComparison(family, metric, row, control) for control in controls)
            elif row.figures.arm != "baseline" and best is not None:
                yield ModelComparison(family, metric, row, best)


def check_planned_models(study: Study) -> None:
    """Reject planned comparisons of models that the recipe does not evaluate, before training."""
    arms: tuple[Arm, ...] = ("baseline", *study.recipe.eval.arms)
    known = [spec.id for arm in arms for spec in specs_for_arm(study, arm)]
    known += [f"{family}/{BEST_BASELINE}" for family in study.tasks]
    for a, b in study.recipe.eval.planned or ():
        for name in (a, b):
            if name not in known:
                raise RecipeError(
                    f"eval.planned: there is no model {name!r}{did_you_mean(name, known)}; the models are "
                    f"{', '.join(known)}",
                    kind="unknown-name",
                    column="eval.planned",
                )
        if _family_of_id(a) != _family_of_id(b):
            what = f"eval.planned: {a!r} and {b!r} are models of different tasks; compare models of the same task"
            raise RecipeError(what, kind="contradiction", column="eval.planned")


def best_row(rows: Sequence[ResultRow], metric: str) -> ResultRow | None:
    """Return the model with the best value of a metric; None if it is undefined for all models."""
    scored = [row for row in rows if row.figures.metrics[metric].value is not None]
    sign = 1 if is_lower_better(metric) else -1
    return min(scored, key=lambda row: sign * (row.figures.metrics[metric].value or 0.0), default=None)


# --------------------------------------------------------------------------- parts


def _configured_comparisons(
    study: Study, rows: Sequence[ResultRow], pairs: Sequence[tuple[str, str]]
) -> Iterator[ModelComparison]:
    tables = {family: (metric, family_rows) for family, metric, family_rows in _rows_by_family(study, rows)}
    for a, b in pairs:
        metric, family_rows = tables[_family_of_id(a)]
        one, other = (_find_row(name, family_rows, metric) for name in (a, b))
        if one is not None and other is not None and one is not other:
            yield ModelComparison(_family_of_id(a), metric, one, other)


def _find_row(name: str, family_rows: Sequence[ResultRow], metric: str) -> ResultRow | None:
    """Return the results of a model by its id or as the best baseline; None if there are none."""
    if name.partition("/")[2] == BEST_BASELINE:
        return best_row([row for row in family_rows if row.figures.arm == "baseline"], metric)
    return next((row for row in family_rows if row.figures.id == name), None)


def _family_of_id(name: str) -> str:
    return name.partition("/")[0]


def _rows_by_family(study: Study, rows: Sequence[ResultRow]) -> Iterator[tuple[str, str, list[ResultRow]]]:
    """Yield each task with its main metric and the models for which this metric is defined."""
    for family in study.tasks:
        metric = family_of(family).headline_at(study.recipe.eval.cutoffs)
        family_rows = [row for row in rows if row.figures.task == family and metric in row.values]
        yield family, metric, [row for row in family_rows if row.figures.metrics[metric].value is not None]


def _representative_row(study: Study, family: str, family_rows: Sequence[ResultRow]) -> ResultRow | None:
    """Return the tuned model that represents a task in comparisons."""
    templates = [template.id for template in study.templates_for(family, "tuned")]
    strategies = ("head", study.section(family).strategies[0])
    tuned = [row for row in family_rows if row.figures.arm == "tuned" and row.figures.predictor in strategies]
    order: Mapping[str, int] = {name: index for index, name in enumerate(templates)}
    return min(
        tuned,
        key=lambda row: (strategies.index(row.figures.predictor), order.get(row.figures.template or "", len(order))),
        default=None,
    )


def _has_same_setup(study: Study, row: ResultRow, zero: ResultRow) -> bool:
    """Whether two models use the same template and strategy.

    If the untuned settings have custom templates, only the first of them matches.
    """
    same = row.figures.template == zero.figures.template
    family = row.figures.task
    if row.figures.arm == "tuned" and study.section(family).untuned_templates:
        same = zero.figures.template == study.templates_for(family, "zero-shot")[0].id
    return same and row.figures.predictor in ("head", zero.figures.predictor)


def _model_values(row: ResultRow, metric: str) -> ModelValues:
    return ModelValues(row.figures.id, row.figures.metrics[metric].value, np.asarray(row.values[metric]))
