"""Weights of an ensemble: how the scores of its members are combined, and how the weights are fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.data.hashing import hash64
from llmrec.errors import LlmrecError
from llmrec.metrics.ranking import ndcg
from llmrec.metrics.stats import StatisticName, paired

if TYPE_CHECKING:
    from numpy.typing import NDArray


Kind = Literal["counts", "logits", "beams"]
"""The kind of scores: nonnegative and read as shares; on a log scale; or probabilities of found items only."""

Form = Literal["logit", "pool", "ridge", "alone"]

Fit = Callable[["NDArray[np.int64]", "Weights | None"], "Weights"]
"""Fits a form to some of the cases, starting from weights that may be close to the solution."""

FOLDS, CUT = 5, 10

# The lower limit of a share before its logarithm is taken.
_FLOOR = 1e-6
# The bootstrap samples for the limits of a member's contribution.
_RESAMPLES = 1000
CELLS = 1 << 24
"""Cells of a block of scores: 64 MB in single precision."""


@dataclass(frozen=True)
class Weights:
    """The fitted weights of an ensemble.

    Attributes:
        form: The form; ``alone`` is the first member with a weight.
        parts: One weight per member; exponents of a logit, shares of a pool.
        repeat: Log weight of an item of the history relative to other items; 0 if none can be ranked.
        low: 95 % limits of the weights over users, those of ``repeat`` last; empty if there are none.
        high: The upper limits; see ``low``.
    """

    form: Form
    parts: tuple[float, ...]
    repeat: float = 0.0
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Tried:
    """A form with its result on users outside its fit, higher is better."""

    form: Form
    name: str
    value: float


@dataclass(frozen=True)
class Without:
    """The loss of the cross-fitted result when a member is left out and the weights are fitted again.

    Attributes:
        name: The name of the member.
        loss: The decrease of NDCG@10, or the increase of RMSE or log-loss, without it; above 0 for a useful member.
        low: Lower 95 % limit over users.
        high: The upper limits; see ``low``.
    """

    name: str
    loss: float
    low: float
    high: float


def folds_of(name: str, users: Sequence[str]) -> NDArray[np.int64]:
    """Return the fold of each case; all cases of a user have the same fold.

    Raises:
        LlmrecError: If there are too few users to fit weights on four fifths of them.
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
        values: The values of maximum likelihood, shape (k,).
        scores: Gradient of each case at these values, shape (n, k).
        curvature: Curvature over all cases, shape (k, k).
        users: The user of each case.
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
    """Return the ensemble's scores of items, higher is better, shape (n, m).

    Args:
        weights: The fitted weights.
        raw: Scores of each member, shape (n, m).
        kinds: The scale of each member's scores.
        had: Whether an item is in the history, shape (n, m).
        out: Items excluded from the normalisation of members, shape (n, m); None: no items.
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
    """Return scores on a log scale, shape (n, m): log-shares of counts, or logits minus their maximum.

    Items outside the beams of a search get the probability of its last beam.
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
    """Return scores as probabilities over the items, shape (n, m); rows without any score are uniform."""
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
    result = np.full_like(values, 1 / values.shape[1])
    np.divide(values, totals, out=result, where=totals > 0)
    return result


def left_out(
    name: str,
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    users: Sequence[str],
    statistic: StatisticName = "mean",
) -> Without:
    """Return what an ensemble loses without a member: ``first`` (with it) minus ``second`` (without it), by case."""
    result = paired(first, second, resamples=_RESAMPLES, seed=0, users=users, statistic=statistic)
    return Without(name, result.value, result.low, result.high)


# --------------------------------------------------------------------------- fitting

# Ridge penalty of the standardised weights of a logit, for the whole sample.
_PENALTY = 1.0
# Ranks an item below all others.
_NEVER = -1e9


