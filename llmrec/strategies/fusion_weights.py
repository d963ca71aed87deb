"""The weights of a fusion: how scores of several parts are joined, and how the weights are fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.data.hashing import hash64
from llmrec.errors import LlmrecError
from llmrec.metrics.stats import StatisticName, paired

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kind = Literal["counts", "logits", "beams"]
"""What scores are: at least 0 and read as shares; on a scale of logarithms; or probabilities of found items only."""

Form = Literal["logit", "pool", "ridge", "alone"]

Fit = Callable[["NDArray[np.int64]", "Weights | None"], "Weights"]
"""Fits a form to some of the cases, from weights near which the answer may lie."""

FOLDS, CUT = 5, 10

# What a share cannot be below, before its logarithm is taken.
_FLOOR = 1e-6
# Of the limits of what a part adds.
_RESAMPLES = 1000
CELLS = 1 << 24
"""Cells of a block of scores: 64 MB in single precision."""


@dataclass(frozen=True)
class Weights:
    """What was fitted.

    Attributes:
        form: ``alone`` is the first part with a weight.
        parts: One weight a part; exponents of a logit, shares of a pool.
        repeat: Logarithm of what an item of the history is worth beside another; 0 where none can be ranked.
        low: 95 % limits of the weights over users, those of ``repeat`` last; empty where there are none.
        high: As ``low``.
    """

    form: Form
    parts: tuple[float, ...]
    repeat: float = 0.0
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Tried:
    """A form with its figure on users that its weights do not know, higher is better."""

    form: Form
    name: str
    value: float


@dataclass(frozen=True)
class Without:
    """What the cross-fitted figure loses when a part is left out and the others are weighed anew.

    Attributes:
        name: Of the part.
        loss: Above 0 for a part that is of use: how far NDCG@10 falls without it, or RMSE or log-loss rises.
        low: 95 % limit over users.
        high: As ``low``.
    """

    name: str
    loss: float
    low: float
    high: float


def folds_of(name: str, users: Sequence[str]) -> NDArray[np.int64]:
    """Return the fold of each case; all cases of a user have one.

    Raises:
        LlmrecError: If there are too few users to fit weights on all but a fifth of them.
    """
    if len(set(users)) < 2 * FOLDS:
        raise LlmrecError(
            f"{name}: weights need validation cases of at least {2 * FOLDS} users, and there are {len(set(users))}; "
            "reserve more users for them",
            kind="too-few",
        )
    return (hash64("fusion folds", 0, users) % np.uint64(FOLDS)).astype(np.int64)


def limits_of(
    values: NDArray[np.float64], scores: NDArray[np.float64], curvature: NDArray[np.float64], users: Sequence[str]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return 95 % limits of fitted values, robust and clustered over users (White, Econometrica 1982).

    Args:
        values: Where the likelihood is highest, shape (k,).
        scores: Gradient of each case there, shape (n, k).
        curvature: Of all cases, shape (k, k).
        users: Whose case each is.
    """
    _, cluster = np.unique(np.array(users), return_inverse=True)
    sums = np.zeros((cluster.max() + 1, len(values)))
    np.add.at(sums, cluster, scores)
    inverse = np.linalg.pinv(curvature)
    errors = 1.96 * np.sqrt(np.maximum(np.diag(inverse @ (sums.T @ sums) @ inverse), 0.0))
    return tuple((values - errors).tolist()), tuple((values + errors).tolist())


def combined(
    weights: Weights,
    raw: Sequence[NDArray[Any]],
    kinds: Sequence[Kind],
    had: NDArray[np.bool_],
    out: NDArray[np.bool_] | None,
) -> NDArray[np.floating[Any]]:
    """Return what a fusion says of items, higher is better, shape (n, m).

    Args:
        weights: As fitted.
        raw: Scores of each part, shape (n, m).
        kinds: How they are read.
        had: Whether an item is in the history, shape (n, m).
        out: What is left out of what parts are normalised over, shape (n, m); None: nothing.
    """
    total: NDArray[np.floating[Any]] = np.zeros(had.shape, dtype=np.float32 if weights.form == "logit" else np.float64)
    for weight, scores, kind in zip(weights.parts, raw, kinds, strict=True):
        if not weight:
            continue
        if weights.form == "alone":
            total = np.asarray(scores, dtype=np.float64)
            break
        total = total + weight * (feature(scores, kind, out) if weights.form == "logit" else share(scores, kind, out))
    if weights.form == "pool":
        total = np.log(np.maximum(total, 1e-300))
    return total + weights.repeat * had if weights.repeat else total


def feature(scores: NDArray[Any], kind: Kind, out: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """Return scores on a scale of logarithms, shape (n, m): log-shares of counts, logits less their maximum.

    A search's items beyond its beams get the probability of its last beam.
    """
    values = np.array(scores, dtype=np.float32)
    if kind == "logits":
        values -= values.max(axis=1, keepdims=True)
        return values
    np.maximum(values, 0, out=values)
    if kind == "beams":
        least = np.min(values, axis=1, keepdims=True, where=values > 0, initial=1.0)
        np.log(np.maximum(values, np.maximum(least, 1e-30)), out=values)
        return values
    if out is not None:
        values[out] = 0
    totals = values.sum(axis=1, keepdims=True)
    np.divide(values, totals, out=values, where=totals > 0)
    np.log(values + np.float32(_FLOOR), out=values)
    return values


def share(scores: NDArray[Any], kind: Kind, out: NDArray[np.bool_] | None) -> NDArray[np.float64]:
    """Return scores as probabilities over the items asked about, shape (n, m); rows without any are uniform."""
    values = np.array(scores, dtype=np.float64)
    if kind == "logits":
        if out is not None:
            values[out] = -np.inf
        values -= values.max(axis=1, keepdims=True)
        values = np.exp(values)
    elif kind == "beams":
        values = np.maximum(values, np.min(values, axis=1, keepdims=True, where=values > 0, initial=1.0))
    else:
        values = np.maximum(values, 0)
    if out is not None:
        values[out] = 0
    totals = values.sum(axis=1, keepdims=True)
    found = np.full_like(values, 1 / values.shape[1])
    np.divide(values, totals, out=found, where=totals > 0)
    return found


def left_out(
    name: str,
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    users: Sequence[str],
    statistic: StatisticName = "mean",
) -> Without:
    """Return what is lost without a part, the first figure less the second, from the values of each case."""
    found = paired(first, second, resamples=_RESAMPLES, seed=0, users=users, statistic=statistic)
    return Without(name, found.value, found.low, found.high)
