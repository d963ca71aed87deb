"""Several tests of one family: Holm's correction, and intervals that say the same as the corrected p.

Holm's procedure (1979) tests the smallest of m p-values at alpha / m, the next one at alpha / (m - 1), and so on; at
the first that fails it stops, and rejects neither that one nor any later one. Each difference was thus tested at one
level last: its own step's if it was rejected, else that of the step at which the procedure stopped. Its interval is the
inversion of that very test. An interval of a fixed 95 % beside a corrected p may leave out 0 where p is above .05.
Alone each interval covers at least 1 - alpha; that all of them cover at once is not claimed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.metrics.stats import Sampled

ALPHA = 0.05
"""Largest corrected p at which a difference is called significant."""
# Draws beyond each end of the interval at the smallest level: fewer, and its ends are mostly noise.
_BEYOND = 20


@dataclass(frozen=True, slots=True)
class Decision:
    """What the tests of a family say of one difference.

    Attributes:
        value: The difference.
        low: Lower end of the interval at ``level``; 0 is outside exactly where ``p`` is at most alpha.
        high: Upper end.
        p: Corrected by Holm's method over the family.
        p_raw: Before correction.
        level: Coverage of the interval by itself.
    """

    value: float
    low: float
    high: float
    p: float
    p_raw: float
    level: float


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm, 1979), in the order given.

    The i-th smallest of m is multiplied by ``m - i + 1``, kept from falling below a smaller one's, and capped at 1.

    Raises:
        ValueError: If a p-value is outside [0, 1].
    """
    p, order = _ordered(p_values)
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def holm_levels(p_values: Sequence[float], alpha: float = ALPHA) -> list[float]:
    """Return the level at which Holm's procedure tested each difference last, in the order given.

    ``alpha / (m - i + 1)`` for the i-th smallest if it is rejected; for the others that of the step which failed. A
    p-value is at most its level exactly if the adjusted one is at most alpha.

    Raises:
        ValueError: If a p-value is outside [0, 1].
    """
    p, order = _ordered(p_values)
    left = np.arange(p.size, 0, -1)
    failed = np.flatnonzero(p[order] * left > alpha)
    last = failed[0] if len(failed) else p.size
    levels = np.empty_like(p)
    levels[order] = alpha / left[np.minimum(np.arange(p.size), last)]
    return [float(value) for value in levels]


def at_most(p_values: Sequence[float]) -> list[float]:
    """Return the largest p-values before correction that Holm's method could have adjusted to these.

    They are the very values wherever each step is above the one before and below 1. Equal ones do not tell which was
    which, and all of them have the bound of the last. Correcting bounds anew, in a larger family, errs on the side of
    no difference.

    Raises:
        ValueError: If a p-value is outside [0, 1].
    """
    p, order = _ordered(p_values)
    left = p.size - np.searchsorted(p[order], p, side="right") + 1
    return [float(value) for value in np.where(p < 1, p / left, 1.0)]


def enough(resamples: int, comparisons: int) -> int:
    """Return how many resamples a family needs: 20 of them lie beyond each end of its widest interval.

    Args:
        resamples: The number asked for, which is never lowered.
        comparisons: How many differences are corrected together.
    """
    return max(resamples, math.ceil(2 * _BEYOND * comparisons / ALPHA))


def decide(found: Sequence[Sampled], alpha: float = ALPHA, *, more: int = 0) -> list[Decision]:
    """Correct the p-values of a family, and give each difference the interval that agrees with its own.

    The interval is read off resamples, p may be counted exactly or on other draws, so that at the border the two can
    disagree. The p decides, and the end in question moves: to 0 where the difference is not significant, and where it
    is, to the resampled difference nearest to 0 on its side.

    Args:
        found: The differences; see `enough` for how many resamples they need.
        alpha: Largest corrected p that is called significant.
        more: Further differences of the family that are not known yet; they count as if each had p 1.
    """
    p_values = [*(each.p for each in found), *[1.0] * more]
    decisions = []
    for each, p, asked in zip(found, holm(p_values), holm_levels(p_values, alpha), strict=False):
        plain = each.at(1 - asked)
        low, high = _agreeing(plain.low, plain.high, each, differs=p <= alpha and each.value != 0)
        decisions.append(Decision(value=each.value, low=low, high=high, p=p, p_raw=each.p, level=1 - asked))
    return decisions


def _agreeing(low: float, high: float, found: Sampled, *, differs: bool) -> tuple[float, float]:
    """Return the ends, moved so that 0 is outside exactly if the difference is significant."""
    if not differs:
        return min(low, 0.0), max(high, 0.0)
    side = 1.0 if found.value > 0 else -1.0
    same = found.draws[found.draws * side > 0] * side
    nearest = side * float(same.min() if len(same) else abs(found.value))
    return (max(low, nearest), max(high, nearest)) if side > 0 else (min(low, nearest), min(high, nearest))


def _ordered(p_values: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must lie in [0, 1]: {list(p_values)}")
    return p, np.argsort(p, kind="stable")
