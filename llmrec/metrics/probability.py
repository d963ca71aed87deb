"""Metrics of yes/no answers given as probabilities: AUC, AUC per user, log loss, calibration error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrec.metrics.stats import MetricValues, resample_counts
from llmrec.records import Reliability

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from llmrec.metrics.stats import Statistic

MIN_PROBABILITY = 1e-15
"""The lower bound of a probability before its logarithm is taken."""

CALIBRATION_BINS = 10
"""Number of bins of the calibration error."""
# Maximum number of weights of answers in resamples that are held at the same time.
_BLOCK_VALUES = 2**22


@dataclass(frozen=True, slots=True)
class UserAUC:
    """The AUC of each user, and its mean over the users with both classes.

    Attributes:
        value: The mean; NaN if no user has both classes.
        users: Names of all users, sorted, shape (u,).
        values: AUC of each user, NaN where a class is missing, shape (u,).
        left_out: Number of users excluded, since all their labels are equal.
    """

    value: float
    users: tuple[str, ...]
    values: NDArray[np.float64]
    left_out: int


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the probability that a yes outscores a no, ties counting half (Mann and Whitney 1947).

    Args:
        scores: Scores, higher for a more likely yes, shape (n,).
        labels: 1 for yes and 0 for no, shape (n,).

    Returns:
        A value in [0, 1]; NaN if a class is missing.

    Raises:
        ValueError: If the two differ in length or are empty, a score is not a number, or a label is not 0 or 1.
    """
    guess, truth = _validated_scores(scores, labels)
    return float(_auc_by_group(np.zeros(len(guess), dtype=np.int64), guess, truth, 1)[0])


def gauc(scores: ArrayLike, labels: ArrayLike, users: Sequence[str]) -> UserAUC:
    """Compute GAUC: the AUC per user, averaged over the users with both classes.

    Unlike pooled AUC it does not reward distinguishing users: predicting each user's share of yes scores 0.5. Zhu et
    al. (KDD 2017) weight users by impressions; here they have equal weights.

    Args:
        scores: See `auc`.
        labels: See `auc`.
        users: The user of each request.

    Raises:
        ValueError: See `auc`.
    """
    guess, truth = _validated_scores(scores, labels)
    if len(users) != len(guess):
        raise ValueError(f"each answer needs a user: there are {len(guess)} answers, but {len(users)} users")
    names, owner = np.unique(np.array(users, dtype=object), return_inverse=True)
    values = _auc_by_group(owner, guess, truth, len(names))
    both = np.isfinite(values)
    value = float(np.sum(values[both]) / both.sum()) if both.any() else float("nan")
    return UserAUC(value, tuple(names), values, int(np.sum(~both)))


def pooled_auc(probabilities: ArrayLike, labels: ArrayLike, owners: Sequence[str]) -> MetricValues:
    """Compute AUC over all answers, for resampling over users; see `auc_statistic`."""
    truth = np.asarray(labels)
    if truth.min() == truth.max():
        return MetricValues(result=None, undefined="all labels are of the same class")
    return MetricValues(result=auc_statistic(probabilities, labels, owners))


def grouped_auc(probabilities: ArrayLike, labels: ArrayLike, owners: Sequence[str]) -> MetricValues:
    """Compute the AUC of each user with both classes, with equal weights; see `gauc`."""
    within = gauc(probabilities, labels, owners)
    both = np.isfinite(within.values)
    if not both.any():
        return MetricValues(result=None, undefined="no user has both positive and negative labels")
    names = [name for name, kept in zip(within.users, both, strict=True) if kept]
    return MetricValues(result=within.values[both], users=names)


