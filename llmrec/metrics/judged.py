"""Matches rankings with their relevant items: what the metrics of `llmrec.metrics.multi_target` are taken of.

A ranking is cut into blocks of equal scores. Every order of a block is equally likely, so that each of its ``tied``
items is equally likely at each of the ranks ``greater + 1 .. greater + tied``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.errors import LlmrecError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# Bytes of the table in which pairs are looked up, for as many requests at a time as it holds: it stays in the cache.
_TABLE = 1 << 18


@dataclass(frozen=True, slots=True)
class Pairs:
    """A flat table of (request, item, value), in any order.

    Attributes:
        request: Number of the request, from 0, shape (m,).
        item: Number of the item, from 0, shape (m,).
        value: The item's score in a ranking, or its gain among relevant items, shape (m,).
    """

    request: NDArray[np.int64]
    item: NDArray[np.int64]
    value: NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Judged:
    """Where the relevant items of n requests stand: one entry a block of equal scores that holds any.

    Attributes:
        request: Number of the block's request, shape (b,), not decreasing; blocks of a request stand best first.
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


def judge(ranked: Pairs, relevant: Pairs, n: int) -> Judged:
    """Match rankings with the relevant items.

    Args:
        ranked: Items with scores, higher is better. Quickest where requests stand together, best first.
        relevant: Relevant items with their gains, such as 1 each.
        n: Number of requests.

    Raises:
        LlmrecError: If a score is NaN.
        ValueError: If a request number is not below n, an item stands twice in a request, or a gain is not above 0.
    """
    request, item, score, begins = _sorted(ranked, n)
    wanted, goal, gain, goal_begins = _sorted(relevant, n)
    if gain.size and not (gain[-1] > 0 and np.isfinite(gain).all() and (gain > 0).all()):
        raise ValueError("the gain of a relevant item must be above 0; leave out items that are not relevant")
    hits = _matches(request, item, begins, wanted, goal, goal_begins)
    starts, sizes, block = _blocks(request, score, hits)
    first = _changes(block)
    own = block[first]
    earned = _gains(request, item, hits, wanted, goal, gain)
    each = np.diff(np.append(first, len(block)))
    of = request[starts[own]]
    per_request = np.bincount(of, each, minlength=n).astype(np.int64)
    running = np.cumsum(each) - each
    return Judged(
        request=of,
        greater=starts[own] - begins[of],
        tied=sizes[own],
        relevant=each,
        gain=np.add.reduceat(earned, first) if len(first) else np.empty(0),
        before=running - (np.cumsum(per_request) - per_request)[of],
        total=np.diff(goal_begins),
        ranked=np.diff(begins),
        gains=gain,
    )


