"""How far a result depends on the words of the prompt: the spread over templates, seen and unseen in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmrec.report.records import Results, Row
from llmrec.report.wording import arm_label

SINGLE = "single template"


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """The headline figures over some templates."""

    templates: tuple[str, ...]
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One arm and strategy over its templates; None where it has none of that kind."""

    arm: str
    predictor: str
    seen: Over | None
    unseen: Over | None

    @property
    def single(self) -> bool:
        """Whether the result stands on one template alone."""
        return sum(len(over.templates) for over in (self.seen, self.unseen) if over) == 1

    @property
    def label(self) -> str:
        """The row's name without its template."""
        return arm_label(self.arm, self.predictor)


def spreads(results: Results, task: str) -> tuple[Spread, ...]:
    """Return the spread of every arm and strategy of a task, in the order in which they were evaluated."""
    metric = results.headline[task]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        if row.task == task and row.template and metric in row.metrics and row.metrics[metric].value is not None:
            groups.setdefault((row.arm, row.predictor), []).append(row)
    return tuple(
        Spread(
            arm=arm,
            predictor=predictor,
            seen=_over([row for row in rows if row.template_use != "unseen"], metric),
            unseen=_over([row for row in rows if row.template_use == "unseen"], metric),
        )
        for (arm, predictor), rows in groups.items()
    )


def singles(results: Results, task: str) -> frozenset[str]:
    """Return the ids of rows that are the only template of their arm and strategy."""
    alone = {(spread.arm, spread.predictor) for spread in spreads(results, task) if spread.single}
    return frozenset(
        row.id for row in results.rows if row.task == task and row.template and (row.arm, row.predictor) in alone
    )


def _over(rows: Sequence[Row], metric: str) -> Over | None:
    values = [value for row in rows if (value := row.metrics[metric].value) is not None]
    if not values:
        return None
    names = tuple((row.template or "").rpartition("/")[2] for row in rows)
    return Over(templates=names, mean=sum(values) / len(values), low=min(values), high=max(values))