def log_loss(probabilities: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Negative log-likelihood of each answer, in nats, shape (n,); LogLoss is its mean.

    ``-log p``, where p, at least 1e-15, is the predicted probability of the true label; the maximum is 34.5.

    Raises:
        ValueError: See `auc`; also if a probability is outside [0, 1].
    """
    guess, truth = _validated_probabilities(probabilities, labels)
    lost: NDArray[np.float64] = -np.log(np.maximum(np.where(truth == 1, guess, 1 - guess), MIN_PROBABILITY))
    return lost


def calibration_error(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Compute the expected calibration error: the mean gap between mean probability and share of yes over ten bins.

    ``sum over bins of (size / n) |mean probability - share of yes|`` (Naeini et al., AAAI 2015). Bins have equal
    numbers of answers (Nguyen and O'Connor, EMNLP 2015); equal probabilities are in the same bin, so sizes may differ.
    The error is biased upwards with small bins, so compare only over the same number of answers.

    Args:
        probabilities: P(yes), shape (n,).
        labels: 1 for yes and 0 for no, shape (n,).

    Returns:
        A value in [0, 1].

    Raises:
        ValueError: See `log_loss`.
    """
    _, predicted, positive = _bin_totals(probabilities, labels)
    return float(np.abs(predicted - positive).sum() / len(np.ravel(probabilities)))


def reliability_curve(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Reliability, ...]:
    """Return the reliability curve: the non-empty bins of `calibration_error`.

    Args:
        probabilities: See `calibration_error`.
        labels: See `calibration_error`.

    Raises:
        ValueError: See `calibration_error`.
    """
    sizes, predicted, positive = _bin_totals(probabilities, labels)
    return tuple(
        Reliability(n=int(n), said=float(sum_predicted / n), so=float(sum_positive / n))
        for n, sum_predicted, sum_positive in zip(sizes, predicted, positive, strict=True)
        if n
    )


def auc_statistic(scores: ArrayLike, labels: ArrayLike, users: Sequence[str] | None = None) -> Statistic:
    """Return the AUC as a function of resampled users, for `llmrec.metrics.stats.statistic_interval`.

    A resample with a single class counts as 0.5.

    Args:
        scores: See `auc`.
        labels: See `auc`.
        users: The user of each request; None if each has a different user.

    Returns:
        A function from arrays of shape (b, m), indices into the sorted users, to b values.

    Raises:
        ValueError: See `auc`.
    """
    guess, truth = _validated_scores(scores, labels)
    owner = np.arange(len(guess)) if users is None else np.unique(np.array(users, dtype=object), return_inverse=True)[1]
    order = np.argsort(guess, kind="stable")
    guess, truth, owner = guess[order], truth[order], owner[order]
    starts = np.flatnonzero(np.r_[True, guess[1:] != guess[:-1]])
    count = int(owner.max()) + 1

    def block(rows: NDArray[np.intp]) -> NDArray[np.float64]:
        weight = resample_counts(rows, count)[:, owner]
        yes = np.add.reduceat(weight * truth, starts, axis=1)
        no = np.add.reduceat(weight * (1 - truth), starts, axis=1)
        won = np.sum(yes * (np.cumsum(no, axis=1) - no / 2), axis=1)
        pairs = yes.sum(axis=1) * no.sum(axis=1)
        values: NDArray[np.float64] = np.divide(won, pairs, out=np.full(len(rows), 0.5), where=pairs > 0)
        return values

    size = max(1, _BLOCK_VALUES // len(guess))

    def statistic(rows: NDArray[np.intp]) -> NDArray[np.float64]:
        return np.concatenate([block(rows[start : start + size]) for start in range(0, max(1, len(rows)), size)])

    return statistic


# --------------------------------------------------------------------------- helpers


def _bin_totals(
    probabilities: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the size, sum of probabilities and number of yes answers of each bin, shape (CALIBRATION_BINS,) each."""
    guess, truth = _validated_probabilities(probabilities, labels)
    borders = np.sort(guess)[(np.arange(1, CALIBRATION_BINS) * len(guess)) // CALIBRATION_BINS]
    bins = np.searchsorted(borders, guess, side="right")
    predicted, positive = (
        np.bincount(bins, weights, minlength=CALIBRATION_BINS).astype(np.float64) for weights in (guess, truth)
    )
    return np.bincount(bins, minlength=CALIBRATION_BINS).astype(np.int64), predicted, positive


def _auc_by_group(
    group: NDArray[np.int64], scores: NDArray[np.float64], labels: NDArray[np.float64], groups: int
) -> NDArray[np.float64]:
    """Compute the AUC within each group from midranks; NaN if a class is missing."""
    order = np.lexsort((scores, group))
    group, scores, labels = group[order], scores[order], labels[order]
    new = np.r_[True, (group[1:] != group[:-1]) | (scores[1:] != scores[:-1])]
    starts = np.flatnonzero(new)
    sizes = np.diff(np.r_[starts, len(scores)])
    begins = np.searchsorted(group, np.arange(groups))
    middle = starts - begins[group[starts]] + (sizes + 1) / 2
    rank = np.repeat(middle, sizes)
    yes = np.bincount(group, labels, minlength=groups)
    no = np.bincount(group, 1 - labels, minlength=groups)
    won = np.bincount(group, rank * labels, minlength=groups) - yes * (yes + 1) / 2
    values: NDArray[np.float64] = np.divide(won, yes * no, out=np.full(groups, np.nan), where=yes * no > 0)
    return values


def _validated_scores(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    guess, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if guess.shape != truth.shape or guess.ndim != 1:
        raise ValueError(f"scores and labels must have the same shape (n,), not {guess.shape} and {truth.shape}")
    if guess.size == 0:
        raise ValueError("the metric is undefined without answers")
    if np.isnan(guess).any():
        raise ValueError("a score is NaN; use a fallback for answers that cannot be parsed")
    if not np.isin(truth, (0.0, 1.0)).all():
        raise ValueError("labels must be 0 or 1")
    return guess, truth


def _validated_probabilities(values: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    guess, truth = _validated_scores(values, labels)
    if guess.min() < 0 or guess.max() > 1:
        raise ValueError("a probability must be in [0, 1]")
    return guess, truth
