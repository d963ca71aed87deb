"""The question that a report answers first: is the model better than the best control, by how much, how surely.

The model is the best language-model row of a family, or without one the fusion of classic recommenders; the control is
the best row that it is set against, or the best part of that fusion. Differences are model - control everywhere, as in
the table of comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmrec.report.escape import flat
from llmrec.report.wording import compared, count, label, number, outcome, stated, with_figures
from llmrec.results import Comparison, Results, Row, Verdict, lower


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The model of one family beside its control.

    Attributes:
        task: The family.
        metric: Its headline metric.
        model: The best row of a language model, or where the run has none a fusion; None where there is neither.
        control: The best baseline; of a fusion without a language model the best single one.
        difference: ``model - control``, if it was computed.
        names: Of model and control; parameters of a method only where rows differ in nothing else.
    """

    task: str
    metric: str
    model: Row | None
    control: Row | None
    difference: Comparison | None
    names: tuple[str, str]

    @property
    def verdict(self) -> Verdict | None:
        """What a planned comparison found; None for one that was not planned, or not computed."""
        return self.difference.verdict if self.difference else None

    @property
    def relative_to(self) -> float | None:
        """The control's figure, if a difference can be stated as a share of it."""
        value = None if self.control is None else self.control.metrics[self.metric].value
        return value if value is not None and value > 0 else None


def headline(results: Results, task: str) -> Headline:
    """Find the model and the control of a family, and the comparison of the two."""
    metric = results.headline[task]
    rows = with_figures(results, task)
    asks = any(row.arm != "baseline" for row in results.rows if row.task == task)
    models = [row for row in rows if (row.arm != "baseline" if asks else row.fusion is not None)]
    controls = [row for row in rows if row.arm == "baseline" and (asks or row.fusion is None)]
    model, control = next(iter(models), None), next(iter(controls), None)
    difference, names = compared(results, model, control), (_name(model, rows), _name(control, rows))
    return Headline(task=task, metric=metric, model=model, control=control, difference=difference, names=names)


def _name(row: Row | None, rows: Sequence[Row]) -> str:
    if row is None:
        return ""
    several = sum((each.arm, each.method) == (row.arm, row.method) for each in rows) > 1
    return label(row) if several or row.arm != "baseline" else flat(row.method)


def sentence(found: Headline) -> str:
    """Say whether the model is better than the control, by how much and how surely, without the family's name."""
    if found.model is None or found.control is None:
        lacking = "language-model row or fusion" if found.model is None else "control"
        return f"There is no {lacking} with a figure for {found.metric}."
    model, control = found.names
    if found.difference is None:
        figures = [number(row.metrics[found.metric].value) for row in (found.model, found.control)]
        turned = " (lower is better)" if lower(found.metric) else ""
        reached = f"{model} has {found.metric} {figures[0]} and {control} {figures[1]}{turned}"
        return f"{reached}; the difference was not tested."
    users = found.model.users
    over = f", {count(users)} users" if users else ""
    said = {
        "shown": f"{model} is significantly better than {control}",
        "contradicted": f"{model} is significantly worse than {control}",
        "not shown": f"There is no significant difference between {model} and {control}",
        None: f"{model} less {control}, {outcome(None)}",
    }[found.difference.verdict]
    return f"{said}: {stated(found.difference)}{over}."


def gain(metric: str, value: float) -> float:
    """Return a difference so that above 0 is better, whichever way the metric goes."""
    return -value if lower(metric) else value
