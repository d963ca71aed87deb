"""Makes each family's part of the loss what the recipe says, whatever the lengths of its rows.

Shares are shares of tokens when rows are drawn. The loss of a step is a mean over its targets, and a row of a list has
many of them where a question with one answer has few: in a step that holds both, the list would have nearly all of it.
So the targets of a family are weighted, with one number for the whole training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmrec.backends.encode import Row
from llmrec.train.batches import Step

_ROUNDS = 200
# A family that has a step to itself there cannot have less of it, however little its targets count.
_WIDEST = 1e4


@dataclass(frozen=True)
class Weighted:
    """Steps whose rows are weighted, and what part of the loss each family has in them: the mean over steps."""

    steps: list[Step]
    shares: Mapping[str, float]


def weighted(steps: Sequence[Step], family_of: Callable[[Row], str], shares: Mapping[str, float]) -> Weighted:
    """Weight rows so that families have their shares of the loss, as far as they stand in the same steps.

    The weights are found by iterative proportional fitting over the steps' counts of targets.

    Args:
        steps: Planned steps.
        family_of: The family of each of their rows.
        shares: What each family is to have, relative to the others.
    """
    families = sorted({family_of(row) for step in steps for row in step.rows})
    counts = np.zeros((len(steps), len(families)))
    for n, step in enumerate(steps):
        for row in step.rows:
            counts[n, families.index(family_of(row))] += row.targets
    goal = np.array([shares[family] for family in families])
    weights = _fitted(counts, goal / goal.sum()) if len(families) > 1 else np.ones(len(families))
    found = dict(zip(families, _parts(counts, weights).tolist(), strict=True))
    if len(families) < 2:
        return Weighted(list(steps), found)
    of = dict(zip(families, weights.tolist(), strict=True))

    def heavy(row: Row) -> Row:
        return replace(row, weight=of[family_of(row)])

    return Weighted([_reweighted(step, heavy) for step in steps], found)


def _reweighted(step: Step, heavy: Callable[[Row], Row]) -> Step:
    if not step.bins:
        return Step(tuple(heavy(row) for row in step.rows))
    bins = tuple(replace(each, rows=tuple(heavy(row) for row in each.rows)) for each in step.bins)
    return Step(tuple(row for each in bins for row in each.rows), bins)


def _parts(counts: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each family's part of the loss, the mean over steps; shape (families,)."""
    mass = counts * weights
    parts: NDArray[np.float64] = (mass / mass.sum(axis=1, keepdims=True)).mean(axis=0)
    return parts


def _fitted(counts: NDArray[np.float64], goal: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.ones(len(goal))
    for _ in range(_ROUNDS):
        parts = _parts(counts, weights)
        if np.abs(parts - goal).max() < 1e-6:
            break
        weights = weights * goal / parts
        weights = np.clip(weights / np.exp(np.log(weights).mean()), 1 / _WIDEST, _WIDEST)
    # The mean target counts 1, so that one family alone would be what it was.
    return np.asarray(weights * counts.sum() / (counts @ weights).sum())
