from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.metrics import beyond

LISTS = np.array([[0, 1, 2], [0, 1, -1], [0, 3, 1]])


# ------------------------------------------------------------------ worked by hand


def test_coverage_and_exposure() -> None:
    assert beyond.exposure(LISTS, 3, 6).tolist() == [3, 3, 1, 1, 0, 0]
    assert beyond.coverage(LISTS, 3, 6) == pytest.approx(4 / 6)
    assert beyond.coverage(LISTS, 1, 6) == pytest.approx(1 / 6)


def test_exposure_of_cold_items() -> None:
    lists, counts = np.array([[0, 4, 5], [4, -1, -1], [0, 1, 2]]), [3, 1, 1, 1, 0, 0, 0]
    assert beyond.cold_exposure(lists, 3, counts).tolist() == pytest.approx([2 / 3, 1, 0])
    assert beyond.cold_exposure(lists, 1, counts).tolist() == [0, 1, 0]
    assert (beyond.cold_shown(lists, 3, counts), beyond.cold_shown(lists, 1, counts)) == (2, 1)


def test_gini() -> None:
    assert beyond.gini(np.array([[0], [1], [2]]), 1, 3) == pytest.approx(0.0)
    assert beyond.gini(np.array([[1], [1]]), 1, 4) == pytest.approx(1.0)
    # Exposures 0, 1, 3: (-2 * 0 + 0 * 1 + 2 * 3) / (2 * 4).
    assert beyond.gini(np.array([[2], [2], [2], [1]]), 1, 3) == pytest.approx(0.75)
    assert beyond.gini(np.array([[0]]), 1, 1) == 0.0
    with pytest.raises(ValueError, match="empty lists"):
        beyond.gini(np.array([[-1]]), 1, 3)


def test_novelty_in_bits() -> None:
    counts = [8, 2, 1, 0]
    result = beyond.novelty(LISTS, 3, counts, 8)
    assert result.tolist() == pytest.approx([(0 + 2 + 3) / 3, (0 + 2) / 2, (0 + 3 + 2) / 3])
    assert beyond.novelty(np.array([[-1]]), 1, counts, 8).tolist() == [0.0]


def test_popularity_and_its_lift() -> None:
    counts = [8, 2, 1, 0]
    lists = beyond.popularity(LISTS, 2, counts, 8)
    assert lists.tolist() == pytest.approx([5 / 8, 5 / 8, 4 / 8])
    for of_lists, before, lift in ((lists, [0.25] * 3, (7 / 12 - 0.25) / 0.25), ([0.5, 0.1], [0.5, 0.1], 0.0)):
        everyone = np.arange(len(before))[None, :]
        assert beyond.popularity_lift_statistic(of_lists, before)(everyone).tolist() == pytest.approx([lift])
    statistic = beyond.popularity_lift_statistic([0.5, 0.2], [0.1, 0.2])
    assert statistic(np.array([[0, 0], [1, 1]])).tolist() == pytest.approx([4.0, 0.0])
    with pytest.raises(ValueError, match="popularity lift is undefined"):
        beyond.popularity_lift_statistic([0.5], [0.0])
    with pytest.raises(ValueError, match="same shape"):
        beyond.popularity_lift_statistic([0.5], [0.5, 0.1])


def test_diversity_by_vectors() -> None:
    vectors = [[1, 0], [0, 2], [3, 3], [0, 0]]
    result = beyond.diversity_by_vectors(LISTS, 3, vectors)
    half = 1 - 1 / math.sqrt(2)
    # Pairs of [0, 1, 2]: orthogonal, half, half; of [0, 1]: orthogonal; of [0, 3, 1], where 3 is a zero vector: all 1.
    assert result.tolist() == pytest.approx([(1 + half + half) / 3, 1.0, 1.0])
    assert beyond.diversity_by_vectors(LISTS, 1, vectors).tolist() == [0.0] * 3
    assert beyond.diversity_by_vectors([[0, 1]], 2, [[1, 0], [-1, 0]]).tolist() == pytest.approx([2.0])