def place(ranked: Pairs, targets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the one target of each request: what the metrics of `llmrec.metrics.ranking` are taken of.

    Args:
        ranked: See `judge`.
        targets: Item number of each request's target, shape (n,).

    Returns:
        ``greater`` and ``tied``, shape (n,): items with a higher score than the target, and with its score, the target
        included; a target that is not ranked has 0 tied.

    Raises:
        LlmrecError: If a score is NaN.
        ValueError: If a request number is not below n, or a target stands twice in its ranking.
    """
    n = len(targets)
    request, item, score, begins = _sorted(ranked, n)
    hits = np.flatnonzero(item == np.repeat(targets, np.diff(begins)))
    owner = request[hits]
    if (owner[1:] == owner[:-1]).any():
        raise ValueError("an item stands twice in the ranking of a request")
    starts, sizes, block = _blocks(request, score, hits)
    greater, tied = np.diff(begins), np.zeros(n, dtype=np.int64)
    greater[owner], tied[owner] = starts[block] - begins[owner], sizes[block]
    return greater, tied


def numbered(ids: ArrayLike, known: ArrayLike) -> NDArray[np.int64]:
    """Replace ids by their places in a sorted list of ids; quickest where equal ids stand together.

    Args:
        ids: Such as the user of every row, shape (m,).
        known: Sorted different ids, which hold all of them.

    Raises:
        ValueError: If an id is not among the known ones.
    """
    values, among = np.asarray(ids), np.asarray(known)
    starts = _changes(values)
    if not len(starts):
        return np.empty(0, dtype=np.int64)
    places = np.searchsorted(among, values[starts])
    if not len(among) or (among[np.minimum(places, len(among) - 1)] != values[starts]).any():
        raise ValueError("an id is not among the known ones")
    return np.repeat(places, np.diff(np.append(starts, len(values)))).astype(np.int64, copy=False)


# --------------------------------------------------------------------------- parts


def _sorted(
    pairs: Pairs, n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Return the columns by request, largest value first, and where each request begins, shape (n + 1,).

    Columns that are sorted already are not moved.
    """
    request = np.asarray(pairs.request, dtype=np.int64)
    item = np.asarray(pairs.item, dtype=np.int64)
    value = np.asarray(pairs.value, dtype=np.float64)
    if not request.shape == item.shape == value.shape or request.ndim != 1:
        raise ValueError(f"columns must be flat and alike, not of shapes {request.shape}, {item.shape}, {value.shape}")
    # One NaN makes a sum NaN; so do two infinities, hence the second look.
    with np.errstate(invalid="ignore"):
        total = value.sum()
    if np.isnan(total) and np.isnan(value).any():
        where = int(request[np.flatnonzero(np.isnan(value))[0]])
        raise LlmrecError(f"request number {where}: a score is not a number, so it has no rank", kind="bad-value")
    later = request[1:] > request[:-1]
    if not (later | ((request[1:] == request[:-1]) & (value[1:] <= value[:-1]))).all():
        order = np.lexsort((-value, request))
        request, item, value = request[order], item[order], value[order]
    if request.size and (request[0] < 0 or request[-1] >= n or item.min() < 0):
        raise ValueError(f"requests must be numbered from 0 to {n - 1}, and items from 0")
    return request, item, value, np.searchsorted(request, np.arange(n + 1))


def _matches(
    request: NDArray[np.int64],
    item: NDArray[np.int64],
    begins: NDArray[np.int64],
    wanted: NDArray[np.int64],
    goal: NDArray[np.int64],
    goal_begins: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the rows of the ranking that are relevant, and refuse doubled items."""
    n = len(begins) - 1
    width = int(max(item.max(initial=0), goal.max(initial=0))) + 1
    step = max(1, _TABLE // width)
    table = np.zeros(min(step, max(n, 1)) * width, dtype=bool)
    hits = []
    for start in range(0, n, step):
        own = slice(begins[start], begins[min(n, start + step)])
        goals = slice(goal_begins[start], goal_begins[min(n, start + step)])
        keys = (request[own] - start) * width + item[own]
        wished = (wanted[goals] - start) * width + goal[goals]
        table[keys] = True
        if np.count_nonzero(table) != len(keys):
            raise ValueError("an item stands twice in the ranking of a request")
        table[:] = False
        table[wished] = True
        if np.count_nonzero(table) != len(wished):
            raise ValueError("an item stands twice among the relevant items of a request")
        hits.append(np.flatnonzero(table[keys]) + begins[start])
        table[:] = False
    return np.concatenate(hits) if hits else np.empty(0, dtype=np.int64)


def _changes(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return where a run of equal values begins."""
    return np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[: len(values)])


def _blocks(
    request: NDArray[np.int64], score: NDArray[np.float64], hits: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return where blocks of equal scores begin, their sizes, and the block of each hit."""
    # Where no hit has an equal neighbour, every hit is a block of its own, and no other block matters.
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


def _gains(
    request: NDArray[np.int64],
    item: NDArray[np.int64],
    hits: NDArray[np.int64],
    wanted: NDArray[np.int64],
    goal: NDArray[np.int64],
    gain: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the gain of each hit."""
    if not len(gain) or (gain == gain[0]).all():
        return np.full(len(hits), gain[0] if len(gain) else 0.0)
    width = int(max(item.max(initial=0), goal.max(initial=0))) + 1
    goals = wanted * width + goal
    order = np.argsort(goals)
    return np.asarray(gain[order][np.searchsorted(goals[order], request[hits] * width + item[hits])])
