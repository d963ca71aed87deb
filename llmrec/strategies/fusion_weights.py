"""The weights of a fusion: how scores of several parts are joined, and how the weights are fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.optimize import minimize

from llmrec.data.hashing import hash64
from llmrec.errors import LlmrecError
from llmrec.metrics.ranking import ndcg
from llmrec.metrics.stats import StatisticName, paired
from llmrec.types import Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kind = Literal["counts", "logits", "beams"]
"""What scores are: at least 0 and read as shares; on a scale of logarithms; or probabilities of found items only."""

Form = Literal["logit", "pool", "ridge", "alone"]

Fit = Callable[["NDArray[np.int64]"], "Weights"]
"""Fits a form to some of the cases."""

FOLDS, CUT = 5, 10

# What a share cannot be below, before its logarithm is taken.
_FLOOR = 1e-6
# Ridge penalty of the standardised weights of a logit, for the whole sample.
_PENALTY = 1.0
# Of the limits of what a part is worth.
_RESAMPLES = 1000
# Takes an item below all others.
_NEVER = -1e9
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


class Weighed:
    """What is made of parts: its weights once they are fitted, and the forms that were tried.

    Attributes:
        name: Of its row.
        weights: None before ``fit``.
        tried: Forms with their cross-fitted figures.
        without: What each part is worth, where ``fit`` was asked to dissect and the best form has several parts.
    """

    def __init__(self, name: str) -> None:
        """Set up, under the name of its row."""
        self.name = name
        self.weights: Weights | None = None
        self.tried: tuple[Tried, ...] = ()
        self.without: tuple[Without, ...] = ()

    @property
    def fitted(self) -> Weights:
        """What ``fit`` found.

        Raises:
            RuntimeError: If it was not called.
        """
        if self.weights is None:
            raise RuntimeError(f"{self.name!r} was asked before fit() was called")
        return self.weights

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parts."""
        raise NotImplementedError

    def _refuse(self, parts: Sequence[tuple[str, object]], cases: Sequence[Case]) -> None:
        """Refuse to weigh parts by users who chose something of them.

        Raises:
            LlmrecError: If a part has looked at one of the users, as it says itself.
        """
        users = {case.request.user_id for case in cases}
        for name, part in parts:
            if seen := users & getattr(part, "looked_at", frozenset()):
                raise LlmrecError(
                    f"{self.name}: {len(seen)} of {len(users)} users that are to weigh {name} have chosen its "
                    "parameters or its epoch, so that it would seem better than it is; hold some back "
                    "(llmrec.data.split.halves)",
                    kind="leak",
                )

    def _choose(self, known: Known, users: Sequence[str], *, dissect: bool) -> None:
        """Keep the form of a ranking with the best cross-fitted NDCG@10, fitted to all cases."""
        folds, fits = folds_of(self.name, users), forms(known, self.names)
        values = {form: known.crossed(fit, folds) for form, fit in fits.items()}
        self.tried = tuple(Tried(form, part, float(found.mean())) for (form, part), found in values.items())
        best = max(self.tried, key=lambda each: each.value)
        self.weights = fits[best.form, best.name](np.arange(len(users)))
        if best.form == "logit":
            low, high = known.limits(self.weights, users)
            self.weights = Weights("logit", self.weights.parts, self.weights.repeat, low, high)
        if dissect and best.form != "alone":
            self.without = tuple(
                left_out(name, values[best.form, best.name], known.without(place).crossed_as(best.form, folds), users)
                for place, name in enumerate(self.names)
            )


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


