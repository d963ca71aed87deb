"""Weights of ensembles: how the scores of members are combined, and how the weights are fitted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.data.hashing import hash64
from llmrec.ensembles import trees
from llmrec.ensembles.cells import CandidateScores
from llmrec.ensembles.trees import Trees, TreeSetting
from llmrec.errors import LlmrecError, is_installed
from llmrec.metrics.stats import StatisticName, paired_difference

if TYPE_CHECKING:
    from numpy.typing import NDArray


Form = Literal["ranker", "logit", "pool", "ridge", "alone"]

FitFunction = Callable[["NDArray[np.int64]", "Weights | None"], "Weights"]
"""Fits a form to some of the cases, starting from given weights."""

FOLDS = 5

# Number of bootstrap samples for the confidence limits of a member's contribution.
_RESAMPLES = 1000


@dataclass(frozen=True)
class Weights:
    """The fitted weights of an ensemble of ranking models.

    Attributes:
        form: The form; ``alone`` is the first member with a weight.
        parts: One weight per member: exponents of a logit, shares of a pool, or gain importances in a ranker.
        repeat: Log weight of an item of the history relative to other items; 0 if none can be ranked.
        low: Lower 95 % limits of the weights over users, that of ``repeat`` last; empty if not computed.
        high: Upper limits.
        trees: The model of a ranker.
        base: A ranker, to whose score the scores of the members are added.
        scale: The weight of its score.
    """

    form: Form
    parts: tuple[float, ...]
    repeat: float = 0.0
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    trees: Trees | None = None
    base: Weights | None = None
    scale: float = 0.0

    def scores(self, cells: CandidateScores) -> NDArray[np.float64]:
        """Return the score of each candidate, higher is better, shape (candidates,)."""
        if self.trees is not None:
            return self.trees.scores(feature_matrix(cells, self.trees.names))
        total = np.zeros(len(cells.in_history))
        if self.base is not None:
            total = self.scale * self.base.scores(cells)
        for _, votes in self._votes(cells):
            total = total + votes
        if self.form == "pool":
            total = np.log(np.maximum(total, 1e-300))
        return total + self.repeat * cells.in_history if self.repeat else total

    def contributions(self, cells: CandidateScores) -> dict[str, NDArray[np.float64]]:
        """Return the contribution of each member and feature to the scores of candidates, shape (candidates,) each.

        They sum to the score minus its mean over the candidates of the request; for a pool, whose score is a logarithm,
        to the exponential of the score minus its mean. For a ranker they are SHAP values, summed over the features of a
        member; for weights the products, which are the SHAP values of a linear model.
        """
        parts: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(len(cells.in_history)))
        if self.trees is not None:
            values = self.trees.contributions(feature_matrix(cells, self.trees.names))
            for name, column in zip(self.trees.names, values.T, strict=True):
                parts[feature_member(name) or name] += column
        else:
            if self.base is not None:
                for name, column in self.base.contributions(cells).items():
                    parts[name] += self.scale * column
            for name, votes in self._votes(cells):
                parts[name] += votes * np.exp(self.repeat * cells.in_history) if self.form == "pool" else votes
            if self.repeat and self.form != "pool":
                parts[_HISTORY_FEATURE] += self.repeat * cells.in_history
        sizes = np.maximum(np.diff(cells.starts), 1)
        return {name: values - (cells.total(values) / sizes)[cells.rows] for name, values in parts.items()}

    def _votes(self, cells: CandidateScores) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield the weighted scores of each member that has a weight, shape (candidates,)."""
        for member, (name, weight) in enumerate(zip(cells.names, self.parts, strict=True)):
            if weight and self.form == "alone":
                yield name, cells.raw[member].astype(np.float64)
            elif weight:
                yield name, weight * (cells.shares(member) if self.form == "pool" else cells.scores(member))


@dataclass(frozen=True)
class EnsembleTrial:
    """A type of ensemble with its cross-fitted result; higher is better."""

    form: Form
    name: str
    value: float


