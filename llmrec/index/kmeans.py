"""Residual k-means: each level clusters what the levels before left over, in clusters of bounded size if asked.

An item's code has one number a level, and the sum of the centroids it names approximates its vector. Clusters of
bounded size use the vocabulary more fully; OneRec (arXiv 2502.18965, section 3.1) balances its levels for that reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_BLOCK = 2048
# Vectors among which the first centroids are drawn, a centroid.
_SAMPLE = 16
# Bound of the first step, in multiples of an even share, and the steps after which it is seen whether it helped.
_OPENING, _OPENING_STEPS = 1.2, 5
# Bids rise by this share of the mean cost, and an assignment costs at most that much more than the best one.
_BID = 1e-3
# In multiples of the range of costs; smaller ones are lost to rounding.
_LEAST_BID = 1e-5
# Rounds of bidding after which bids grow, and by how much in each further round.
_PATIENCE, _GROWTH = 30, 1.05


@dataclass(frozen=True)
class Clusters:
    """Centroids of shape (k, d), and the number of each vector's, shape (n,)."""

    centroids: Floats
    codes: Ints


@dataclass(frozen=True)
class Quantised:
    """Codes of shape (n, levels), and codebooks of shape (levels, k, d)."""

    codes: Ints
    codebooks: Floats


def residual_kmeans(
    x: Floats, levels: int, k: int, *, balance: float = 0.0, seed: int = 0, iterations: int = 25
) -> Quantised:
    """Quantise vectors level by level.

    Args:
        x: Vectors, shape (n, d), at least one.
        levels: Numbers in a code.
        k: Codes of a level; there may be more than vectors.
        balance: Most vectors of a code, in multiples of n / k and at least 1; 0: no bound.
        seed: Of the first centroids.
        iterations: Most steps of Lloyd's algorithm a level.
    """
    rest, found = np.array(x, np.float32, order="C"), []
    for level in range(levels):
        most = math.ceil(balance * len(x) / k)
        found.append(kmeans(rest, k, most=most, seed=(seed, level), iterations=iterations))
        rest -= found[-1].centroids[found[-1].codes]
    return Quantised(np.stack([c.codes for c in found], axis=1), np.stack([c.centroids for c in found]))


def nearest(x: Floats, codebooks: Floats) -> Ints:
    """Return the codes of vectors, shape (n, levels): the nearest centroid of each level, ties by number."""
    rest, codes = np.array(x, np.float32, order="C"), np.empty((len(x), len(codebooks)), np.int64)
    for level, centroids in enumerate(codebooks):
        codes[:, level], _ = _assigned(rest, centroids)
        rest -= centroids[codes[:, level]]
    return codes


def reconstructed(codes: Ints, codebooks: Floats) -> Floats:
    """Return the sum of the centroids that codes name, shape (n, d)."""
    total = np.zeros((len(codes), codebooks.shape[2]), np.float32)
    for level, centroids in enumerate(codebooks):
        total += centroids[codes[:, level]]
    return total


def perplexity(codes: Ints, k: int) -> float:
    """Return the exponential of the entropy of codes: how many of k equally used ones they are worth."""
    share = np.bincount(codes, minlength=k) / len(codes)
    used = share[share > 0]
    return float(np.exp(-(used * np.log(used)).sum()))


def kmeans(x: Floats, k: int, *, most: int = 0, seed: int | Sequence[int] = 0, iterations: int = 25) -> Clusters:
    """Cluster vectors by Lloyd's algorithm from greedy k-means++; the same seed gives the same clusters.

    A bound is kept in the last third of the iterations only: without it they are cheaper, and end near the same place.
    With it, the distances of all vectors to all centroids are held at once: 4 n k bytes.

    Args:
        x: Vectors, shape (n, d).
        k: Clusters; some stay empty where there are fewer different vectors.
        most: Most vectors of a cluster, with ``most * k >= n``; 0: no bound.
        seed: Of the first centroids.
        iterations: Most steps.
    """
    centroids = _opened(x, _first(x, k, np.random.default_rng(seed)))
    bounded_steps = iterations // 3 if most else 0
    centroids, _ = _lloyd(x, centroids, 0, iterations - bounded_steps - _OPENING_STEPS)
    centroids, _ = _lloyd(x, centroids, most, bounded_steps)
    return Clusters(centroids, _assigned(x, centroids, most)[0])


def _lloyd(x: Floats, centroids: Floats, most: int, steps: int) -> tuple[Floats, float]:
    """Return centroids after some steps, fewer if they settle, and the total cost in the last one."""
    before, total = np.full(len(x), -1), math.inf
    for _ in range(steps):
        codes, cost = _assigned(x, centroids, most)
        total = float(cost.sum(dtype=np.float64))
        if np.array_equal(codes, before):
            break
        centroids, before = _means(x, codes, cost, centroids), codes
    return centroids, total


def _opened(x: Floats, first: Floats) -> Floats:
    """Return centroids some steps on, of which the first was free or kept clusters near one size: what ends better.

    Residuals lie around zero in all directions: left free, one centroid in the middle may take most of them and keep
    them, while others hold a few far ones. A single step with a tight bound cuts the middle in pieces, and free steps
    do not put it together again.
    """
    found = []
    for most in (0, math.ceil(_OPENING * len(x) / len(first))):
        centroids, _ = _lloyd(x, first, most, 1)
        centroids, cost = _lloyd(x, centroids, 0, _OPENING_STEPS - 1)
        found.append((cost, most, centroids))
    return min(found, key=lambda entry: entry[:2])[2]


