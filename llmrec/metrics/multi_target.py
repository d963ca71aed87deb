"""Ranking metrics with several relevant items per request, averaged exactly over the orders of tied scores.

The expectations over the orders of tied blocks have closed forms (McSherry and Najork, "Computing Information Retrieval
Performance Measures Efficiently in the Presence of Tied Scores", ECIR 2008), computed here for all requests at once.
Without ties the values equal those of trec_eval: in particular precision divides by k, and recall and average precision
by the number of relevant items, even if k is smaller.

Relevant items missing from the ranking count as misses. All functions take the result of
`llmrec.metrics.multi_target.match_relevant`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import gammaln

from llmrec.errors import LlmrecError

if TYPE_CHECKING:
    from numpy.typing import NDArray


# --------------------------------------------------------------------------- matching
# Matches rankings with relevant items.
#
# A ranking is split into blocks of equal scores. Every order of a block is equally likely, so each of its ``tied``
# items is equally likely at each of the ranks ``greater + 1 .. greater + tied``.


# Maximum size in bytes of the lookup table of a batch of requests, so that it fits in the processor's cache.
_TABLE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class RequestItemValues:
    """A flat table of (request, item, value) triples, in any order.

    Attributes:
        request: Request index, shape (m,).
        item: Item index, shape (m,).
        value: The item's score in a ranking, or its gain among relevant items, shape (m,).
    """

    request: NDArray[np.int64]
    item: NDArray[np.int64]
    value: NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class RelevantRanks:
    """The ranks of the relevant items of n requests, grouped by equal scores.

    Attributes:
        request: Request index of the block, shape (b,), non-decreasing; blocks of a request are best first.
        greater: Ranked items with a strictly higher score, shape (b,).
        tied: Items in the block, shape (b,).
        relevant: Relevant items in the block, at least 1, shape (b,).
        gain: Sum of their gains, shape (b,).
        before: Relevant items of the same request in better blocks, shape (b,).
        total: Relevant items of each request, ranked or not, shape (n,).
        ranked: Ranked items of each request, shape (n,).
        gains: Gains of all relevant items, by request, largest first, shape (sum of total,).
    """

    request: NDArray[np.int64]
    greater: NDArray[np.int64]
    tied: NDArray[np.int64]
    relevant: NDArray[np.int64]
    gain: NDArray[np.float64]
    before: NDArray[np.int64]
    total: NDArray[np.int64]
    ranked: NDArray[np.int64]
    gains: NDArray[np.float64]


def match_relevant(ranked: RequestItemValues, relevant: RequestItemValues, n: int) -> RelevantRanks:
    """Match ranked items with the relevant items.

    Args:
        ranked: Items with scores, higher is better. Fastest if sorted by request, best first.
        relevant: Relevant items with their gains, such as 1 each.
        n: Number of requests.

    Raises:
        LlmrecError: If a score is NaN.
        ValueError: If a request index is not below n, a request has duplicate items, or a gain is not above 0.
    """
    request, item, score, begins = _sort_by_request(ranked, n)
    goal_request, goal, gain, goal_begins = _sort_by_request(relevant, n)
    if gain.size and not (gain[-1] > 0 and np.isfinite(gain).all() and (gain > 0).all()):
        raise ValueError("the gain of a relevant item must be above 0; remove items without gain")
    hits = _find_relevant(request, item, begins, goal_request, goal, goal_begins)
    starts, sizes, block = _tie_blocks(request, score, hits)
    # The first relevant item of each block; blocks are in ascending order.
    first = np.flatnonzero(np.diff(block, prepend=-1))
    hit_blocks = block[first]
    hit_gains = _gains_of_hits(request, item, hits, goal_request, goal, gain)
    counts = np.diff(np.append(first, len(block)))
    owner = request[starts[hit_blocks]]
    per_request = np.bincount(owner, counts, minlength=n).astype(np.int64)
    running = np.cumsum(counts) - counts
    return RelevantRanks(
        request=owner,
        greater=starts[hit_blocks] - begins[owner],
        tied=sizes[hit_blocks],
        relevant=counts,
        gain=np.add.reduceat(hit_gains, first) if len(first) else np.empty(0),
        before=running - (np.cumsum(per_request) - per_request)[owner],
        total=np.diff(goal_begins),
        ranked=np.diff(begins),
        gains=gain,
    )


# --------------------------------------------------------------------------- helpers


def _sort_by_request(
    pairs: RequestItemValues, n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Sort the columns by request, largest value first, and return the start of each request, shape (n + 1,).

    Sorted columns are not copied.
    """
    request = np.asarray(pairs.request, dtype=np.int64)
    item = np.asarray(pairs.item, dtype=np.int64)
    value = np.asarray(pairs.value, dtype=np.float64)
    if not request.shape == item.shape == value.shape or request.ndim != 1:
        raise ValueError(f"columns must have the same shape (m,), not {request.shape}, {item.shape}, {value.shape}")
    # A NaN makes the sum NaN, but so do two infinities, hence the second check.
    with np.errstate(invalid="ignore"):
        total = value.sum()
    if np.isnan(total) and np.isnan(value).any():
        where = int(request[np.flatnonzero(np.isnan(value))[0]])
        raise LlmrecError(f"request at index {where}: a score is NaN, which cannot be ranked", kind="bad-value")
    later = request[1:] > request[:-1]
    if not (later | ((request[1:] == request[:-1]) & (value[1:] <= value[:-1]))).all():
        order = np.lexsort((-value, request))
        request, item, value = request[order], item[order], value[order]
    if request.size and (request[0] < 0 or request[-1] >= n or item.min() < 0):
        raise ValueError(f"request indices must be between 0 and {n - 1}, and item indices at least 0")
    return request, item, value, np.searchsorted(request, np.arange(n + 1))


