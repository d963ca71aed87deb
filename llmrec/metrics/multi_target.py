"""Ranking metrics with several relevant items a request, as exact expectations over tied scores.

The expectations over the orders of tied blocks have closed forms (McSherry and Najork, "Computing Information Retrieval
Performance Measures Efficiently in the Presence of Tied Scores", ECIR 2008), which are taken here for all requests at
once. Without ties the figures are those of trec_eval: in particular precision divides by k, and recall and average
precision by the number of relevant items, whether or not k is smaller.

A relevant item that the ranking leaves out stands in every denominator and gains nothing. All functions take what
`llmrec.metrics.judged.judge` made of the rankings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import gammaln

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from llmrec.metrics.judged import Judged


def hit_rate(judged: Judged, k: int) -> NDArray[np.float64]:
    """HR@k, success at k: the chance that at least one relevant item is among the first k.

    A block that rank k cuts shows ``m`` of its ``tied`` items; none of them is relevant with the hypergeometric chance
    ``C(tied - relevant, m) / C(tied, m)``.

    Returns:
        Values in [0, 1], shape (n,).
    """
    at = _within(judged, k)
    tied, relevant = judged.tied[at], judged.relevant[at]
    shown = np.minimum(k - judged.greater[at], tied)
    rest = tied - relevant
    possible = shown <= rest
    missed = np.zeros(len(at))
    some = np.flatnonzero(possible)
    m = shown[some]
    missed[some] = np.exp(_log_choose(rest[some], m) - _log_choose(tied[some], m))
    # At most one block is cut by rank k, so the blocks of a request are independent of each other.
    values = np.ones(len(judged.total))
    np.multiply.at(values, judged.request[at], missed)
    return np.clip(1.0 - values, 0.0, 1.0)


def recall(judged: Judged, k: int) -> NDArray[np.float64]:
    """Recall@k: expected relevant items among the first k, over all relevant ones.

    Returns:
        Values in [0, 1], shape (n,); 0 for a request without relevant items.
    """
    return _of_all(_found(judged, k), judged)


def precision(judged: Judged, k: int) -> NDArray[np.float64]:
    """Precision@k: expected relevant items among the first k, over k, also where fewer than k are ranked.

    Returns:
        Values in [0, 1], shape (n,).
    """
    return np.clip(_found(judged, k) / k, 0.0, 1.0)


def ndcg(judged: Judged, k: int) -> NDArray[np.float64]:
    """NDCG@k with binary or graded gains (Järvelin and Kekäläinen, TOIS 2002).

    ``DCG = sum of gain / log2(rank + 1)`` over ranks up to k, linear in the gain as in trec_eval; give ``2**grade - 1``
    as gains for the exponential form. An item of a tied block has the mean discount of the block's ranks. The ideal
    list holds all relevant items, largest gain first, cut at k.

    Returns:
        Values in [0, 1], shape (n,); 0 for a request without relevant items.
    """
    at = _within(judged, k)
    greater, tied = judged.greater[at], judged.tied[at]
    discounts = 1.0 / np.log2(np.arange(1, k + 1) + 1)
    sums = np.concatenate([[0.0], np.cumsum(discounts)])
    dcg = _sum(judged, at, judged.gain[at] / tied * (sums[np.minimum(greater + tied, k)] - sums[greater]))
    # The largest gains of each request, as a table of shape (n, k).
    deep = min(k, int(judged.total.max(initial=0)))
    place = (np.cumsum(judged.total) - judged.total)[:, None] + np.arange(deep)
    held = np.arange(deep) < judged.total[:, None]
    best = np.where(held, judged.gains[np.where(held, place, 0)], 0.0) if deep else np.zeros((len(judged.total), 0))
    ideal = best @ discounts[:deep]
    values: NDArray[np.float64] = np.divide(dcg, ideal, out=np.zeros_like(dcg), where=ideal > 0)
    return np.clip(values, 0.0, 1.0)


def average_precision(judged: Judged, k: int | None = None) -> NDArray[np.float64]:
    """Average precision, whose mean is MAP: the mean over relevant items of the precision at their rank.

    For rank ``greater + i`` of a block with ``before`` relevant items above it, an item is relevant with chance
    ``relevant / tied``, and then ``before + 1 + (i - 1) (relevant - 1) / (tied - 1)`` relevant ones are expected up to
    it (McSherry and Najork 2008). Summed over i this is a difference of harmonic numbers.

    Args:
        judged: See `judge`.
        k: Ranks beyond it count 0; None means no cut-off. The denominator stays the number of relevant items.

    Returns:
        Values in [0, 1], shape (n,); 0 for a request without relevant items.
    """
    last = int((judged.greater + judged.tied).max(initial=1)) if k is None else k
    at = _within(judged, last)
    greater, tied, relevant, before = judged.greater[at], judged.tied[at], judged.relevant[at], judged.before[at]
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, last + 1))])
    end = np.minimum(greater + tied, last)
    slope = (relevant - 1) / np.maximum(tied - 1, 1)
    # (before + 1 + (i - 1) slope) / (greater + i) = slope + (before + 1 - slope (greater + 1)) / (greater + i)
    inner = slope * (end - greater) + (before + 1 - slope * (greater + 1)) * (harmonic[end] - harmonic[greater])
    return _of_all(_sum(judged, at, relevant / tied * inner), judged)


def reciprocal_rank(judged: Judged, k: int | None = None) -> NDArray[np.float64]:
    """Reciprocal rank of the first relevant item; its mean is MRR.

    The first relevant item is in the best block that holds one. Its place j in that block has the chance
    ``C(tied - j, relevant - 1) / C(tied, relevant)``; the sum over j is taken once for each kind of block.

    Args:
        judged: See `judge`.
        k: Ranks beyond it count 0; None means no cut-off.

    Returns:
        Values in [0, 1], shape (n,).
    """
    if k is not None:
        _positive(k)
    first = np.flatnonzero(judged.before == 0)
    columns = np.stack([judged.greater[first], judged.tied[first], judged.relevant[first]], axis=1)
    each = np.zeros(len(first))
    alone = columns[:, 1] == 1
    each[alone] = np.where(columns[alone, 0] < (np.inf if k is None else k), 1.0 / (columns[alone, 0] + 1), 0.0)
    kinds, which = np.unique(columns[~alone], axis=0, return_inverse=True)
    shared = np.array([_first_of_block(int(g), int(t), int(r), k) for g, t, r in kinds], dtype=np.float64)
    each[~alone] = shared[which.ravel()]
    values = np.zeros(len(judged.total))
    values[judged.request[first]] = each
    return values


def auc(judged: Judged, pool: ArrayLike) -> NDArray[np.float64]:
    """AUC of each request: the chance that a relevant item stands above one that is not, ties counting half.

    Args:
        judged: See `judge`.
        pool: Items that could be ranked, relevant ones included, shape (n,) or one number. What a ranking leaves out
            counts as tied below everything that it ranks.

    Returns:
        Values in [0, 1], shape (n,); NaN for a request whose pool holds one class only.
    """
    size = np.broadcast_to(np.asarray(pool, dtype=np.int64), judged.total.shape)
    others = size - judged.total
    every = np.arange(len(judged.request))
    found = _sum(judged, every, judged.relevant.astype(np.float64))
    if (judged.ranked + (judged.total - found) > size).any():
        raise ValueError("a pool holds fewer items than were ranked or are relevant")
    above = judged.greater - judged.before
    lost = _sum(judged, every, judged.relevant * (above + (judged.tied - judged.relevant) / 2))
    ranked_others = judged.ranked - found
    lost += (judged.total - found) * (ranked_others + (others - ranked_others) / 2)
    pairs = (judged.total * others).astype(np.float64)
    share: NDArray[np.float64] = np.divide(lost, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return 1.0 - share


# --------------------------------------------------------------------------- parts


def _positive(k: int) -> int:
    if k < 1:
        raise ValueError(f"a cut-off must be at least 1, not {k}")
    return k


def _within(judged: Judged, k: int) -> NDArray[np.int64]:
    """Return the blocks that begin among the first k."""
    return np.flatnonzero(judged.greater < _positive(k))


def _found(judged: Judged, k: int) -> NDArray[np.float64]:
    """Return the expected number of relevant items among the first k, shape (n,)."""
    at = _within(judged, k)
    tied = judged.tied[at]
    return _sum(judged, at, judged.relevant[at] * (np.minimum(k - judged.greater[at], tied) / tied))


def _sum(judged: Judged, at: NDArray[np.int64], of_block: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add the chosen blocks of each request, shape (n,)."""
    return np.bincount(judged.request[at], of_block, minlength=len(judged.total)).astype(np.float64)


def _of_all(sums: NDArray[np.float64], judged: Judged) -> NDArray[np.float64]:
    """Divide by the number of relevant items; a request without any gets 0."""
    share: NDArray[np.float64] = np.clip(sums / np.maximum(judged.total, 1), 0.0, 1.0)
    return share


def _log_choose(n: NDArray[np.int64], m: NDArray[np.int64]) -> NDArray[np.float64]:
    logs: NDArray[np.float64] = gammaln(n + 1.0) - gammaln(m + 1.0) - gammaln(n - m + 1.0)
    return logs


def _first_of_block(greater: int, tied: int, relevant: int, k: int | None) -> float:
    """Return the expected reciprocal rank of the first of ``relevant`` items spread over a block."""
    places = np.arange(1, tied - relevant + 2)
    if k is not None:
        places = places[places <= k - greater]
    # chance(1) = relevant / tied; chance(j + 1) / chance(j) = (tied - j - relevant + 1) / (tied - j)
    steps = places[:-1]
    ratios = (tied - steps - relevant + 1) / np.maximum(tied - steps, 1)
    chance = relevant / tied * np.concatenate([[1.0], np.cumprod(ratios)])[: len(places)]
    return float(np.sum(chance / (greater + places)))
