"""Beyond-accuracy metrics of lists: coverage, novelty, concentration, popularity, cold start, diversity, serendipity.

Lists are integer arrays of shape (n, k): item indices from 0, best first, padded with -1. Ties must already be broken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.metrics.stats import MetricValues, sums_by_user

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from llmrec.metrics.stats import Statistic

    Lists = NDArray[np.integer[Any]]

# Number of item vector components per block: 32 MB of float64.
_CELLS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemContents:
    """Item contents on which diversity is computed: words or vectors.

    Attributes:
        words: Words of each item, such as its genres.
        vectors: A vector of each item, shape (items, d), instead of words.
        source: The item field of the words, or the encoder of the vectors.
    """

    words: Sequence[frozenset[str]] | None = None
    vectors: ArrayLike | None = None
    source: str


def coverage(lists: ArrayLike, k: int, items: int) -> float:
    """Coverage@k: the share of the catalogue in at least one list ("catalog coverage", Ge et al., RecSys 2010).

    It grows with the number of lists, so compare only over the same requests.

    Args:
        lists: See the module.
        k: Cut-off of the lists.
        items: Size of the catalogue.

    Returns:
        A value in [0, 1].
    """
    return float(np.count_nonzero(exposure(lists, k, items)) / items)


def exposure(lists: ArrayLike, k: int, items: int) -> NDArray[np.int64]:
    """Return the number of lists that contain each item, shape (items,)."""
    cut = _cut_lists(lists, k, items)
    return np.bincount(cut[cut >= 0], minlength=items)


def gini(lists: ArrayLike, k: int, items: int) -> float:
    """Gini@k: the inequality of item exposure, 0 for equal exposure and 1 for a single item.

    ``sum over j of (2 j - m - 1) x_j / ((m - 1) sum x)`` over the m items by increasing exposure x, including items
    that are never shown (Castells, Hurley and Vargas, "Novelty and Diversity in
    Recommender Systems", Recommender Systems Handbook, 2nd edition, 2015).

    Args:
        lists: See the module.
        k: Cut-off of the lists.
        items: Size of the catalogue.

    Returns:
        A value in [0, 1]; 0 for a catalogue of one item.

    Raises:
        ValueError: If all lists are empty.
    """
    shown = np.sort(exposure(lists, k, items)).astype(np.float64)
    if shown.sum() == 0:
        raise ValueError("the Gini coefficient is undefined for empty lists")
    if items == 1:
        return 0.0
    ranks = np.arange(1, items + 1)
    return float(np.sum((2 * ranks - items - 1) * shown) / ((items - 1) * shown.sum()))


def novelty(lists: ArrayLike, k: int, counts: ArrayLike, users: int) -> NDArray[np.float64]:
    """Novelty@k: mean self-information of a list's items in bits, shape (n,); 0 for an empty list.

    ``log2(users / count)``, where count is the number of training users of the item, at least 1 (Zhou et al., PNAS
    2010).

    Args:
        lists: See the module.
        k: Cut-off of the lists.
        counts: Training users of each item, shape (items,).
        users: Number of training users.
    """
    array = np.maximum(np.asarray(counts, dtype=np.float64), 1.0)
    return _mean_over_list(_cut_lists(lists, k, len(array)), np.log2(max(users, 1) / np.minimum(array, max(users, 1))))


def popularity(lists: ArrayLike, k: int, counts: ArrayLike, users: int) -> NDArray[np.float64]:
    """Return the mean popularity of the items in a list, as shares of training users, shape (n,)."""
    array = np.asarray(counts, dtype=np.float64)
    return _mean_over_list(_cut_lists(lists, k, len(array)), array / max(users, 1))


def cold_exposure(lists: ArrayLike, k: int, cold_counts: ArrayLike) -> NDArray[np.float64]:
    """Exposure@k: the share of items without training interactions in a list, shape (n,).

    The exposure of a group of items (Singh and Joachims, KDD 2018), here cold-start items, with equal weight for all
    positions.

    Args:
        lists: See the module.
        k: Cut-off of the lists.
        cold_counts: Training users of each item, shape (items,).
    """
    cold = np.asarray(cold_counts) == 0
    return _mean_over_list(_cut_lists(lists, k, len(cold)), cold.astype(np.float64))


def cold_shown(lists: ArrayLike, k: int, cold_counts: ArrayLike) -> int:
    """ColdItems@k: the number of different items without training interactions in at least one list."""
    cold = np.asarray(cold_counts) == 0
    return int(np.count_nonzero(exposure(lists, k, len(cold))[cold]))


def popularity_lift_statistic(of_lists: ArrayLike, of_histories: ArrayLike) -> Statistic:
    """Return PopularityLift@k as a function of resampled users, for `llmrec.metrics.stats.statistic_interval`.

    The relative difference in popularity of lists and histories: ``(mean of lists - mean of histories) / mean of
    histories`` over users, both as mean popularity of the items (Abdollahpouri et al., RecSys 2020, "The Connection
    Between Popularity Bias, Calibration, and Fairness"). It is 0 for lists as popular as the histories, 1 for twice as
    popular.

    Args:
        of_lists: Mean popularity of each user's list, shape (n,), see `popularity`.
        of_histories: Mean popularity of each user's history, shape (n,).

    Raises:
        ValueError: If the two differ in length or are empty, or if histories have no popularity.
    """
    after, before = np.asarray(of_lists, dtype=np.float64), np.asarray(of_histories, dtype=np.float64)
    if after.shape != before.shape or after.ndim != 1 or not after.size:
        raise ValueError(f"lists and histories must have the same shape (n,), not {after.shape} and {before.shape}")
    if before.sum() <= 0:
        raise ValueError("the histories contain no items with training users, so the popularity lift is undefined")

    def statistic(rows: NDArray[np.intp]) -> NDArray[np.float64]:
        base = before[rows].sum(axis=1)
        lift: NDArray[np.float64] = np.divide(after[rows].sum(axis=1), base, out=np.ones(len(rows)), where=base > 0)
        return lift - 1.0

    return statistic


def popularity_lift(
    lists: ArrayLike,
    k: int,
    counts: NDArray[np.float64],
    users: int,
    histories: Sequence[NDArray[np.int64]],
    owners: Sequence[str],
) -> MetricValues:
    """Compute PopularityLift@k over the users with a history; see `popularity_lift_statistic`.

    Args:
        lists: See the module.
        k: Cut-off of the lists.
        counts: Training users of each item, shape (items,).
        users: Number of training users.
        histories: Item indices of each request's history.
        owners: The user of each request; requests of a user are resampled together.
    """
    share = counts / max(users, 1)
    with_history = np.array([len(history) > 0 for history in histories])
    if not with_history.any() or not sum(float(share[history].sum()) for history in histories):
        return MetricValues(result=None, undefined="no history contains an item with training users")
    names = [owner for owner, kept in zip(owners, with_history, strict=True) if kept]
    before, _ = sums_by_user(np.array([share[history].mean() for history in histories if len(history)]), names)
    after, _ = sums_by_user(popularity(lists, k, counts, users)[with_history], names)
    return MetricValues(result=popularity_lift_statistic(after, before), users=names)


def diversity(lists: ArrayLike, k: int, contents: ItemContents) -> MetricValues:
    """Compute ILD@k from words or vectors of items; see `diversity_by_fields` and `diversity_by_vectors`."""
    if contents.words is not None:
        values, how = diversity_by_fields(lists, k, contents.words), f"jaccard-{contents.source}"
    else:
        assert contents.vectors is not None
        values, how = diversity_by_vectors(lists, k, contents.vectors), f"cosine-{contents.source}"
    return MetricValues(result=values, how=re.sub(r"[|\s]+", "-", how))


def diversity_by_vectors(lists: ArrayLike, k: int, vectors: ArrayLike) -> NDArray[np.float64]:
    """Compute ILD@k from vectors: the mean of ``1 - cosine`` over pairs of items in a list, shape (n,).

    Intra-list distance of Ziegler et al. (WWW 2005). An item with a zero vector has distance 1 to every other; a list
    with fewer than two items has diversity 0.

    Args:
        lists: See the module.
        k: Cut-off of the lists.
        vectors: One vector per item, shape (items, d).
    """
    table = np.asarray(vectors, dtype=np.float64)
    cut = _cut_lists(lists, k, len(table))
    lengths = np.linalg.norm(table, axis=1, keepdims=True)
    unit = np.divide(table, lengths, out=np.zeros_like(table), where=lengths > 0)
    known = (lengths[:, 0] > 0).astype(np.float64)
    similarity = np.empty(len(cut))
    step = max(1, _CELLS // max(1, cut.shape[1] * table.shape[1]))
    for start in range(0, len(cut), step):
        part = cut[start : start + step]
        valid = part >= 0
        # The squared length of a sum of unit vectors is their number plus twice the sum of the cosines of all pairs.
        total = np.einsum("nkd,nk->nd", unit[np.maximum(part, 0)], valid)
        squares = np.sum(known[np.maximum(part, 0)] * valid, axis=1)
        similarity[start : start + step] = (np.einsum("nd,nd->n", total, total) - squares) / 2
    return _mean_distance(similarity, cut)


def diversity_by_fields(lists: ArrayLike, k: int, fields: Sequence[frozenset[str]]) -> NDArray[np.float64]:
    """Compute ILD@k from fields: the mean of ``1 - Jaccard`` over pairs of items in a list, shape (n,).

    The Jaccard index of two items is the share of common words, such as genres. Items without words have distance 1 to
    every other; a list with fewer than two items has diversity 0.

    Args:
        lists: See the module.
        k: Cut-off of the lists.
        fields: The words of each item, in item order.
    """
    cut = _cut_lists(lists, k, len(fields))
    bits = _pack_words(fields)
    sizes = np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
    similarity = np.zeros(len(cut))
    step = max(1, _CELLS // max(1, bits.shape[1]))
    for one in range(cut.shape[1]):
        for other in range(one + 1, cut.shape[1]):
            for start in range(0, len(cut), step):
                part = cut[start : start + step]
                a, b = np.maximum(part[:, one], 0), np.maximum(part[:, other], 0)
                both = np.bitwise_count(bits[a] & bits[b]).sum(axis=1, dtype=np.int64)
                share = both / np.maximum(sizes[a] + sizes[b] - both, 1)
                similarity[start : start + step] += np.where((part[:, one] >= 0) & (part[:, other] >= 0), share, 0.0)
    return _mean_distance(similarity, cut)


def serendipity(lists: ArrayLike, k: int, expected: ArrayLike, targets: ArrayLike) -> NDArray[np.float64]:
    """Compute Serendipity@k: the share of a list that is relevant and unexpected, shape (n,).

    ``|(list without the expected list) and relevant| / k``, where the expected list has the first k items of a
    primitive recommender, such as popularity (Murakami et al., 2008; Ge et al., RecSys 2010). With one target per
    request it is at most 1 / k.

    Args:
        lists: See the module.
        k: Cut-off of both lists.
        expected: Lists of the primitive recommender, shape (n, at least k).
        targets: The held-out items, shape (n,) or, with -1 for none, (n, t).
    """
    ranked, usual = np.asarray(lists)[:, :k], np.asarray(expected)[:, :k]
    goal = np.asarray(targets).reshape(len(ranked), -1)
    if k < 1 or len(usual) != len(ranked):
        raise ValueError(f"serendipity@{k}: {len(ranked)} lists, but {len(usual)} popularity lists")
    hit = ((ranked[:, :, None] == goal[:, None, :]) & (goal[:, None, :] >= 0)).any(axis=2)
    known = (ranked[:, :, None] == usual[:, None, :]).any(axis=2)
    return np.asarray(np.sum(hit & ~known & (ranked >= 0), axis=1) / k, dtype=np.float64)


# --------------------------------------------------------------------------- helpers


def _cut_lists(lists: ArrayLike, k: int, items: int) -> Lists:
    table: Lists = np.asarray(lists)
    if table.ndim != 2 or (table.size and table.dtype.kind not in "iu"):
        raise ValueError(f"lists must be integers of shape (n, k), not {table.dtype} of shape {table.shape}")
    if not 1 <= k <= table.shape[1]:
        raise ValueError(f"the cut-off {k} exceeds lists of {table.shape[1]} items")
    if table.size and (int(table.min()) < -1 or int(table.max()) >= items):
        raise ValueError(f"item indices must be between -1 and {items - 1}")
    return table[:, :k]


def _mean_over_list(cut: Lists, of_item: NDArray[np.float64]) -> NDArray[np.float64]:
    valid = cut >= 0
    total = np.where(valid, of_item[np.maximum(cut, 0)], 0.0).sum(axis=1)
    return np.asarray(total / np.maximum(valid.sum(axis=1), 1), dtype=np.float64)


def _mean_distance(similarity: NDArray[np.float64], cut: Lists) -> NDArray[np.float64]:
    """Return mean distances, given sums of similarities over pairs."""
    size = np.sum(cut >= 0, axis=1)
    pairs = size * (size - 1) / 2
    return np.where(pairs > 0, np.clip(1.0 - similarity / np.maximum(pairs, 1), 0.0, 2.0), 0.0)


def _pack_words(fields: Sequence[frozenset[str]]) -> NDArray[np.uint64]:
    """Pack the words of each item into bits, shape (items, words / 64)."""
    words = {word: index for index, word in enumerate(sorted(set().union(*fields)))}
    bits = np.zeros((len(fields), max(1, -(-len(words) // 64))), dtype=np.uint64)
    for row, item_words in enumerate(fields):
        for word in item_words:
            index = words[word]
            bits[row, index // 64] |= np.uint64(1) << np.uint64(index % 64)
    return bits