@dataclass
class WeighedCases:
    """Validation cases with the members' scores.

    Attributes:
        raw: Scores of each member, shape (n, items), in single precision.
        kinds: The scale of each member's scores.
        had: Whether an item is in the history, shape (n, items).
        truth: Column of the target, shape (n,).
        out: Items that cannot be ranked, shape (n, items), never the target; None: all can be.
        repeats: Whether items of the history can be ranked, so that their weight is fitted.
    """

    raw: list[NDArray[np.float32]]
    kinds: list[Kind]
    had: NDArray[np.bool_]
    truth: NDArray[np.int64]
    out: NDArray[np.bool_] | None
    repeats: bool
    _features: NDArray[np.float32] | None = None
    _shares: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def features(self) -> NDArray[np.float32]:
        """Return the members' scores on a log scale, and if ``repeats`` whether an item is in the history.

        Returns:
            Shape (n, parts, items), so that the values of a case are contiguous.
        """
        if self._features is None:
            shape = len(self.truth), len(self.raw) + self.repeats, self.had.shape[1]
            self._features = np.empty(shape, dtype=np.float32)
            for index, (raw, kind) in enumerate(zip(self.raw, self.kinds, strict=True)):
                self._features[:, index] = feature(raw, kind, self.out)
            if self.repeats:
                self._features[:, -1] = self.had
        return self._features

    def first(self, count: int) -> WeighedCases:
        """Return the first cases as a view."""
        part = slice(count)
        out = None if self.out is None else self.out[part]
        shares = None if self._shares is None else (self._shares[0][part], self._shares[1][part])
        raw = [item[part] for item in self.raw]
        return WeighedCases(
            raw, self.kinds, self.had[part], self.truth[part], out, self.repeats, self.features()[part], shares
        )

    # ----------------------------------------------------------------------- forms

    def logit(self, rows: NDArray[np.int64], start: Weights | None = None, off: int | None = None) -> Weights:
        """Return the weights of the conditional logit by maximum likelihood, with a small ridge penalty.

        Args:
            rows: The cases to fit to.
            start: Initial weights, which save time and do not change the result.
            off: A member that is left out.
        """
        count, parts = self.features().shape[1], len(self.raw)
        scales = np.array([max(self._spread(place, rows), 1e-6) for place in range(count)])
        used = np.array([place != off for place in range(count)])

        def loss(scaled: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            weights = np.zeros(count)
            weights[used] = scaled / scales[used]
            value, gradient, _ = self._likelihood(weights, rows)
            return value + _PENALTY * float(scaled @ scaled), gradient[used] / scales[used] + 2 * _PENALTY * scaled

        begin = np.full(count, 1.0 / parts)
        if start is not None:
            begin = np.array([*start.parts, *([start.repeat] if self.repeats else [])]) * scales
        # The import takes a tenth of a second, and most commands fit nothing.
        from scipy.optimize import minimize

        fitted = minimize(loss, begin[used], jac=True, method="L-BFGS-B", options={"maxiter": 100, "ftol": 1e-8}).x
        result = np.zeros(count)
        result[used] = fitted / scales[used]
        weights = tuple(float(weight) for weight in result[:parts])
        return Weights("logit", weights, float(result[-1]) if self.repeats else 0.0)

    def _spread(self, place: int, rows: NDArray[np.int64]) -> float:
        """Return the standard deviation of a feature over the candidates of some cases."""
        values = self.features()[rows, place]
        result = values if self.out is None else values[~self.out[rows]]
        return float(result.std(dtype=np.float64))

    def _likelihood(
        self, weights: NDArray[np.float64], rows: NDArray[np.int64], *, curvature: bool = False
    ) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Return the negative log-likelihood with its gradient, and optionally gradients by case and curvature.

        Returns:
            The value; the gradient, shape (k,); with ``curvature`` its matrix below the gradients of the cases, shape
            (n + k, k), else an empty array.
        """
        features, single = self.features(), weights.astype(np.float32)
        count = len(weights)
        value, gradient = 0.0, np.zeros(count)
        item, matrix = [], np.zeros((count, count))
        block = max(1, CELLS // (features.shape[2] * count))
        inside = np.zeros(len(self.truth), dtype=bool)
        inside[rows] = True
        for begin in range(0, len(inside), block):
            # Slices avoid copies: other cases are computed and ignored, which is cheaper than gathering.
            part = slice(begin, begin + block)
            counted = inside[part]
            if not counted.any():
                continue
            total = np.matmul(single, features[part])
            if self.out is not None:
                total[self.out[part]] = -np.inf
            total -= total.max(axis=1, keepdims=True)
            own = total[np.arange(len(total)), self.truth[part]].astype(np.float64)
            chances = np.exp(total, out=total)
            sums = chances.sum(axis=1, keepdims=True)
            chances /= sums
            value += float((np.log(sums[:, 0]) - own)[counted].sum())
            means = np.matmul(features[part], chances[:, :, None])[:, :, 0].astype(np.float64)
            wide = means - features[part][np.arange(len(total)), :, self.truth[part]]
            gradient += wide[counted].sum(axis=0)
            if curvature:
                item.append(wide[counted])
                both = np.einsum("nkm,nm,nlm->kl", features[part][counted], chances[counted], features[part][counted])
                matrix += both - means[counted].T @ means[counted]
        if not curvature:
            return value, gradient, np.empty(0)
        return value, gradient, np.concatenate([*item, matrix])

    def limits(self, weights: Weights, users: Sequence[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return 95 % limits of a logit's weights, robust and clustered over users (White, Econometrica 1982)."""
        values = np.array([*weights.parts, *([weights.repeat] if self.repeats else [])])
        _, _, both = self._likelihood(values, np.arange(len(self.truth)), curvature=True)
        scores, curvature = both[: -len(values)], both[-len(values) :]
        return limits_of(values, scores, curvature, users)

    def pool(self, rows: NDArray[np.int64], start: Weights | None = None, off: int | None = None) -> Weights:
        """Return the weights of the linear pool by maximum likelihood, with the weight of history items.

        Args:
            rows: The cases to fit to.
            start: Unused, since a fit takes milliseconds.
            off: A member that is left out.
        """
        used = [place for place in range(len(self.raw)) if place != off]
        own, seen = (item[rows][:, used] for item in self.shares())

        def loss(free: NDArray[np.float64]) -> float:
            shares = _softmax(free[: own.shape[1]])
            mixed = own @ shares
            if self.repeats:
                worth = np.exp(free[-1])
                mixed = mixed * np.where(self.had[rows, self.truth[rows]], worth, 1.0)
                mixed = mixed / (1 + (worth - 1) * (seen @ shares))
            return float(-np.log(np.maximum(mixed, 1e-300)).sum())

        begin = np.zeros(own.shape[1] + self.repeats)
        from scipy.optimize import minimize

        result = minimize(loss, begin, method="L-BFGS-B", bounds=[(-12, 12)] * len(begin)).x
        shares = np.zeros(len(self.raw))
        shares[used] = _softmax(result[: own.shape[1]])
        return Weights("pool", tuple(float(item) for item in shares), float(result[-1]) if self.repeats else 0.0)

    def onto(
        self, base: Weights, free: Sequence[int], rows: NDArray[np.int64], start: Weights | None = None
    ) -> Weights:
        """Return an ensemble with further members: the weight of the ensemble as a whole, and of each further member.

        In a logit the ridge penalty shrinks them to 1 and 0; in a pool the ensemble is a member like the others. So a
        few cases suffice to add members to an ensemble that was fitted on many.

        Args:
            base: Weights of all members, 0 for the further ones.
            free: Indices of the further ones.
            rows: The cases to fit to.
            start: Unused, since there are few weights.
        """
        if base.form == "pool":
            return self._pooled_onto(base, free, rows)
        places = list(free)
        whole = np.array([*base.parts, *([base.repeat] if self.repeats else [])])
        inside = np.matmul(whole.astype(np.float32), self.features()[rows])
        ranked = inside if self.out is None else inside[~self.out[rows]]
        # If all items of the history come last, their scores are excluded from the spread.
        spread = float(ranked[ranked > _NEVER / 2].std(dtype=np.float64))
        scales = np.array([max(item, 1e-6) for item in (spread, *(self._spread(place, rows) for place in places))])
        begin = np.array([1.0, *(0.0 for _ in places)])

        def placed(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
            weights: NDArray[np.float64] = numbers[0] * whole
            weights[places] += numbers[1:]
            return weights

        def loss(numbers: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            value, gradient, _ = self._likelihood(placed(numbers), rows)
            away = scales * (numbers - begin)
            slope = np.array([gradient @ whole, *gradient[places]]) + 2 * _PENALTY * scales * away
            return value + _PENALTY * float(away @ away), slope

        bounds = [(0.0, None), *((None, None) for _ in places)]
        from scipy.optimize import minimize

        result = placed(minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=bounds).x)
        parts = tuple(float(weight) for weight in result[: len(self.raw)])
        return Weights("logit", parts, float(result[-1]) if self.repeats else 0.0)

    def _pooled_onto(self, base: Weights, free: Sequence[int], rows: NDArray[np.int64]) -> Weights:
        own, seen = (
            np.column_stack([item[rows] @ np.array(base.parts), item[rows][:, list(free)]]) for item in self.shares()
        )
        worth = np.exp(base.repeat)
        factor = np.where(self.had[rows, self.truth[rows]], worth, 1.0)

        def loss(numbers: NDArray[np.float64]) -> float:
            shares = _softmax(numbers)
            mixed = (own @ shares) * factor / (1 + (worth - 1) * (seen @ shares))
            return float(-np.log(np.maximum(mixed, 1e-300)).sum())

        begin = np.zeros(own.shape[1])
        from scipy.optimize import minimize

        shares = _softmax(minimize(loss, begin, method="L-BFGS-B", bounds=[(-12, 12)] * len(begin)).x)
        parts = shares[0] * np.array(base.parts)
        parts[list(free)] = shares[1:]
        return Weights("pool", tuple(float(part) for part in parts), base.repeat)

    def alone(self, place: int, rows: NDArray[np.int64]) -> float:
        """Return the offset of history items for a single member: 0, or one that ranks all other items first."""
        results = []
        for worth in (0.0, _NEVER):
            weights = Weights("alone", tuple(float(place == item) for item in range(len(self.raw))), worth)
            results.append((self.ndcg(weights, rows).mean(), worth))
        return max(results)[1]

    def shares(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return each member's probability of each target, and of all history items, shape (n, parts)."""
        if self._shares is None:
            own, seen, here = [], [], np.arange(len(self.truth))
            block = max(1, CELLS // self.had.shape[1])
            for raw, kind in zip(self.raw, self.kinds, strict=True):
                for begin in range(0, len(here), block):
                    part = slice(begin, begin + block)
                    values = share(raw[part], kind, None if self.out is None else self.out[part])
                    own.append(values[np.arange(len(values)), self.truth[part]])
                    seen.append((values * self.had[part]).sum(axis=1))
            sizes = len(self.raw), len(here)
            self._shares = np.concatenate(own).reshape(sizes).T, np.concatenate(seen).reshape(sizes).T
        return self._shares

    def ndcg(self, weights: Weights, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return NDCG@10 of some cases with given weights, in expectation over ties, shape (n,)."""
        block = max(1, CELLS // self.had.shape[1])
        greater, tied = [], []
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            out = None if self.out is None else self.out[part]
            if weights.form == "logit":
                values = np.array([*weights.parts, *([weights.repeat] if self.repeats else [])], dtype=np.float32)
                result = np.matmul(values, self.features()[part])
            else:
                result = combined(weights, [item[part] for item in self.raw], self.kinds, self.had[part], out)
            if out is not None:
                result = np.where(out, -np.inf, result)
            own = result[np.arange(len(part)), self.truth[part]][:, None]
            greater.append((result > own).sum(axis=1))
            tied.append((result == own).sum(axis=1))
        return np.asarray(ndcg(np.concatenate(greater), np.concatenate(tied), CUT))

    def crossed(self, fit: Fit, whole: Weights, folds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return NDCG@10 of each case with weights fitted to the other folds, shape (n,).

        Args:
            fit: Fits the form.
            whole: The form fitted to all cases, as the initial value for the folds.
            folds: The fold of each case.
        """
        result = np.zeros(len(self.truth))
        for fold in range(FOLDS):
            outside = np.flatnonzero(folds == fold)
            result[outside] = self.ndcg(fit(np.flatnonzero(folds != fold), whole), outside)
        return result


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    result = np.exp(values - values.max())
    return np.asarray(result / result.sum())


def forms(known: WeighedCases, names: Sequence[str]) -> dict[tuple[Form, str], Fit]:
    """Return the functions that fit each form to some of the cases, by form and name; a single member has its name."""

    def alone(place: int, rows: NDArray[np.int64], start: Weights | None = None) -> Weights:
        weights = tuple(float(place == item) for item in range(len(names)))
        return Weights("alone", weights, known.alone(place, rows) if known.repeats else 0.0)

    parts = {("alone", name): partial(alone, place) for place, name in enumerate(names)}
    return {("logit", "logit"): known.logit, ("pool", "pool"): known.pool, **parts}  # type: ignore[dict-item]