def _find_relevant(
    request: NDArray[np.int64],
    item: NDArray[np.int64],
    begins: NDArray[np.int64],
    goal_request: NDArray[np.int64],
    goal: NDArray[np.int64],
    goal_begins: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the indices of ranked items that are relevant; duplicate items are rejected."""
    n = len(begins) - 1
    width = int(max(item.max(initial=0), goal.max(initial=0))) + 1
    step = max(1, _TABLE_BYTES // width)
    table = np.zeros(min(step, max(n, 1)) * width, dtype=bool)
    hits = []
    for start in range(0, n, step):
        rows = slice(begins[start], begins[min(n, start + step)])
        goals = slice(goal_begins[start], goal_begins[min(n, start + step)])
        keys = (request[rows] - start) * width + item[rows]
        goal_keys = (goal_request[goals] - start) * width + goal[goals]
        table[keys] = True
        if np.count_nonzero(table) != len(keys):
            raise ValueError("the ranking of a request has duplicate items")
        table[:] = False
        table[goal_keys] = True
        if np.count_nonzero(table) != len(goal_keys):
            raise ValueError("the relevant items of a request have duplicates")
        hits.append(np.flatnonzero(table[keys]) + begins[start])
        table[:] = False
    return np.concatenate(hits) if hits else np.empty(0, dtype=np.int64)


def _tie_blocks(
    request: NDArray[np.int64], score: NDArray[np.float64], hits: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the starts of blocks of equal scores, their sizes, and the block of each relevant item."""
    # If no relevant item is tied with a neighbour, each is a separate block, and other blocks do not matter.
    last = len(score) - 1
    above, below = np.maximum(hits - 1, 0), np.minimum(hits + 1, last)
    tied = ((above < hits) & (score[above] == score[hits]) & (request[above] == request[hits])) | (
        (below > hits) & (score[below] == score[hits]) & (request[below] == request[hits])
    )
    if not tied.any():
        return hits, np.ones_like(hits), np.arange(len(hits))
    new = np.concatenate([[True], (score[1:] != score[:-1]) | (request[1:] != request[:-1])])
    starts = np.flatnonzero(new)
    return starts, np.diff(np.append(starts, len(score))), (np.cumsum(new) - 1)[hits]


def _gains_of_hits(
    request: NDArray[np.int64],
    item: NDArray[np.int64],
    hits: NDArray[np.int64],
    goal_request: NDArray[np.int64],
    goal: NDArray[np.int64],
    gain: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the gain of each ranked relevant item."""
    if not len(gain) or (gain == gain[0]).all():
        return np.full(len(hits), gain[0] if len(gain) else 0.0)
    width = int(max(item.max(initial=0), goal.max(initial=0))) + 1
    goals = goal_request * width + goal
    order = np.argsort(goals)
    return np.asarray(gain[order][np.searchsorted(goals[order], request[hits] * width + item[hits])])


def hit_rate(judged: RelevantRanks, k: int) -> NDArray[np.float64]:
    """Compute HR@k (success at k): the probability that at least one relevant item is among the first k.

    If rank k is within a block, ``m`` of its ``tied`` items are among the first k; none of these is relevant with the
    hypergeometric probability ``C(tied - relevant, m) / C(tied, m)``.

    Returns:
        Values in [0, 1], shape (n,).
    """
    at = _blocks_within(judged, k)
    tied, relevant = judged.tied[at], judged.relevant[at]
    shown = np.minimum(k - judged.greater[at], tied)
    rest = tied - relevant
    possible = shown <= rest
    missed = np.zeros(len(at))
    some = np.flatnonzero(possible)
    m = shown[some]
    missed[some] = np.exp(_log_choose(rest[some], m) - _log_choose(tied[some], m))
    # Rank k is within at most one block, so the blocks of a request are independent.
    values = np.ones(len(judged.total))
    np.multiply.at(values, judged.request[at], missed)
    return np.clip(1.0 - values, 0.0, 1.0)


def recall(judged: RelevantRanks, k: int) -> NDArray[np.float64]:
    """Compute Recall@k: expected number of relevant items among the first k, over all relevant items.

    Returns:
        Values in [0, 1], shape (n,); 0 for a request without relevant items.
    """
    return _share_of_relevant(_expected_hits(judged, k), judged)


def precision(judged: RelevantRanks, k: int) -> NDArray[np.float64]:
    """Compute Precision@k: expected number of relevant items among the first k, divided by k.

    Returns:
        Values in [0, 1], shape (n,).
    """
    return np.clip(_expected_hits(judged, k) / k, 0.0, 1.0)


def ndcg(judged: RelevantRanks, k: int) -> NDArray[np.float64]:
    """Compute NDCG@k with binary or graded gains (Järvelin and Kekäläinen, TOIS 2002).

    ``DCG = sum of gain / log2(rank + 1)`` over ranks up to k, linear in the gain as in trec_eval; use gains
    ``2**grade - 1`` for the exponential form. An item of a tied block has the mean discount of the block's ranks. The
    ideal list has all relevant items, largest gain first, cut at k.

    Returns:
        Values in [0, 1], shape (n,); 0 for a request without relevant items.
    """
    at = _blocks_within(judged, k)
    greater, tied = judged.greater[at], judged.tied[at]
    discounts = 1.0 / np.log2(np.arange(1, k + 1) + 1)
    sums = np.concatenate([[0.0], np.cumsum(discounts)])
    dcg = _sum_by_request(judged, at, judged.gain[at] / tied * (sums[np.minimum(greater + tied, k)] - sums[greater]))
    # The largest gains of each request, as a table of shape (n, k).
    deep = min(k, int(judged.total.max(initial=0)))
    indices = (np.cumsum(judged.total) - judged.total)[:, None] + np.arange(deep)
    valid = np.arange(deep) < judged.total[:, None]
    best = np.where(valid, judged.gains[np.where(valid, indices, 0)], 0.0) if deep else np.zeros((len(judged.total), 0))
    ideal = best @ discounts[:deep]
    values: NDArray[np.float64] = np.divide(dcg, ideal, out=np.zeros_like(dcg), where=ideal > 0)
    return np.clip(values, 0.0, 1.0)


def average_precision(judged: RelevantRanks, k: int | None = None) -> NDArray[np.float64]:
    """Compute average precision (its mean is MAP): the mean of the precision at each relevant item's rank.

    For rank ``greater + i`` of a block with ``before`` relevant items above it, an item is relevant with probability
    ``relevant / tied``, and then ``before + 1 + (i - 1) (relevant - 1) / (tied - 1)`` relevant items are expected up to
    it (McSherry and Najork 2008). Summed over i this is a difference of harmonic numbers.

    Args:
        judged: See `match_relevant`.
        k: Cut-off; None: none. The denominator is the number of relevant items in both cases.

    Returns:
        Values in [0, 1], shape (n,); 0 for a request without relevant items.
    """
    last = int((judged.greater + judged.tied).max(initial=1)) if k is None else k
    at = _blocks_within(judged, last)
    greater, tied, relevant, before = judged.greater[at], judged.tied[at], judged.relevant[at], judged.before[at]
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, last + 1))])
    end = np.minimum(greater + tied, last)
    slope = (relevant - 1) / np.maximum(tied - 1, 1)
    # (before + 1 + (i - 1) slope) / (greater + i) = slope + (before + 1 - slope (greater + 1)) / (greater + i)
    inner = slope * (end - greater) + (before + 1 - slope * (greater + 1)) * (harmonic[end] - harmonic[greater])
    return _share_of_relevant(_sum_by_request(judged, at, relevant / tied * inner), judged)


def reciprocal_rank(judged: RelevantRanks, k: int | None = None) -> NDArray[np.float64]:
    """Compute the reciprocal rank of the first relevant item; its mean is MRR.

    The first relevant item is in the best block that contains one. Its position j in that block has the probability
    ``C(tied - j, relevant - 1) / C(tied, relevant)``; the sum over j is computed once for each kind of block.

    Args:
        judged: See `match_relevant`.
        k: Cut-off; None: none.

    Returns:
        Values in [0, 1], shape (n,).
    """
    if k is not None:
        _validated_cutoff(k)
    first = np.flatnonzero(judged.before == 0)
    columns = np.stack([judged.greater[first], judged.tied[first], judged.relevant[first]], axis=1)
    item = np.zeros(len(first))
    alone = columns[:, 1] == 1
    item[alone] = np.where(columns[alone, 0] < (np.inf if k is None else k), 1.0 / (columns[alone, 0] + 1), 0.0)
    kinds, which = np.unique(columns[~alone], axis=0, return_inverse=True)
    shared = np.array([_block_reciprocal_rank(int(g), int(t), int(r), k) for g, t, r in kinds], dtype=np.float64)
    item[~alone] = shared[which.ravel()]
    values = np.zeros(len(judged.total))
    values[judged.request[first]] = item
    return values


# --------------------------------------------------------------------------- helpers


def _validated_cutoff(k: int) -> int:
    if k < 1:
        raise ValueError(f"a cut-off must be at least 1, not {k}")
    return k


def _blocks_within(judged: RelevantRanks, k: int) -> NDArray[np.int64]:
    """Return the blocks of equal scores that start within the first k ranks."""
    return np.flatnonzero(judged.greater < _validated_cutoff(k))


def _expected_hits(judged: RelevantRanks, k: int) -> NDArray[np.float64]:
    """Return the expected number of relevant items among the first k, shape (n,)."""
    at = _blocks_within(judged, k)
    tied = judged.tied[at]
    return _sum_by_request(judged, at, judged.relevant[at] * (np.minimum(k - judged.greater[at], tied) / tied))


def _sum_by_request(judged: RelevantRanks, at: NDArray[np.int64], of_block: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum values over the given blocks of each request, shape (n,)."""
    return np.bincount(judged.request[at], of_block, minlength=len(judged.total)).astype(np.float64)


def _share_of_relevant(sums: NDArray[np.float64], judged: RelevantRanks) -> NDArray[np.float64]:
    """Divide by the number of relevant items; 0 if there are none."""
    share: NDArray[np.float64] = np.clip(sums / np.maximum(judged.total, 1), 0.0, 1.0)
    return share


def _log_choose(n: NDArray[np.int64], m: NDArray[np.int64]) -> NDArray[np.float64]:
    logs: NDArray[np.float64] = gammaln(n + 1.0) - gammaln(m + 1.0) - gammaln(n - m + 1.0)
    return logs


def _block_reciprocal_rank(greater: int, tied: int, relevant: int, k: int | None) -> float:
    """Return the expected reciprocal rank of the first relevant item in a block of equal scores."""
    positions = np.arange(1, tied - relevant + 2)
    if k is not None:
        positions = positions[positions <= k - greater]
    # p(1) = relevant / tied; p(j + 1) / p(j) = (tied - j - relevant + 1) / (tied - j)
    steps = positions[:-1]
    ratios = (tied - steps - relevant + 1) / np.maximum(tied - steps, 1)
    probability = relevant / tied * np.concatenate([[1.0], np.cumprod(ratios)])[: len(positions)]
    return float(np.sum(probability / (greater + positions)))
