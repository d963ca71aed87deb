"""Fusion: several rankers become one, with weights from validation users whom no part was tuned on.

Two forms of one question, how likely is each item to be the next:

- a conditional logit, ``p(j) = softmax_j(sum_k w_k z_kj)`` over what the parts say of the items (McFadden, 1974):
  weights are exponents, and one below 0 says that a part goes too far in what another says too;
- a linear pool, ``p(j) = sum_k w_k p_k(j)`` with weights that sum to 1 (Jelinek and Mercer, 1980): a part that gives
  an item nothing cannot veto it.

Both are fitted by maximum likelihood. Likelihood is not NDCG, so the form is chosen by NDCG on users that the weights
do not know, cross-fitted over users, and every part alone is a form too: on validation no fusion is below its best
part. Where items of the history can be ranked, what such an item is worth is one more weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.optimize import minimize

from llmrec.data.hashing import hash64
from llmrec.errors import LlmrecError
from llmrec.metrics.ranking import ndcg
from llmrec.types import Answer, Case, CatalogueScorer, Ranking, Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kind = Literal["counts", "logits", "beams"]
"""What scores are: at least 0 and read as shares; on a scale of logarithms; or probabilities of found items only."""

Form = Literal["logit", "pool", "alone"]

FOLDS = 5
CUT = 10

# What a share cannot be below, before its logarithm is taken.
_FLOOR = 1e-6
# Ridge penalty of the standardised weights of a logit, for the whole sample.
_PENALTY = 1.0
# Takes an item below all others.
_NEVER = -1e9
# Cells of a block of scores: 64 MB in single precision.
_CELLS = 1 << 24


@dataclass(frozen=True)
class Part:
    """One of the rankers.

    Attributes:
        name: In tables.
        scorer: Fitted; scores the catalogue.
        kind: How its scores are read.
    """

    name: str
    scorer: CatalogueScorer
    kind: Kind


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
    """A form with its NDCG on users that its weights do not know."""

    form: Form
    name: str
    value: float


class Fusion:
    """Ranks by several rankers at once; it is a `CatalogueScorer` and a `Predictor`."""

    def __init__(self, name: str, parts: Sequence[Part], *, filtered: bool) -> None:
        """Set up.

        Args:
            name: Of the row.
            parts: The rankers, over one catalogue in one order.
            filtered: Items of the history cannot be ranked.

        Raises:
            LlmrecError: If there are fewer than two parts, or they have different catalogues.
        """
        if len(parts) < 2 or any(part.scorer.items != parts[0].scorer.items for part in parts):
            raise LlmrecError(f"{name}: a fusion needs two or more parts over one catalogue", kind="mismatch")
        self.name, self.parts, self.filtered = name, tuple(parts), filtered
        self.weights: Weights | None = None
        self.tried: tuple[Tried, ...] = ()

    @property
    def items(self) -> tuple[str, ...]:
        """The catalogue in column order."""
        return self.parts[0].scorer.items

    def fit(self, cases: Sequence[Case]) -> None:
        """Fit the weights of every form, and keep the best form by cross-fitted NDCG@10.

        Args:
            cases: Validation cases of users that no part has learned from or was chosen by.

        Raises:
            LlmrecError: If there are too few users to fit weights on all but a fifth of them.
        """
        users = [case.request.user_id for case in cases]
        if len(set(users)) < 2 * FOLDS:
            raise LlmrecError(
                f"{self.name}: weights need validation cases of at least {2 * FOLDS} users, and there are "
                f"{len(set(users))}; reserve more users for them",
                kind="too-few",
            )
        known = _Known.of(self, cases)
        folds = (hash64("fusion folds", 0, users) % np.uint64(FOLDS)).astype(np.int64)
        values: dict[tuple[Form, str], NDArray[np.float64]] = {}
        for fold in range(FOLDS):
            inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            for form, part, weights in _forms(known, inside, self):
                found = known.ndcg(weights, outside)
                values.setdefault((form, part), np.zeros(len(cases)))[outside] = found
        self.tried = tuple(Tried(form, part, float(found.mean())) for (form, part), found in values.items())
        best = max(self.tried, key=lambda each: each.value)
        everyone = np.arange(len(cases))
        (self.weights,) = (
            w for form, part, w in _forms(known, everyone, self) if (form, part) == (best.form, best.name)
        )
        if best.form == "logit":
            low, high = known.limits(self.weights, users)
            self.weights = Weights("logit", self.weights.parts, self.weights.repeat, low, high)

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return log-probabilities, shape (n, items); see `CatalogueScorer.scores`."""
        raw = [np.asarray(part.scorer.scores(requests)) for part in self.parts]
        return self._joined(raw, _history(self, requests), hide=self.filtered)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates of each request, parts being normalised over them; see `Predictor.answer`.

        Raises:
            LlmrecError: If a request has no candidates; the whole catalogue is ranked by `scores`.
        """
        column = {item: place for place, item in enumerate(self.items)}
        raw = [np.asarray(part.scorer.scores(requests)) for part in self.parts]
        answers: list[Answer] = []
        for row, request in enumerate(requests):
            if not request.candidates:
                raise LlmrecError(f"{self.name}: request {request.id} has no candidates", kind="missing-value")
            places = np.array([column[item] for item in request.candidates])
            seen = {event.item_id for event in request.history}
            had = np.array([[item in seen for item in request.candidates]])
            (found,) = self._joined([part[row : row + 1, places] for part in raw], had, hide=False)
            order = np.lexsort((np.array(request.candidates), -found))
            answers.append(
                Ranking(
                    request_id=request.id,
                    items=tuple(request.candidates[place] for place in order.tolist()),
                    scores=tuple(found[order].tolist()),
                )
            )
        return answers

    def _joined(self, raw: Sequence[NDArray[Any]], had: NDArray[np.bool_], *, hide: bool) -> NDArray[np.float64]:
        """Return log-probabilities from scores of shape (n, m) and whether the items are in the history."""
        if self.weights is None:
            raise RuntimeError(f"the fusion {self.name!r} was asked before fit() was called")
        kinds = [part.kind for part in self.parts]
        return np.asarray(combined(self.weights, raw, kinds, had, hide=hide), dtype=np.float64)


def combined(
    weights: Weights, raw: Sequence[NDArray[Any]], kinds: Sequence[Kind], had: NDArray[np.bool_], *, hide: bool
) -> NDArray[np.floating[Any]]:
    """Return what a fusion says of items, higher is better, shape (n, m).

    Args:
        weights: As fitted.
        raw: Scores of each part, shape (n, m).
        kinds: How they are read.
        had: Whether an item is in the history, shape (n, m).
        hide: Leave items of the history out of what parts are normalised over.
    """
    out = had if hide else None
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


# --------------------------------------------------------------------------- fitting


def _forms(known: _Known, rows: NDArray[np.int64], fusion: Fusion) -> list[tuple[Form, str, Weights]]:
    """Return every form as fitted on some of the cases."""
    count = len(fusion.parts)
    found: list[tuple[Form, str, Weights]] = [
        ("logit", "logit", known.logit(rows)),
        ("pool", "pool", known.pool(rows)),
    ]
    for place, part in enumerate(fusion.parts):
        alone = tuple(float(place == each) for each in range(count))
        found.append(
            ("alone", part.name, Weights("alone", alone, 0.0 if fusion.filtered else known.alone(place, rows)))
        )
    return found


@dataclass
class _Known:
    """Validation cases with what the parts say of them.

    Attributes:
        raw: Scores of each part, shape (n, items), in single precision.
        kinds: How they are read.
        had: Whether an item is in the history, the target never where the history is filtered, shape (n, items).
        truth: Column of the target, shape (n,).
        filtered: Items of the history cannot be ranked.
    """

    raw: list[NDArray[np.float32]]
    kinds: list[Kind]
    had: NDArray[np.bool_]
    truth: NDArray[np.int64]
    filtered: bool
    _features: list[NDArray[np.float32]] = field(default_factory=list)

    @staticmethod
    def of(fusion: Fusion, cases: Sequence[Case]) -> _Known:
        requests = [case.request for case in cases]
        column = {item: place for place, item in enumerate(fusion.items)}
        truth = np.array([column[str(case.truth)] for case in cases])
        had = _history(fusion, requests)
        if fusion.filtered:
            had[np.arange(len(truth)), truth] = False
        block = max(1, _CELLS // len(fusion.items))
        raw = [
            np.concatenate(
                [
                    np.asarray(part.scorer.scores(requests[start : start + block]), dtype=np.float32)
                    for start in range(0, len(requests), block)
                ]
            )
            for part in fusion.parts
        ]
        return _Known(raw, [part.kind for part in fusion.parts], had, truth, fusion.filtered)

    @property
    def out(self) -> NDArray[np.bool_] | None:
        """The items that cannot be ranked."""
        return self.had if self.filtered else None

    def features(self) -> list[NDArray[np.float32]]:
        """Return the parts on a scale of logarithms, and whether an item is in the history where that can be."""
        if not self._features:
            self._features = [feature(raw, kind, self.out) for raw, kind in zip(self.raw, self.kinds, strict=True)]
            if not self.filtered:
                self._features.append(self.had.astype(np.float32))
        return self._features

    # ----------------------------------------------------------------------- forms

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
        return Weights("logit", parts, 0.0 if self.filtered else float(found[-1]))

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
        block = max(1, _CELLS // self.had.shape[1])
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            parts = [feature[part] for feature in features]
            total = np.zeros(parts[0].shape, dtype=np.float32)
            for weight, values in zip(weights, parts, strict=True):
                total += np.float32(weight) * values
            if self.filtered:
                total[self.had[part]] = -np.inf
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
        values = np.array([*weights.parts, *([] if self.filtered else [weights.repeat])])
        _, _, both = self._likelihood(values, np.arange(len(self.truth)), curvature=True)
        scores, curvature = both[: -len(values)], both[-len(values) :]
        _, cluster = np.unique(np.array(users), return_inverse=True)
        sums = np.zeros((cluster.max() + 1, len(values)))
        np.add.at(sums, cluster, scores)
        inverse = np.linalg.pinv(curvature)
        errors = 1.96 * np.sqrt(np.maximum(np.diag(inverse @ (sums.T @ sums) @ inverse), 0.0))
        return tuple((values - errors).tolist()), tuple((values + errors).tolist())

    def pool(self, rows: NDArray[np.int64]) -> Weights:
        """Return the weights of the linear pool by maximum likelihood, with what an item of the history is worth."""
        own, seen = self._shares(rows)

        def loss(free: NDArray[np.float64]) -> float:
            shares = _softmax(free[: own.shape[1]])
            mixed = own @ shares
            if not self.filtered:
                worth = np.exp(free[-1])
                mixed = mixed * np.where(self.had[rows, self.truth[rows]], worth, 1.0)
                mixed = mixed / (1 + (worth - 1) * (seen @ shares))
            return float(-np.log(np.maximum(mixed, 1e-300)).sum())

        start = np.zeros(own.shape[1] + (not self.filtered))
        found = minimize(loss, start, method="L-BFGS-B", bounds=[(-12, 12)] * len(start)).x
        shares = _softmax(found[: own.shape[1]])
        return Weights("pool", tuple(float(each) for each in shares), 0.0 if self.filtered else float(found[-1]))

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
        block = max(1, _CELLS // self.had.shape[1])
        greater, tied = [], []
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            raw, had = [each[part] for each in self.raw], self.had[part]
            found = combined(weights, raw, self.kinds, had, hide=self.filtered)
            if self.filtered:
                found = np.where(had, -np.inf, found)
            own = found[np.arange(len(part)), self.truth[part]][:, None]
            greater.append((found > own).sum(axis=1))
            tied.append((found == own).sum(axis=1))
        return np.asarray(ndcg(np.concatenate(greater), np.concatenate(tied), CUT))


def _history(fusion: Fusion, requests: Sequence[Request]) -> NDArray[np.bool_]:
    column: Mapping[str, int] = {item: place for place, item in enumerate(fusion.items)}
    had = np.zeros((len(requests), len(column)), dtype=bool)
    for row, request in enumerate(requests):
        had[row, [column[event.item_id] for event in request.history if event.item_id in column]] = True
    return had


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    found = np.exp(values - values.max())
    return np.asarray(found / found.sum())
