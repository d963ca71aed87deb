"""The question that a report answers first: is the model better than the best baseline, by how much, how surely.

The model is the best row of a language model by itself; without one it is the row that is served, or else the best
ensemble of classic recommenders. The control is the best baseline; of an ensemble the best single recommender. An
ensemble that contains the language model is neither: what the model contributes to it is said apart
(`llmrec.report.summary.contribution`). Differences are model - control everywhere, as in the table of comparisons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llmrec.report.wording import alone, compared, count, in_words, number, short_names, stated, with_figures
from llmrec.results import Comparison, Results, Row, Verdict, lower


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The model of one family beside its control.

    Attributes:
        task: The family.
        metric: Its headline metric.
        model: The best row of a language model by itself; where the run has none the row that is served, or an
            ensemble; None where there is neither.
        control: The best baseline; of an ensemble without a language model the best single one, and of a single one
            that is served the best other row.
        difference: ``model - control``, if it was computed.
        names: Of model and control; parameters of a method only where rows differ in nothing else.
        served: The model is the one that is served where nobody says which: the best on validation users.
    """

    task: str
    metric: str
    model: Row | None
    control: Row | None
    difference: Comparison | None
    names: tuple[str, str]
    served: bool = False

    @property
    def verdict(self) -> Verdict | None:
        """What a planned comparison found; None for one that was not planned, or not computed."""
        return self.difference.verdict if self.difference else None

    @property
    def relative_to(self) -> float | None:
        """The control's figure, if a difference can be stated as a share of it."""
        value = None if self.control is None else self.control.metrics[self.metric].value
        return value if value is not None and value > 0 else None


def headline(results: Results, task: str, model: Row | None = None) -> Headline:
    """Find the model and the control of a family, and the comparison of the two.

    Args:
        results: Of a run.
        task: The family.
        model: The row that is asked about, where it is not the one that `Headline` says.
    """
    metric = results.headline[task]
    rows = with_figures(results, task)
    asks = any(row.arm != "baseline" for row in results.rows if row.task == task)
    served = served_row(results, task)
    if model is None and not asks:
        model = served
    if model is None:
        model = next((row for row in rows if (alone(row) if asks else row.fusion is not None)), None)
    plain = model is not None and (model.arm != "baseline" or (model is served and model.fusion is None))
    single = plain or (model is None and asks)
    controls = [row for row in rows if row.arm == "baseline" and (single or row.fusion is None)]
    control = next((row for row in controls if model is None or row.differs(model)), None)
    short = short_names(rows)
    names = tuple("" if row is None else short[row.id] for row in (model, control))
    return Headline(
        task=task,
        metric=metric,
        model=model,
        control=control,
        difference=compared(results, model, control),
        names=(names[0], names[1]),
        served=model is not None and model is served,
    )


def served_row(results: Results, task: str) -> Row | None:
    """Return the row of a task that is served where nobody says which; None where none of it was chosen."""
    choice = results.choice
    return next((row for row in results.rows if choice and (row.task, row.id) == (task, choice.row)), None)


def question(results: Results, found: Iterable[Headline]) -> str:
    """Return the question that a report answers first."""
    if any(row.arm != "baseline" for row in results.rows):
        return "Is the model better than the best baseline?"
    if any(each.served and each.model is not None and each.model.fusion is None for each in found):
        return "Is the recommender that is served better than the best other one?"
    return "Is the fusion better than the best single recommender?"


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
    return f"{in_words(found.difference, model, control)}: {stated(found.difference)}{over}."


def gain(metric: str, value: float) -> float:
    """Return a difference so that above 0 is better, whichever way the metric goes."""
    return -value if lower(metric) else value