@dataclass(frozen=True)
class MemberAblation:
    """The loss of an ensemble if one member is left out and the weights are fitted again.

    Attributes:
        name: The name of the member.
        loss: The decrease of NDCG@10, or the increase of RMSE or log-loss, without it; above 0 for a useful member.
        low: Lower 95 % limit over users.
        high: Upper limit.
    """

    name: str
    loss: float
    low: float
    high: float


def assign_folds(name: str, users: Sequence[str]) -> NDArray[np.int64]:
    """Return the fold of each case; all cases of a user are in the same fold.

    Raises:
        LlmrecError: If there are too few users to fit weights on four fifths of them.
    """
    if len(set(users)) < 2 * FOLDS:
        raise LlmrecError(
            f"{name}: ensemble weights need validation cases of at least {2 * FOLDS} users, but there are "
            f"{len(set(users))}; reserve more validation users",
            kind="too-few",
        )
    return (hash64("fusion folds", 0, users) % np.uint64(FOLDS)).astype(np.int64)


def confidence_limits(
    values: NDArray[np.float64], scores: NDArray[np.float64], curvature: NDArray[np.float64], users: Sequence[str]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return 95 % limits of fitted values, robust and clustered by user (White, Econometrica 1982).

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


def measure_ablation(
    name: str,
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    users: Sequence[str],
    statistic: StatisticName = "mean",
) -> MemberAblation:
    """Return the loss from leaving a member out, computed from the results with and without it."""
    result = paired_difference(first, second, resamples=_RESAMPLES, seed=0, users=users, statistic=statistic)
    return MemberAblation(name, result.value, result.low, result.high)


def select_form(values: Mapping[Any, NDArray[np.float64]], learned: Any | None, users: Sequence[str]) -> Any:
    """Return the best linear ensemble, or trees if trees are better by more than a standard error.

    A ranker has thousands of parameters and could be chosen by noise, hence the one-standard-error rule on paired
    differences (Breiman et al., 1984, section 3.4.3). Weights have one parameter per member and compete with single
    members without a margin.

    Args:
        values: The cross-fitted value of each case by form, higher is better, shape (n,).
        learned: The form of the ranker; None: no ranker.
        users: The user of each case; differences are summed by user.
    """
    best = max((form for form in values if form != learned), key=lambda form: values[form].mean())
    if learned is None:
        return best
    _, cluster = np.unique(np.array(users), return_inverse=True)
    gains = values[learned] - values[best]
    sums = np.bincount(cluster, weights=gains - gains.mean())
    return learned if gains.mean() > np.sqrt((sums**2).sum()) / len(gains) else best


# --------------------------------------------------------------------------- features

_HISTORY_FEATURE = "in history"

_MEMBER_FEATURES: Mapping[str, Callable[[CandidateScores, int], NDArray[np.float32]]] = {
    "score": CandidateScores.scores,
    "rank": CandidateScores.ranks,
    "relative score": CandidateScores.relative,
}


def feature_names(cells: CandidateScores, off: int | None = None) -> tuple[str, ...]:
    """Return the feature names for trees: three per member except ``off``, and features of history and context."""
    members = [name for index, name in enumerate(cells.names) if index != off]
    features = [f"{name}: {kind}" for name in members for kind in _MEMBER_FEATURES]
    return (*features, *([_HISTORY_FEATURE] if cells.in_history.any() else []), *cells.context)


def feature_member(feature: str) -> str | None:
    """Return the member to which a tree feature belongs; None for features of history or context."""
    member, _, kind = feature.rpartition(": ")
    return member if kind in _MEMBER_FEATURES and member else None


def feature_matrix(cells: CandidateScores, names: Sequence[str]) -> NDArray[np.float32]:
    """Return the features for trees, shape (candidates, features); NaN for missing values."""
    result = np.full((len(cells.in_history), len(names)), np.nan, dtype=np.float32)
    for column, name in enumerate(names):
        member, _, kind = name.rpartition(": ")
        if kind in _MEMBER_FEATURES and member in cells.names:
            result[:, column] = _MEMBER_FEATURES[kind](cells, cells.names.index(member))
        elif name == _HISTORY_FEATURE:
            result[:, column] = cells.in_history
        elif name in cells.context:
            result[:, column] = cells.context[name]
    return result


def _log_scores(cells: CandidateScores, *, repeats: bool) -> NDArray[np.float32]:
    """Return the members' log-scale scores and, optionally, whether items are in the history, (k, candidates)."""
    rows = [cells.scores(member) for member in range(len(cells.names))]
    return np.stack([*rows, cells.in_history.astype(np.float32)] if repeats else rows)


# --------------------------------------------------------------------------- fitting

# Ridge penalty of the standardised weights of a logit, summed over the sample.
_PENALTY = 1.0
# A score that ranks an item below all others.
_EXCLUDED_SCORE = -1e9
# Minimum number of cases whose target is a candidate, for fitting trees.
MIN_RANKER_CASES = 200


def _negative_log_likelihood(
    weights: NDArray[np.float64], logs: NDArray[np.float32], cells: CandidateScores
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Return the negative log-likelihood, its gradient, shape (k,), and the probability of each candidate.

    Every case must have its target among the candidates.
    """
    assert cells.truth is not None
    logits = weights @ logs.astype(np.float64)
    logits -= cells.most(logits)[cells.rows]
    target_logits = logits[cells.truth]
    probabilities = np.exp(logits)
    sums = cells.total(probabilities)
    probabilities /= sums[cells.rows]
    gradient = logs @ probabilities - logs[:, cells.truth].sum(axis=1, dtype=np.float64)
    return float((np.log(sums) - target_logits).sum()), gradient, probabilities


def _maximise_likelihood(
    logs: NDArray[np.float32],
    cells: CandidateScores,
    centre: NDArray[np.float64],
    begin: NDArray[np.float64] | None = None,
    bounds: Sequence[tuple[float | None, float | None]] | None = None,
) -> NDArray[np.float64]:
    """Return maximum-likelihood weights with a ridge penalty towards ``centre``, which they equal without cases."""
    if not logs.shape[1]:
        return centre if centre.any() else np.full(len(logs), 1.0 / len(logs))
    spreads = np.array([float(row[row > _EXCLUDED_SCORE / 2].std(dtype=np.float64)) for row in logs])
    scales = np.maximum(spreads, 1e-6)

    def loss(scaled: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = scaled / scales
        value, gradient, _ = _negative_log_likelihood(weights, logs, cells)
        away = scaled - centre * scales
        return value + _PENALTY * float(away @ away), gradient / scales + 2 * _PENALTY * away

    # Importing scipy takes 0.1 s, which most commands do not need.
    from scipy.optimize import minimize

    start = np.full(len(logs), 1.0 / len(logs)) if begin is None else begin * scales
    options = {"maxiter": 100, "ftol": 1e-8}
    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x / scales)


def fit_logit(
    cells: CandidateScores, start: Weights | None = None, *, repeats: bool, off: int | None = None
) -> Weights:
    """Fit a conditional logit by maximum likelihood with a small ridge penalty, and return the weights.

    Args:
        cells: The cases to fit to.
        start: Initial weights, which save time and do not change the result.
        repeats: Whether items of the history can be ranked, so that their weight is fitted.
        off: A member that is left out.
    """
    known = cells.of(cells.hits)
    logs = _log_scores(known, repeats=repeats)
    used = [index for index in range(len(logs)) if index != off]
    begin = None
    if start is not None:
        begin = np.array([*start.parts, *([start.repeat] if repeats else [])])[used]
    result = np.zeros(len(logs))
    result[used] = _maximise_likelihood(logs[used], known, np.zeros(len(used)), begin)
    parts = len(cells.names)
    return Weights("logit", tuple(result[:parts].tolist()), float(result[-1]) if repeats else 0.0)


def with_confidence_limits(cells: CandidateScores, weights: Weights, users: Sequence[str], *, repeats: bool) -> Weights:
    """Return the weights of a logit with 95 % limits."""
    if not len(cells.hits):
        return weights
    known = cells.of(cells.hits)
    assert known.truth is not None
    logs = _log_scores(known, repeats=repeats).astype(np.float64)
    values = np.array([*weights.parts, *([weights.repeat] if repeats else [])])
    _, _, probabilities = _negative_log_likelihood(values, logs.astype(np.float32), known)
    weighted = logs * probabilities
    means = known.total(weighted)
    scores = (means - logs[:, known.truth]).T
    low, high = confidence_limits(
        values, scores, weighted @ logs.T - means @ means.T, [users[row] for row in cells.hits]
    )
    return replace(weights, low=low, high=high)


def fit_pool(cells: CandidateScores, start: Weights | None = None, *, repeats: bool, off: int | None = None) -> Weights:
    """Fit a linear pool of probabilities, with a weight for history items, by maximum likelihood.

    Args:
        cells: The cases to fit to.
        start: Unused.
        repeats: Whether items of the history can be ranked, so that their weight is fitted.
        off: A member that is left out.
    """
    known = cells.of(cells.hits)
    used = [index for index in range(len(cells.names)) if index != off]
    truth, seen, in_history = _member_probabilities(known)
    shares, repeat = _fit_mixture(truth[:, used], seen[:, used], in_history, repeats=repeats)
    result = np.zeros(len(cells.names))
    result[used] = shares
    return Weights("pool", tuple(result.tolist()), repeat)


def _member_probabilities(known: CandidateScores) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return each member's probabilities of the target and of all history items, shape (n, k)."""
    assert known.truth is not None
    shares = [known.shares(member) for member in range(len(known.names))]
    truth = np.stack([values[known.truth] for values in shares], axis=1)
    seen = np.stack([known.total(values * known.in_history) for values in shares], axis=1)
    return truth, seen, known.in_history[known.truth]


def _fit_mixture(
    truth: NDArray[np.float64],
    seen: NDArray[np.float64],
    in_history: NDArray[np.bool_],
    *,
    repeats: bool,
    repeat: float = 0.0,
) -> tuple[NDArray[np.float64], float]:
    """Fit the mixture weights of members, and the log weight of history items."""

    def loss(free: NDArray[np.float64]) -> float:
        shares = _softmax(free[: truth.shape[1]])
        factor = np.exp(free[-1] if repeats else repeat)
        mixed = truth @ shares * np.where(in_history, factor, 1.0) / (1 + (factor - 1) * (seen @ shares))
        return float(-np.log(np.maximum(mixed, 1e-300)).sum())

    from scipy.optimize import minimize

    begin = np.zeros(truth.shape[1] + repeats)
    result = minimize(loss, begin, method="L-BFGS-B", bounds=[(-12, 12)] * len(begin)).x
    return _softmax(result[: truth.shape[1]]), float(result[-1]) if repeats else repeat


def extend_base(cells: CandidateScores, base: Weights, free: Sequence[int]) -> Weights:
    """Add members to an ensemble: fit the weight of the ensemble and of each new member.

    In a logit the ridge penalty shrinks these to 1 and 0; in a pool the ensemble is a member like the others. So a few
    cases suffice to add members to an ensemble that was fitted on many.

    Args:
        cells: The cases to fit to.
        base: Weights of all members, 0 for the new ones.
        free: Indices of the new members.
    """
    known, columns = cells.of(cells.hits), list(free)
    if base.form == "alone":
        # The raw scores of a single member become log scores, as those of the new members are.
        base = replace(base, form="logit")
    if base.form == "pool":
        truth, seen, in_history = _member_probabilities(known)
        joined = [np.column_stack([item @ np.array(base.parts), item[:, columns]]) for item in (truth, seen)]
        shares, _ = _fit_mixture(joined[0], joined[1], in_history, repeats=False, repeat=base.repeat)
        parts = shares[0] * np.array(base.parts)
        parts[columns] = shares[1:]
        return Weights("pool", tuple(parts.tolist()), base.repeat)
    logs = np.stack([base.scores(known).astype(np.float32), *(known.scores(member) for member in columns)])
    bounds = [(0.0, None), *((None, None) for _ in columns)]
    scale, *added = _maximise_likelihood(logs, known, np.eye(len(logs))[0], np.eye(len(logs))[0], bounds).tolist()
    if base.trees is not None:
        parts = np.zeros(len(cells.names))
        parts[columns] = added
        return Weights("logit", tuple(parts.tolist()), base=base, scale=scale)
    parts = scale * np.array(base.parts)
    parts[columns] += added
    return Weights("logit", tuple(parts.tolist()), scale * base.repeat, base=base.base, scale=scale * base.scale)


def fit_single_member(cells: CandidateScores, start: Weights | None = None, *, member: int, repeats: bool) -> Weights:
    """Return the weights of a single member, with or without history items."""
    parts = tuple(float(member == index) for index in range(len(cells.names)))
    options = [Weights("alone", parts, repeat) for repeat in ((0.0, _EXCLUDED_SCORE) if repeats else (0.0,))]
    return max(options, key=lambda weights: (cells.ndcg(weights.scores(cells)).mean(), weights.repeat))


def fit_ranker(
    cells: CandidateScores, start: Weights | None = None, *, setting: TreeSetting, off: int | None = None
) -> Weights:
    """Fit gradient-boosted trees, and report the importance of each member."""
    known = cells.of(cells.hits)
    names = feature_names(cells, off)
    booster = trees.fit_trees(feature_matrix(known, names), _target_labels(known), np.diff(known.starts), setting)
    model = Trees(booster.model_to_string(), names)
    shares = {name: 0.0 for name in cells.names}
    for feature, gain in model.gains.items():
        member = feature_member(feature)
        if member is not None:
            shares[member] += gain
    return Weights("ranker", tuple(shares.values()), trees=model)


def _target_labels(known: CandidateScores) -> NDArray[np.int8]:
    labels = np.zeros(len(known.in_history), dtype=np.int8)
    labels[known.truth] = 1
    return labels


def tune_ranker(cells: CandidateScores, folds: NDArray[np.int64]) -> tuple[TreeSetting, NDArray[np.float64]] | None:
    """Select the best hyperparameters of the trees, and return the cross-fitted NDCG@10 of each case, shape (n,).

    Returns:
        None if there are too few cases for a ranker, or LightGBM is not installed.
    """
    if len(cells.hits) < MIN_RANKER_CASES or not is_installed("lightgbm"):
        return None
    features = feature_matrix(cells, feature_names(cells))

    def fit_to(inside: NDArray[np.bool_], setting: TreeSetting) -> Any:
        rows = cells.hits[inside[cells.hits]]
        known = cells.of(rows)
        return trees.fit_trees(
            features[np.isin(cells.rows, rows)], _target_labels(known), np.diff(known.starts), setting
        )

    return trees.cross_fit_settings(("lambdarank", "binary"), fit_to, features, cells.rows, folds, cells.ndcg)


def parse_tree_setting(form: EnsembleTrial) -> TreeSetting | None:
    """Return the hyperparameters of trees from their stored name; None for other types of ensemble."""
    if form.form != "ranker":
        return None
    objective, _, rounds = form.name.partition(", ")
    return TreeSetting(objective, int(rounds.removesuffix(" trees")))  # type: ignore[arg-type]


def cross_fitted_ndcgs(
    cells: CandidateScores, fit: FitFunction, start: Weights, folds: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return NDCG@10 of each case with weights fitted on the other folds, shape (n,).

    Args:
        cells: All cases.
        fit: Fits the form.
        start: The form fitted to all cases, as initial values for the folds.
        folds: The fold of each case.
    """
    result = np.zeros(len(folds))
    for fold in np.unique(folds):
        rows = np.flatnonzero(folds == fold)
        held_out = cells.of(rows)
        weights = fit(np.flatnonzero(folds != fold), start)
        result[rows] = held_out.ndcg(weights.scores(held_out))
    return result


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    result = np.exp(values - values.max())
    return np.asarray(result / result.sum())
