"""Validation cases with what the parts of a fusion say of them, and how weights are fitted to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from llmrec.metrics.ranking import ndcg
from llmrec.strategies.fusion_weights import (
    CELLS,
    CUT,
    FOLDS,
    Fit,
    Form,
    Kind,
    Weights,
    combined,
    feature,
    limits_of,
    share,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Ridge penalty of the standardised weights of a logit, for the whole sample.
_PENALTY = 1.0
# Takes an item below all others.
_NEVER = -1e9


@dataclass
class Known:
    """Validation cases with what the parts say of them.

    Attributes:
        raw: Scores of each part, shape (n, items), in single precision.
        kinds: How they are read.
        had: Whether an item is in the history, shape (n, items).
        truth: Column of the target, shape (n,).
        out: What cannot be ranked, shape (n, items), never the target; None: all can be.
        repeats: Items of the history can be ranked, so that their weight is fitted.
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
        """Return the parts on a scale of logarithms, and whether an item is in the history where that can be.

        Returns:
            Shape (n, parts, items), so that what is said of a case lies together.
        """
        if self._features is None:
            shape = len(self.truth), len(self.raw) + self.repeats, self.had.shape[1]
            self._features = np.empty(shape, dtype=np.float32)
            for place, (raw, kind) in enumerate(zip(self.raw, self.kinds, strict=True)):
                self._features[:, place] = feature(raw, kind, self.out)
            if self.repeats:
                self._features[:, -1] = self.had
        return self._features

    def first(self, count: int) -> Known:
        """Return the first cases, without a copy."""
        part = slice(count)
        out = None if self.out is None else self.out[part]
        shares = None if self._shares is None else (self._shares[0][part], self._shares[1][part])
        raw = [each[part] for each in self.raw]
        return Known(
            raw, self.kinds, self.had[part], self.truth[part], out, self.repeats, self.features()[part], shares
        )

    # ----------------------------------------------------------------------- forms

    def logit(self, rows: NDArray[np.int64], start: Weights | None = None, off: int | None = None) -> Weights:
        """Return the weights of the conditional logit by maximum likelihood, with a small ridge penalty.

        Args:
            rows: The cases to fit to.
            start: Weights near which they may lie, which saves time and changes nothing else.
            off: A part that is left out.
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
        # Takes a tenth of a second to import, and most commands fit nothing.
        from scipy.optimize import minimize

        fitted = minimize(loss, begin[used], jac=True, method="L-BFGS-B", options={"maxiter": 100, "ftol": 1e-8}).x
        found = np.zeros(count)
        found[used] = fitted / scales[used]
        weights = tuple(float(weight) for weight in found[:parts])
        return Weights("logit", weights, float(found[-1]) if self.repeats else 0.0)

    def _spread(self, place: int, rows: NDArray[np.int64]) -> float:
        """Return the standard deviation of a feature over the candidates of some cases."""
        values = self.features()[rows, place]
        found = values if self.out is None else values[~self.out[rows]]
        return float(found.std(dtype=np.float64))

    def _likelihood(
        self, weights: NDArray[np.float64], rows: NDArray[np.int64], *, curvature: bool = False
    ) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Return the negative log-likelihood with its gradient, and the gradients by case or the curvature.

        Returns:
            The value; the gradient, shape (k,); with ``curvature`` its matrix below the gradients of the cases, shape
            (n + k, k), else an empty array.
        """
        features, single = self.features(), weights.astype(np.float32)
        count = len(weights)
        value, gradient = 0.0, np.zeros(count)
        each, matrix = [], np.zeros((count, count))
        block = max(1, CELLS // (features.shape[2] * count))
        inside = np.zeros(len(self.truth), dtype=bool)
        inside[rows] = True
        for begin in range(0, len(inside), block):
            # Slices are no copies: cases outside are computed and not counted, which is cheaper than to gather.
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
                each.append(wide[counted])
                both = np.einsum("nkm,nm,nlm->kl", features[part][counted], chances[counted], features[part][counted])
                matrix += both - means[counted].T @ means[counted]
        if not curvature:
            return value, gradient, np.empty(0)
        return value, gradient, np.concatenate([*each, matrix])

    def limits(self, weights: Weights, users: Sequence[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return 95 % limits of a logit's weights, robust and clustered over users (White, Econometrica 1982)."""
        values = np.array([*weights.parts, *([weights.repeat] if self.repeats else [])])
        _, _, both = self._likelihood(values, np.arange(len(self.truth)), curvature=True)
        scores, curvature = both[: -len(values)], both[-len(values) :]
        return limits_of(values, scores, curvature, users)

    def pool(self, rows: NDArray[np.int64], start: Weights | None = None, off: int | None = None) -> Weights:
        """Return the weights of the linear pool by maximum likelihood, with what an item of the history is worth.

        Args:
            rows: The cases to fit to.
            start: Not needed: a fit takes milliseconds.
            off: A part that is left out.
        """
        used = [place for place in range(len(self.raw)) if place != off]
        own, seen = (each[rows][:, used] for each in self.shares())

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

        found = minimize(loss, begin, method="L-BFGS-B", bounds=[(-12, 12)] * len(begin)).x
        shares = np.zeros(len(self.raw))
        shares[used] = _softmax(found[: own.shape[1]])
        return Weights("pool", tuple(float(each) for each in shares), float(found[-1]) if self.repeats else 0.0)

    def onto(
        self, base: Weights, free: Sequence[int], rows: NDArray[np.int64], start: Weights | None = None
    ) -> Weights:
        """Return a fusion with further parts beside it: what the fusion as a whole counts, and what each part does.

        In a logit the ridge penalty draws them to 1 and 0; in a pool the fusion is a part like another. So a few cases
        say what parts add to a fusion that many have weighed.

        Args:
            base: Weights of all parts, 0 of the further ones.
            free: Places of these.
            rows: The cases to fit to.
            start: Not needed: there are few numbers.
        """
        if base.form == "pool":
            return self._pooled_onto(base, free, rows)
        places = list(free)
        whole = np.array([*base.parts, *([base.repeat] if self.repeats else [])])
        inside = np.matmul(whole.astype(np.float32), self.features()[rows])
        ranked = inside if self.out is None else inside[~self.out[rows]]
        # Where all items of the history come last, their part of the sum says nothing of its spread.
        spread = float(ranked[ranked > _NEVER / 2].std(dtype=np.float64))
        scales = np.array([max(each, 1e-6) for each in (spread, *(self._spread(place, rows) for place in places))])
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

        found = placed(minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=bounds).x)
        parts = tuple(float(weight) for weight in found[: len(self.raw)])
        return Weights("logit", parts, float(found[-1]) if self.repeats else 0.0)

    def _pooled_onto(self, base: Weights, free: Sequence[int], rows: NDArray[np.int64]) -> Weights:
        own, seen = (
            np.column_stack([each[rows] @ np.array(base.parts), each[rows][:, list(free)]]) for each in self.shares()
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
        return Weights("pool", tuple(float(each) for each in parts), base.repeat)

    def alone(self, place: int, rows: NDArray[np.int64]) -> float:
        """Return what is added to the scores of items of the history for a part alone: nothing, or all others first."""
        found = []
        for worth in (0.0, _NEVER):
            weights = Weights("alone", tuple(float(place == each) for each in range(len(self.raw))), worth)
            found.append((self.ndcg(weights, rows).mean(), worth))
        return max(found)[1]

    def shares(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the probability of each target by each part, and of all items of the history, shape (n, parts)."""
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
        """Return NDCG@10 of some cases under weights, ties in expectation, shape (n,)."""
        block = max(1, CELLS // self.had.shape[1])
        greater, tied = [], []
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            out = None if self.out is None else self.out[part]
            if weights.form == "logit":
                values = np.array([*weights.parts, *([weights.repeat] if self.repeats else [])], dtype=np.float32)
                found = np.matmul(values, self.features()[part])
            else:
                found = combined(weights, [each[part] for each in self.raw], self.kinds, self.had[part], out)
            if out is not None:
                found = np.where(out, -np.inf, found)
            own = found[np.arange(len(part)), self.truth[part]][:, None]
            greater.append((found > own).sum(axis=1))
            tied.append((found == own).sum(axis=1))
        return np.asarray(ndcg(np.concatenate(greater), np.concatenate(tied), CUT))

    def crossed(self, fit: Fit, whole: Weights, folds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return NDCG@10 of each case under weights that were fitted to the other folds, shape (n,).

        Args:
            fit: Fits the form.
            whole: The form fitted to all cases, near which those of the folds lie.
            folds: Of each case.
        """
        found = np.zeros(len(self.truth))
        for fold in range(FOLDS):
            outside = np.flatnonzero(folds == fold)
            found[outside] = self.ndcg(fit(np.flatnonzero(folds != fold), whole), outside)
        return found


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    found = np.exp(values - values.max())
    return np.asarray(found / found.sum())


def forms(known: Known, names: Sequence[str]) -> dict[tuple[Form, str], Fit]:
    """Return what fits each form to some of the cases, by form and name; a part alone has that of the part."""

    def alone(place: int, rows: NDArray[np.int64], start: Weights | None = None) -> Weights:
        weights = tuple(float(place == each) for each in range(len(names)))
        return Weights("alone", weights, known.alone(place, rows) if known.repeats else 0.0)

    parts = {("alone", name): partial(alone, place) for place, name in enumerate(names)}
    return {("logit", "logit"): known.logit, ("pool", "pool"): known.pool, **parts}  # type: ignore[dict-item]
