"""What makes figures comparable, and one figure from per-request values: a mean with its interval and signature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrec import __version__
from llmrec.metrics.signature import signature
from llmrec.metrics.stats import StatisticName, interval
from llmrec.results import Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalProtocol:
    """What makes figures comparable; it is written into every signature.

    Attributes:
        split: Kind of split.
        candidates: Such as ``"uniform-20"``, or ``"full"``.
        cutoffs: Ranks at which HR and NDCG are cut.
        resamples: Bootstrap samples over users.
        seed: Seeds the bootstrap.
        catalogue: Number of items, the pool where a request has no candidates.
        users: Which or how many users were evaluated, for the signatures; None leaves it unsaid.
        liked: Lowest rating that counts as liked, for the AUC of ratings; None: that figure is not taken.
    """

    split: str
    candidates: str
    cutoffs: tuple[int, ...]
    resamples: int
    seed: int
    catalogue: int
    users: str | None = None
    liked: float | None = None

    def sign(self, metric: str, *, seen: str = "excluded", slice: str | None = None, how: str | None = None) -> str:
        """Return a metric's signature.

        Args:
            metric: Its name.
            seen: ``excluded`` or ``included``, see `signature`.
            slice: Which cases the figure is over; None for all.
            how: What else sets the figure apart.
        """
        return signature(
            metric,
            candidates=self.candidates,
            seen=seen,
            users=self.users,
            slice=slice,
            how=how,
            split=self.split,
            version=__version__,
        )


def statistic_of(metric: str) -> StatisticName:
    """Return how a metric's figure comes from per-request values."""
    return "root_mean" if metric == "RMSE" else "mean"


def mean_figure(
    metric: str,
    per_request: NDArray[np.float64],
    users: Sequence[str],
    protocol: EvalProtocol,
    signature: str,
) -> Metric:
    """Return the mean of per-request values (for RMSE its root) with its interval and signature."""
    found = interval(
        per_request,
        users=users,
        resamples=protocol.resamples,
        seed=protocol.seed,
        statistic=statistic_of(metric),
        method="bca",
        widen=True,
    )
    return figure(found.value, found.low, found.high, signature)


def figure(value: float | None, low: float | None, high: float | None, signature: str, undefined: str = "") -> Metric:
    """Return one metric; where it is not defined, the reason in place of a number."""
    if value is None:
        return Metric(value=None, low=low, high=high, signature=signature, undefined=undefined)
    return Metric(value=value, low=low, high=high, signature=signature)
