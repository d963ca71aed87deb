"""Ranking metrics with one relevant item per request, averaged exactly over the orders of tied scores.

If other items have the target's score, every order of the tied block is equally likely, so the target's rank is uniform
on ``greater + 1 .. greater + tied``. Each metric is the mean over these ranks in closed form (McSherry and Najork,
"Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores", ECIR 2008). So
metrics do not depend on the order of candidates.

All functions take two integer arrays of shape (n,), one entry per request:

- ``greater``: the number of items with a strictly higher score than the target;
- ``tied``: the number of items with the target's score, **including the target**; 0 for a target missing from the
  ranking, for which every metric is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.errors import LlmrecError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from llmrec.types import Ranking


@dataclass(frozen=True, slots=True)
class TargetRank:
    """The rank of the target in a ranking, with the number of ties.

    Attributes:
        greater: Number of items with a strictly higher score; the pool's size if the target is missing.
        tied: Size of the target's block of equal scores, including the target; 0 if it is missing.
        missing: Whether the target is missing from the ranking.
    """

    greater: int
    tied: int
    missing: bool


def target_rank(ranking: Ranking, target: str, pool: int) -> TargetRank:
    """Return the rank of the target by score, independently of the order of ``ranking.items``.

    Args:
        ranking: Items with scores.
        target: The held-out item.
        pool: Number of rankable items: candidates of the request, or the catalogue without excluded items.

    Raises:
        LlmrecError: If a score is NaN.
        ValueError: If items and scores differ in number, an item is duplicate, or more than ``pool`` are ranked.
    """
    items, scores = ranking.items, ranking.scores
    if len(items) != len(scores):
        raise ValueError(f"request {ranking.request_id!r}: there are {len(items)} items, but {len(scores)} scores")
    if (ranked := len(items) + ranking.unlisted) > pool:
        raise ValueError(
            f"request {ranking.request_id!r}: {ranked} items are ranked, but there are only {pool} candidates"
        )
    if len(set(items)) != len(items):
        raise ValueError(f"request {ranking.request_id!r}: the ranking has a duplicate item")
    for item, score in zip(items, scores, strict=True):
        if math.isnan(score):
            raise LlmrecError(
                f"request {ranking.request_id!r}: the score of item {item!r} is NaN, which cannot be ranked because "
                "values overflowed; set model.dtype=float32 and run again",
                kind="bad-value",
            )
    if target not in items and not ranking.unlisted:
        return TargetRank(greater=pool, tied=0, missing=True)
    lowest = min(scores, default=0.0)
    target_score = scores[items.index(target)] if target in items else lowest
    unlisted_ties = ranking.unlisted if target_score == lowest else 0
    return TargetRank(
        greater=sum(score > target_score for score in scores),
        tied=sum(score == target_score for score in scores) + unlisted_ties,
        missing=False,
    )


def hit_rate(greater: ArrayLike, tied: ArrayLike, k: int) -> NDArray[np.float64]:
    """Compute HR@k (here equal to recall@k): the probability that the target is among the first k.

    ``clip(k - greater, 0, tied) / tied``.

    Returns:
        Values in [0, 1], shape (n,).
    """
    above, block = _validated_ranks(greater, tied, k)
    hits = np.clip(k - above, 0, block)
    return _mean_over_block(hits.astype(np.float64), block)


def ndcg(greater: ArrayLike, tied: ArrayLike, k: int) -> NDArray[np.float64]:
    """Compute NDCG@k with one relevant item of gain 1 (Järvelin and Kekäläinen, TOIS 2002).

    The ideal list has the target first, so the ideal DCG is 1 and NDCG is ``1 / log2(rank + 1)`` for ranks up to
    k, counted from 1, else 0. For a tied block it is the mean of that discount over the block's ranks.

    Returns:
        Values in [0, 1], shape (n,).
    """
    above, block = _validated_ranks(greater, tied, k)
    ranks = np.arange(1, k + 1)
    discounts = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(ranks + 1))])
    total = discounts[np.minimum(above + block, k)] - discounts[np.minimum(above, k)]
    return _mean_over_block(total, block)


def reciprocal_rank(greater: ArrayLike, tied: ArrayLike, k: int | None = None) -> NDArray[np.float64]:
    """Compute the reciprocal rank, ``1 / rank`` counted from 1; its mean is MRR (Voorhees, TREC-8, 1999).

    Args:
        greater: See the module.
        tied: See the module.
        k: Cut-off; None: none.

    Returns:
        Values in [0, 1], shape (n,).
    """
    above, block = _validated_ranks(greater, tied, 1 if k is None else k)
    last = int((above + block).max(initial=0)) if k is None else k
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, last + 1))])
    total = harmonic[np.minimum(above + block, last)] - harmonic[np.minimum(above, last)]
    return _mean_over_block(total, block)


def precision(greater: ArrayLike, tied: ArrayLike, k: int) -> NDArray[np.float64]:
    """Compute Precision@k with one relevant item: HR@k over k, so at most 1 / k.

    Returns:
        Values in [0, 1 / k], shape (n,).
    """
    return hit_rate(greater, tied, k) / k


def average_precision(greater: ArrayLike, tied: ArrayLike, k: int | None = None) -> NDArray[np.float64]:
    """Compute average precision (its mean is MAP): with one relevant item equal to the reciprocal rank."""
    return reciprocal_rank(greater, tied, k)


def auc(greater: ArrayLike, tied: ArrayLike, pool: ArrayLike) -> NDArray[np.float64]:
    """Compute AUC of each request: the share of other items ranked below the target, ties counting half.

    ``1 - (greater + (tied - 1) / 2) / (pool - 1)``; a missing target ranks below every item.

    Args:
        greater: See the module.
        tied: See the module.
        pool: Number of rankable items, including the target, shape (n,) or one number.

    Returns:
        Values in [0, 1], shape (n,); 0.5 if the target is the whole pool.
    """
    above, block = _validated_ranks(greater, tied, 1)
    others = np.broadcast_to(np.asarray(pool, dtype=np.int64), above.shape) - 1
    if (above + np.maximum(block - 1, 0) > np.maximum(others, 0) + (block == 0)).any():
        raise ValueError("more items are ranked above or tied with a target than there are candidates")
    share = 1 - (above + (block - 1) / 2) / np.maximum(others, 1)
    return np.where(block == 0, 0.0, np.where(others > 0, share, 0.5))


def expected_rank(greater: ArrayLike, tied: ArrayLike) -> NDArray[np.float64]:
    """Return the mean rank of the target among its ties, counted from 1; NaN if the target is missing."""
    above, block = _validated_ranks(greater, tied, 1)
    return np.where(block > 0, above + (block + 1) / 2, np.nan)


def tie_rate(tied: ArrayLike) -> float:
    """Return the share of requests in which the target ties with another item."""
    block = np.asarray(tied)
    if block.size == 0:
        raise ValueError("the tie rate is undefined without requests")
    return float(np.mean(block > 1))


def _validated_ranks(greater: ArrayLike, tied: ArrayLike, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    above, block = _validated_integers(greater, "greater"), _validated_integers(tied, "tied")
    if above.shape != block.shape or above.ndim != 1:
        raise ValueError(f"greater and tied must have the same shape (n,), not {above.shape} and {block.shape}")
    if k < 1:
        raise ValueError(f"a cut-off must be at least 1, not {k}")
    return above, block


def _validated_integers(values: ArrayLike, name: str) -> NDArray[np.int64]:
    array: NDArray[Any] = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, not {array.dtype}")
    if array.size and array.min() < 0:
        raise ValueError(f"{name} must not be negative")
    return array.astype(np.int64)


def _mean_over_block(total: NDArray[np.float64], block: NDArray[np.int64]) -> NDArray[np.float64]:
    """Divide by the number of ties; 0 for a missing target."""
    return np.where(block > 0, np.clip(total / np.maximum(block, 1), 0.0, 1.0), 0.0)
