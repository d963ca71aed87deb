"""Makes each family's part of the loss its part of the tokens, whatever the number of its targets.

Shares are shares of tokens when rows are drawn. The loss of a step is a mean over its targets, and a row of a list has
many of them where a question with one answer has few: in a step that holds both, the list would have nearly all of it.
So a family's targets count as many times more as they stand apart: tokens over targets, one number for each family.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmrec.train.steps import Steps


@dataclass(frozen=True)
class Weighted:
    """Steps whose rows are weighted, and what part of the loss each family has in them: the mean over steps."""

    steps: Steps
    shares: Mapping[str, float]


def weighted(steps: Steps, families: Sequence[str]) -> Weighted:
    """Weight rows so that each family's part of a step's loss is its part of the step's tokens, on average.

    The mean target counts 1, and rows of a single family are left as they are.

    Args:
        steps: Planned steps.
        families: The family of every row that was drawn for them.
    """
    table, tokens, targets = steps.table, defaultdict[str, int](int), defaultdict[str, int](int)
    for numbers in steps.numbers():
        for n in numbers:
            tokens[families[n]] += table.tokens(n)
            targets[families[n]] += table.targets(n)
    if len(tokens) < 2:
        return Weighted(steps, dict.fromkeys(tokens, 1.0))
    every = sum(targets.values()) / sum(tokens.values())
    weights = {family: tokens[family] / targets[family] * every for family in tokens}
    parts = defaultdict[str, float](float)
    for numbers in steps.numbers():
        mass = defaultdict[str, float](float)
        for n in numbers:
            mass[families[n]] += weights[families[n]] * table.targets(n)
        for family, held in mass.items():
            parts[family] += held / sum(mass.values()) / len(steps)
    # Of a family that no step has, rows may have been drawn.
    return Weighted(steps.weighing([weights.get(family, 1.0) for family in families]), dict(parts))