def _first(x: Floats, k: int, rng: np.random.Generator) -> Floats:
    """Greedy k-means++ (Arthur and Vassilvitskii, SODA 2007, section 3): of a few draws the one that helps most."""
    if len(x) > _SAMPLE * k:
        x = x[np.sort(rng.choice(len(x), _SAMPLE * k, replace=False))]
    norms, trials = np.einsum("ij,ij->i", x, x), 2 + int(math.log(k))
    chosen = [int(rng.integers(len(x)))]
    cost = _distances(x, norms, chosen)[0]
    while len(chosen) < k:
        steps = np.cumsum(cost, dtype=np.float64)
        if steps[-1] <= 0:
            # No vector is left that is not a centroid: any repetition is as good.
            chosen += [chosen[0]] * (k - len(chosen))
            break
        drawn = np.searchsorted(steps, rng.random(trials) * steps[-1], side="right").clip(max=len(x) - 1)
        costs = np.minimum(cost, _distances(x, norms, drawn))
        best = int(costs.sum(axis=1, dtype=np.float64).argmin())
        cost = costs[best]
        chosen.append(int(drawn[best]))
    return x[chosen]


def _distances(x: Floats, norms: Floats, of: list[int] | Ints) -> Floats:
    found = norms[None, :] + norms[of, None] - 2 * (x[of] @ x.T)
    # What rounding leaves between equal vectors would be drawn again and again.
    found[found < 1e-6 * (norms[of, None] + norms[None, :])] = 0
    return found


def _assigned(x: Floats, centroids: Floats, most: int = 0) -> tuple[Ints, Floats]:
    """Return the code of each vector, nearest or within the bound, and its squared distance from that centroid."""
    codes, part = np.empty(len(x), np.int64), np.empty(len(x), np.float32)
    table = np.empty((len(x) if most else 0, len(centroids)), np.float32)
    offset, turned = np.einsum("ij,ij->i", centroids, centroids), np.ascontiguousarray(-2 * centroids.T)
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        # Without the vector's own norm, which is the same for all centroids.
        costs = np.matmul(x[rows], turned, out=table[rows] if most else None)
        costs += offset
        codes[rows] = costs.argmin(axis=1)
        part[rows] = costs[np.arange(len(costs)), codes[rows]]
    norms = np.einsum("ij,ij->i", x, x)
    if most and np.bincount(codes).max() > most:
        codes = bounded(table, most, bid=_BID * float(np.maximum(part + norms, 0).mean()))
        part = table[np.arange(len(x)), codes]
    return codes, np.maximum(part + norms, 0)


def bounded(costs: Floats, most: int, *, bid: float = 0.0) -> Ints:
    """Give each row a column, none more than ``most`` times, at nearly the least total cost.

    Bertsekas' auction (Annals of Operations Research 14, 1988) with all of a column's rows at once: a column that too
    many rows want raises its price until only ``most`` of them still want it. The mean cost is at most one bid above
    the least possible; bids grow where prices have not settled after some rounds. Ties fall by row.

    Args:
        costs: Shape (n, k).
        most: Rows of a column; ``most * k >= n``.
        bid: Least rise of a price; 0: a thousandth of the range of costs.
    """
    k, spread = costs.shape[1], float(np.ptp(costs)) or 1.0
    bid = max(bid or _BID * spread, _LEAST_BID * spread)
    prices, rounds = np.zeros(k, np.float32), 0
    codes: Ints = costs.argmin(axis=1)
    while (over := np.bincount(codes, minlength=k) > most).any():
        rows = np.flatnonzero(over[codes])
        own, place = codes[rows], np.arange(len(rows))
        offers = costs[rows] + prices
        kept = offers[place, own]
        offers[place, own] = np.inf
        # What a row would lose by its next best column: those with the least to lose leave.
        margin = np.maximum(offers.min(axis=1) - kept, 0)
        order = np.lexsort((rows, -margin, own))
        leaving = order[place - np.searchsorted(own[order], own[order]) >= most]
        rise = np.zeros(k, np.float32)
        np.maximum.at(rise, own[leaving], margin[leaving])
        prices[over] += rise[over] + np.float32(bid)
        codes[rows[leaving]] = (costs[rows[leaving]] + prices).argmin(axis=1)
        rounds += 1
        if rounds > _PATIENCE:
            bid = min(bid * _GROWTH, spread)
    return codes


def _means(x: Floats, codes: Ints, cost: Floats, before: Floats) -> Floats:
    """Return the means of clusters; empty ones move to the vectors that are farthest from their centroids."""
    counts = np.bincount(codes, minlength=len(before))
    member = csr_array((np.ones(len(x), np.float32), codes, np.arange(len(x) + 1)), shape=(len(x), len(before)))
    centroids: Floats = np.asarray(member.T.tocsr() @ x)
    centroids /= np.maximum(counts, 1)[:, None]
    empty = np.flatnonzero(counts == 0)
    far = np.argsort(-cost, kind="stable")[: len(empty)] if len(empty) else empty
    far = far[cost[far] > 0]
    centroids[empty] = before[empty]
    centroids[empty[: len(far)]] = x[far]
    return centroids
