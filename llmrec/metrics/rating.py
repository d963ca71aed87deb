"""Rating metrics: errors in units of the rating scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from llmrec.metrics.probability import pooled_auc

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from llmrec.metrics.stats import MetricValues


def squared_error(predicted: ArrayLike, truth: ArrayLike) -> NDArray[np.float64]:
    """Return the squared error of each request, shape (n,); RMSE is the root of its mean.

    Raises:
        ValueError: If the two differ in length or a value is not finite.
    """
    return _rating_errors(predicted, truth) ** 2


def absolute_error(predicted: ArrayLike, truth: ArrayLike) -> NDArray[np.float64]:
    """Return the absolute error of each request, shape (n,); MAE is its mean.

    Raises:
        ValueError: If the two differ in length or a value is not finite.
    """
    return np.abs(_rating_errors(predicted, truth))


def liked_auc(
    predicted: NDArray[np.float64], truth: NDArray[np.float64], liked: float, owners: Sequence[str]
) -> MetricValues:
    """Compute the AUC of predicted ratings: how often an item rated ``liked`` or more is predicted above another."""
    result = pooled_auc(predicted, (truth >= liked).astype(np.float64), owners)
    return replace(result, how=f"from-{liked:g}")


def rmse(predicted: ArrayLike, truth: ArrayLike) -> float:
    """Root mean squared error, ``sqrt(mean((predicted - truth) ** 2))``."""
    errors = squared_error(predicted, truth)
    if not errors.size:
        raise ValueError("rating metrics are undefined without requests")
    return float(np.sqrt(np.mean(errors)))


def _rating_errors(predicted: ArrayLike, truth: ArrayLike) -> NDArray[np.float64]:
    guess, true = np.asarray(predicted, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if guess.shape != true.shape or guess.ndim != 1:
        raise ValueError(
            f"predictions and true ratings must have the same shape (n,), not {guess.shape} and {true.shape}"
        )
    if not (np.isfinite(guess).all() and np.isfinite(true).all()):
        raise ValueError("a rating is not finite; return Unparsed for answers without a rating")
    return guess - true