def test_diversity_by_fields() -> None:
    fields = [frozenset({"drama", "war"}), frozenset({"drama"}), frozenset({"comedy"}), frozenset()]
    result = beyond.diversity_by_fields(LISTS, 3, fields)
    assert result.tolist() == pytest.approx([(0.5 + 1 + 1) / 3, 0.5, (1 + 0.5 + 1) / 3])
    assert beyond.diversity_by_fields(np.array([[3, 3]]), 2, fields).tolist() == [1.0]


def test_serendipity() -> None:
    expected = np.array([[0, 9, 9], [0, 1, 9], [0, 9, 9]])
    # Relevant and unexpected: item 1 of the first list; none of the second; 3 of the third at rank 2.
    result = beyond.serendipity(LISTS, 3, expected, [1, 1, 3])
    assert result.tolist() == pytest.approx([1 / 3, 0.0, 1 / 3])
    assert beyond.serendipity(LISTS, 1, expected, [1, 1, 3]).tolist() == [0.0, 0.0, 0.0]
    several = beyond.serendipity(LISTS, 3, expected, [[1, 2], [-1, -1], [0, -1]])
    assert several.tolist() == pytest.approx([2 / 3, 0.0, 0.0])
    with pytest.raises(ValueError, match="popularity lists"):
        beyond.serendipity(LISTS, 3, expected[:1], [1, 1, 3])


def test_rejects_malformed_lists() -> None:
    with pytest.raises(ValueError, match="integers"):
        beyond.coverage(np.array([[0.5]]), 1, 3)
    with pytest.raises(ValueError, match="cut-off 4"):
        beyond.coverage(LISTS, 4, 9)
    with pytest.raises(ValueError, match="between -1 and 2"):
        beyond.coverage(LISTS, 3, 3)


# ------------------------------------------------------------------ properties

_LISTS = st.integers(1, 5).flatmap(
    lambda k: st.lists(st.permutations(range(8)).map(lambda order: order[:k]), min_size=1, max_size=8)
)


@given(lists=_LISTS, seed=st.integers(0, 99), gone=st.booleans())
def test_equals_slow_loops(lists: list[list[int]], seed: int, gone: bool) -> None:
    rng = np.random.default_rng(seed)
    table = np.array(lists)
    if gone:
        table[0, -1] = -1
    k = table.shape[1]
    vectors = rng.normal(size=(8, 3))
    words = [frozenset(w for w in "abcdefghij" * 9 if rng.random() < 0.1) for _ in range(8)]
    by_vector, by_field = beyond.diversity_by_vectors(table, k, vectors), beyond.diversity_by_fields(table, k, words)
    counts = rng.integers(0, 9, 8)
    for row, one, other, new in zip(table, by_vector, by_field, beyond.novelty(table, k, counts, 9), strict=True):
        items = [item for item in row if item >= 0]
        pairs = list(itertools.combinations(items, 2))
        cosines = [vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b]) for a, b in pairs]
        shares = [len(words[a] & words[b]) / len(words[a] | words[b]) if words[a] | words[b] else 0 for a, b in pairs]
        assert one == pytest.approx(1 - np.mean(cosines) if pairs else 0.0, abs=1e-9)
        assert other == pytest.approx(1 - np.mean(shares) if pairs else 0.0, abs=1e-12)
        bits = [math.log2(9 / max(counts[item], 1)) for item in items]
        assert new == pytest.approx(np.mean(bits) if bits else 0.0)


def test_fields_with_more_than_64_words() -> None:
    fields = [frozenset(f"w{n}" for n in range(start, start + 100)) for start in (0, 50, 200)]
    assert beyond.diversity_by_fields(np.array([[0, 1], [0, 2]]), 2, fields).tolist() == pytest.approx(
        [1 - 50 / 150, 1]
    )