@dataclass
class Known:
    """Validation cases with what the parts say of them.

    Attributes:
        raw: Scores of each part, shape (n, items), in single precision.
        kinds: How they are read.
        had: Whether an item is in the history, shape (n, items).
        truth: Column of the target, shape (n,).
        out: What cannot be ranked, shape (n, items), never the target; None: all can be.
        repeats: Items of the history can be ranked, so that what one is worth is fitted.
    """

    raw: list[NDArray[np.float32]]
    kinds: list[Kind]
    had: NDArray[np.bool_]
    truth: NDArray[np.int64]
    out: NDArray[np.bool_] | None
    repeats: bool
    _features: list[NDArray[np.float32]] = field(default_factory=list)

    def features(self) -> list[NDArray[np.float32]]:
        """Return the parts on a scale of logarithms, and whether an item is in the history where that can be."""
        if not self._features:
            self._features = [feature(raw, kind, self.out) for raw, kind in zip(self.raw, self.kinds, strict=True)]
            if self.repeats:
                self._features.append(self.had.astype(np.float32))
        return self._features

    # ----------------------------------------------------------------------- forms

    def without(self, place: int) -> Known:
        """Return the same cases with one part left out."""
        features = [each for other, each in enumerate(self.features()) if other != place]
        raw, kinds = ([each for n, each in enumerate(of) if n != place] for of in (self.raw, self.kinds))
        return Known(raw, kinds, self.had, self.truth, self.out, self.repeats, features)  # type: ignore[arg-type]

    def logit(self, rows: NDArray[np.int64]) -> Weights:
        """Return the weights of the conditional logit by maximum likelihood, with a small ridge penalty."""
        features = self.features()
        scales = np.array([max(float(each[rows].std()), 1e-6) for each in features])

        def loss(scaled: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            value, gradient, _ = self._likelihood(scaled / scales, rows)
            return value + _PENALTY * float(scaled @ scaled), gradient / scales + 2 * _PENALTY * scaled

        start = np.full(len(features), 1.0 / len(self.raw))
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 100}).x / scales
        parts = tuple(float(weight) for weight in found[: len(self.raw)])
        return Weights("logit", parts, float(found[-1]) if self.repeats else 0.0)

    def _likelihood(
        self, weights: NDArray[np.float64], rows: NDArray[np.int64], *, curvature: bool = False
    ) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Return the negative log-likelihood with its gradient, and the gradients by case or the curvature.

        Returns:
            The value; the gradient, shape (k,); with ``curvature`` its matrix below the gradients of the cases, shape
            (n + k, k), else an empty array.
        """
        features = self.features()
        count = len(features)
        value, gradient = 0.0, np.zeros(count)
        each, matrix = [], np.zeros((count, count))
        block = max(1, CELLS // self.had.shape[1])
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            parts = [feature[part] for feature in features]
            total = np.zeros(parts[0].shape, dtype=np.float32)
            for weight, values in zip(weights, parts, strict=True):
                total += np.float32(weight) * values
            if self.out is not None:
                total[self.out[part]] = -np.inf
            total -= total.max(axis=1, keepdims=True)
            chances = np.exp(total)
            sums = chances.sum(axis=1, keepdims=True)
            chances /= sums
            here = np.arange(len(part)), self.truth[part]
            value += float((np.log(sums[:, 0]) - total[here]).sum())
            means = np.stack([np.einsum("ij,ij->i", chances, values) for values in parts], axis=1).astype(np.float64)
            wide = np.stack([values[here] for values in parts], axis=1).astype(np.float64)
            gradient += (means - wide).sum(axis=0)
            if curvature:
                each.append(means - wide)
                for one in range(count):
                    for other in range(one + 1):
                        both = np.einsum("ij,ij,ij->i", chances, parts[one], parts[other]).astype(np.float64)
                        matrix[one, other] += float((both - means[:, one] * means[:, other]).sum())
        if not curvature:
            return value, gradient, np.empty(0)
        matrix = matrix + np.tril(matrix, -1).T
        return value, gradient, np.concatenate([*each, matrix])

    def limits(self, weights: Weights, users: Sequence[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return 95 % limits of a logit's weights, robust and clustered over users (White, Econometrica 1982)."""
        values = np.array([*weights.parts, *([weights.repeat] if self.repeats else [])])
        _, _, both = self._likelihood(values, np.arange(len(self.truth)), curvature=True)
        scores, curvature = both[: -len(values)], both[-len(values) :]
        return limits_of(values, scores, curvature, users)

    def pool(self, rows: NDArray[np.int64]) -> Weights:
        """Return the weights of the linear pool by maximum likelihood, with what an item of the history is worth."""
        own, seen = self._shares(rows)

        def loss(free: NDArray[np.float64]) -> float:
            shares = _softmax(free[: own.shape[1]])
            mixed = own @ shares
            if self.repeats:
                worth = np.exp(free[-1])
                mixed = mixed * np.where(self.had[rows, self.truth[rows]], worth, 1.0)
                mixed = mixed / (1 + (worth - 1) * (seen @ shares))
            return float(-np.log(np.maximum(mixed, 1e-300)).sum())

        start = np.zeros(own.shape[1] + self.repeats)
        found = minimize(loss, start, method="L-BFGS-B", bounds=[(-12, 12)] * len(start)).x
        shares = _softmax(found[: own.shape[1]])
        return Weights("pool", tuple(float(each) for each in shares), float(found[-1]) if self.repeats else 0.0)

    def alone(self, place: int, rows: NDArray[np.int64]) -> float:
        """Return what is added to the scores of items of the history for a part alone: nothing, or all others first."""
        found = []
        for worth in (0.0, _NEVER):
            weights = Weights("alone", tuple(float(place == each) for each in range(len(self.raw))), worth)
            found.append((self.ndcg(weights, rows).mean(), worth))
        return max(found)[1]

    def _shares(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the probability of each target by each part, and of all items of the history, shape (n, parts)."""
        own, seen = [], []
        for raw, kind in zip(self.raw, self.kinds, strict=True):
            values = share(raw[rows], kind, None if self.out is None else self.out[rows])
            own.append(values[np.arange(len(rows)), self.truth[rows]])
            seen.append((values * self.had[rows]).sum(axis=1))
        return np.stack(own, axis=1), np.stack(seen, axis=1)

    def ndcg(self, weights: Weights, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return NDCG@10 of some cases under weights, ties in expectation, shape (n,)."""
        block = max(1, CELLS // self.had.shape[1])
        greater, tied = [], []
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            out = None if self.out is None else self.out[part]
            found = combined(weights, [each[part] for each in self.raw], self.kinds, self.had[part], out)
            if out is not None:
                found = np.where(out, -np.inf, found)
            own = found[np.arange(len(part)), self.truth[part]][:, None]
            greater.append((found > own).sum(axis=1))
            tied.append((found == own).sum(axis=1))
        return np.asarray(ndcg(np.concatenate(greater), np.concatenate(tied), CUT))

    def crossed(self, fit: Fit, folds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return NDCG@10 of each case under weights that were fitted to the other folds, shape (n,)."""
        found = np.zeros(len(self.truth))
        for fold in range(FOLDS):
            outside = np.flatnonzero(folds == fold)
            found[outside] = self.ndcg(fit(np.flatnonzero(folds != fold)), outside)
        return found

    def crossed_as(self, form: Form, folds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what `crossed` gives for a form of several parts."""
        return self.crossed(self.logit if form == "logit" else self.pool, folds)


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    found = np.exp(values - values.max())
    return np.asarray(found / found.sum())


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


def forms(known: Known, names: Sequence[str]) -> dict[tuple[Form, str], Fit]:
    """Return what fits each form to some of the cases, by form and name; a part alone has that of the part."""

    def alone(place: int, rows: NDArray[np.int64]) -> Weights:
        weights = tuple(float(place == each) for each in range(len(names)))
        return Weights("alone", weights, known.alone(place, rows) if known.repeats else 0.0)

    parts = {("alone", name): partial(alone, place) for place, name in enumerate(names)}
    return {("logit", "logit"): known.logit, ("pool", "pool"): known.pool, **parts}  # type: ignore[dict-item]
