"""Makes each family's part of the loss its part of the tokens, whatever the number of its targets.

Shares are shares of tokens when rows are drawn. The loss of a step is a mean over its targets, and a row of a list has
many of them where a question with one answer has few: in a step that holds both, the list would have nearly all of it.
So a family's targets count as many times more as they stand apart: tokens over targets, one number for each family.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from llmrec.backends.encode import Row
from llmrec.train.batches import Step


@dataclass(frozen=True)
class Weighted:
    """Steps whose rows are weighted, and what part of the loss each family has in them: the mean over steps."""

    steps: list[Step]
    shares: Mapping[str, float]


def weighted(steps: Sequence[Step], family_of: Callable[[Row], str]) -> Weighted:
    """Weight rows so that each family's part of a step's loss is its part of the step's tokens, on average.

    The mean target counts 1, and rows of a single family are left as they are.

    Args:
        steps: Planned steps.
        family_of: The family of each of their rows.
    """
    tokens, targets = defaultdict[str, int](int), defaultdict[str, int](int)
    for step in steps:
        for row in step.rows:
            tokens[family_of(row)] += len(row.ids)
            targets[family_of(row)] += row.targets
    if len(tokens) < 2:
        return Weighted(list(steps), dict.fromkeys(tokens, 1.0))
    every = sum(targets.values()) / sum(tokens.values())
    weights = {family: tokens[family] / targets[family] * every for family in tokens}
    parts = defaultdict[str, float](float)
    for step in steps:
        mass = defaultdict[str, float](float)
        for row in step.rows:
            mass[family_of(row)] += weights[family_of(row)] * row.targets
        for family, held in mass.items():
            parts[family] += held / sum(mass.values()) / len(steps)

    def heavy(row: Row) -> Row:
        return replace(row, weight=weights[family_of(row)])

    return Weighted([_reweighted(step, heavy) for step in steps], dict(parts))


def _reweighted(step: Step, heavy: Callable[[Row], Row]) -> Step:
    if not step.bins:
        return Step(tuple(heavy(row) for row in step.rows))
    bins = tuple(replace(each, rows=tuple(heavy(row) for row in each.rows)) for each in step.bins)
    return Step(tuple(row for each in bins for row in each.rows), bins)
