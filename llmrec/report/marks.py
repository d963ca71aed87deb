"""Marks of comparisons with baselines in result tables, and variation over prompt templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmrec.report.wording import arm_label, label, orient_comparison
from llmrec.results import Comparison, Results, Row, Verdict

VERDICT_SIGNS: dict[Verdict, str] = {"shown": "✓", "not shown": "○", "contradicted": "✗"}
"""Signs shown next to the verdict in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """The marks for the two comparisons of a model in a table.

    Attributes:
        zero_shot: ``row - zero-shot`` with the same strategy and template.
        baseline: ``row - best baseline``.
    """

    zero_shot: Comparison | None
    baseline: Comparison | None


def best_baseline(results: Results, task: str) -> Row | None:
    """Return the baseline with the best value of the main metric."""
    metric = results.headline[task]
    rows = (row for row in results.standings(task) if row.arm == "baseline" and metric in row.metrics)
    return next((row for row in rows if row.metrics[metric].value is not None), None)


def comparison_marks(results: Results, task: str) -> dict[str, Mark]:
    """Return the comparison marks of a task's language models."""
    control = best_baseline(results, task)
    rows = [row for row in results.rows if row.task == task]
    zero = {(row.predictor, row.template): row.id for row in rows if row.arm == "zero-shot"}
    result: dict[tuple[str, str], Comparison] = {}
    for entry in results.comparisons:
        if entry.task == task and entry.metric == results.headline[task] and entry.verdict is not None:
            result[entry.a, entry.b] = entry
            result[entry.b, entry.a] = orient_comparison(entry, entry.b)
    return {
        row.id: Mark(
            zero_shot=result.get((row.id, zero.get((row.predictor, row.template), ""))),
            baseline=result.get((row.id, control.id)) if control else None,
        )
        for row in rows
        if row.arm != "baseline"
    }


def has_marks(results: Results, task: str) -> bool:
    """Whether any model of a task has a comparison mark."""
    return any(mark.zero_shot or mark.baseline for mark in comparison_marks(results, task).values())


def marks_legend(results: Results, task: str) -> str:
    """Return a sentence that explains the marks of a table; empty if it has none."""
    if not has_marks(results, task):
        return ""
    control = best_baseline(results, task)
    against = f" and with the best baseline, {label(control)}" if control else ""
    return (
        f"Marks compare the {results.headline[task]} of a language model with zero-shot (same scoring method and "
        f"template){against}. Only planned comparisons have marks."
    )


def planned_comparisons(results: Results) -> list[Comparison]:
    """Return the planned comparisons, which have a verdict."""
    return [entry for entry in results.comparisons if entry.verdict is not None]


def exploratory_comparisons(results: Results) -> list[Comparison]:
    """Return the exploratory comparisons, which have no verdict."""
    return [entry for entry in results.comparisons if entry.verdict is None]


def significance_rule(results: Results) -> str:
    """Return a sentence on when a difference is called significant; empty without planned comparisons."""
    result = planned_comparisons(results)
    if not result:
        return ""
    pairs = "the only planned comparison" if len(result) == 1 else f"all {len(result)} planned comparisons"
    return (
        f"Significantly better or worse: the p-value, Holm-corrected over {pairs}, is at most .05. No significant "
        "difference does not mean that both are equal. Intervals are corrected too: they exclude 0 exactly if p is "
        "at most .05."
    )


SINGLE_TEMPLATE = "single template"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateRange:
    """Mean and range of the main metric over templates."""

    templates: tuple[str, ...]
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateSpread:
    """Results of a strategy over the templates used in training, and over other templates."""

    arm: str
    predictor: str
    seen: TemplateRange | None
    unseen: TemplateRange | None

    @property
    def single(self) -> bool:
        """Whether the results come from a single template."""
        return sum(len(over.templates) for over in (self.seen, self.unseen) if over) == 1

    @property
    def label(self) -> str:
        """Label of the model without its template."""
        return arm_label(self.arm, self.predictor)


def template_spreads(results: Results, task: str) -> tuple[TemplateSpread, ...]:
    """Return how the results of a task vary over prompt templates, for each strategy."""
    metric = results.headline[task]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        if row.task == task and row.template and metric in row.metrics and row.metrics[metric].value is not None:
            groups.setdefault((row.arm, row.predictor), []).append(row)
    return tuple(
        TemplateSpread(
            arm=arm,
            predictor=predictor,
            seen=_template_range([row for row in rows if row.template_use != "unseen"], metric),
            unseen=_template_range([row for row in rows if row.template_use == "unseen"], metric),
        )
        for (arm, predictor), rows in groups.items()
    )


def single_template_ids(results: Results, task: str) -> frozenset[str]:
    """Return the ids of models that were evaluated with only one template."""
    alone = {(spread.arm, spread.predictor) for spread in template_spreads(results, task) if spread.single}
    return frozenset(
        row.id for row in results.rows if row.task == task and row.template and (row.arm, row.predictor) in alone
    )


def _template_range(rows: Sequence[Row], metric: str) -> TemplateRange | None:
    values = [value for row in rows if (value := row.metrics[metric].value) is not None]
    if not values:
        return None
    names = tuple((row.template or "").rpartition("/")[2] for row in rows)
    return TemplateRange(templates=names, mean=sum(values) / len(values), low=min(values), high=max(values))
