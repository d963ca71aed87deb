"""Residual k-means: planted clusters, brute force and bounds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from llmrec.index.diagnostics import perplexity
from llmrec.index.semantic import (
    Floats,
    assign_with_limit,
    kmeans,
    nearest_codes,
    reconstruct_vectors,
    residual_kmeans,
)


def mixture(
    groups: int, size: int, parts: int = 1, dim: int = 16, seed: int = 0
) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Return vectors in distant groups, split into closer subgroups (the same in all groups), and both labels."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    far, near = 10 * axes[:groups], 1.25 * axes[groups : groups + parts] * (parts > 1)
    group, part = np.divmod(np.repeat(np.arange(groups * parts), size), parts)
    x = far[group] + near[part] + rng.normal(scale=0.05, size=(len(group), dim))
    order = rng.permutation(len(x))
    return x[order].astype(np.float32), group[order], part[order]


def same_partition(a: NDArray[np.int64], b: NDArray[np.int64]) -> bool:
    return len({*zip(a.tolist(), b.tolist(), strict=True)}) == len({*a.tolist()}) == len({*b.tolist()})


@pytest.mark.parametrize(("seed", "balance"), [(0, 0.0), (1, 1.0), (2, 1.5)])
def test_planted_groups_are_the_first_level(seed: int, balance: float) -> None:
    x, group, _ = mixture(8, 40, seed=seed)
    assert same_partition(residual_kmeans(x, 1, 8, balance=balance, seed=seed).codes[:, 0], group)


@pytest.mark.parametrize("seed", range(2))
def test_planted_parts_of_groups_are_the_second_level(seed: int) -> None:
    x, group, part = mixture(6, 20, parts=6, seed=seed)
    codes = residual_kmeans(x, 2, 6, seed=seed).codes
    assert same_partition(codes[:, 0], group) and same_partition(codes[:, 1], part)


@pytest.mark.parametrize("seed", range(2))
def test_groups_of_different_sizes_are_recovered(seed: int) -> None:
    x, group, _ = mixture(8, 200, seed=seed)
    kept = np.concatenate([np.flatnonzero(group == g)[: 200 if g == 0 else 8] for g in range(8)])
    assert same_partition(kmeans(x[kept], 8, seed=seed).codes, group[kept])


def test_codewords_sum_to_the_reconstruction() -> None:
    x = np.random.default_rng(1).normal(size=(500, 12)).astype(np.float32)
    result = residual_kmeans(x, 4, 16)
    assert result.codes.shape == (500, 4) and result.codebooks.shape == (4, 16, 12)
    assert result.codebooks.dtype == np.float32
    total, errors = np.zeros_like(x), [np.square(x).sum()]
    for level in range(4):
        total += result.codebooks[level][result.codes[:, level]]
        errors.append(np.square(x - total).sum())
    assert all(after < before for before, after in pairwise(errors))
    np.testing.assert_allclose(reconstruct_vectors(result.codes, result.codebooks), total, atol=1e-5)
    np.testing.assert_array_equal(nearest_codes(x, result.codebooks), result.codes)


def test_codes_are_the_nearest_centroids() -> None:
    rng = np.random.default_rng(2)
    x, codebooks = rng.normal(size=(50, 5)).astype(np.float32), rng.normal(size=(2, 7, 5)).astype(np.float32)
    first = np.square(x[:, None] - codebooks[0]).sum(2).argmin(1)
    second = np.square((x - codebooks[0][first])[:, None] - codebooks[1]).sum(2).argmin(1)
    np.testing.assert_array_equal(nearest_codes(x, codebooks), np.stack([first, second], 1))


@pytest.mark.parametrize("balance", [1.0, 2.0, 7.5])
def test_no_code_has_more_items_than_the_bound(balance: float) -> None:
    # Half of the vectors are close to each other, so without a bound one code would get them all.
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.normal(scale=s, size=(300, 6)) for s in (0.01, 1.0)]).astype(np.float32)
    codes = residual_kmeans(x, 3, 20, balance=balance).codes
    most = int(np.ceil(balance * 600 / 20))
    assert max(np.bincount(codes[:, level]).max() for level in range(3)) <= most
    free = residual_kmeans(x, 1, 20).codes[:, 0]
    assert balance > 2 or np.bincount(free).max() > most


def test_opening_is_kept_if_it_ends_better(monkeypatch: pytest.MonkeyPatch) -> None:
    # Most vectors are near the centre, in few directions; one in ten is an outlier and becomes an initial centroid.
    rng = np.random.default_rng(4)
    x = rng.normal(size=(2000, 4)) @ rng.normal(size=(4, 128))
    x *= 0.5 * rng.random((2000, 1)) / np.linalg.norm(x, axis=1, keepdims=True)
    x[:200] = rng.normal(size=(200, 128)) * 0.7 / 128**0.5
    x = x.astype(np.float32)

    def cost() -> float:
        result = residual_kmeans(x, 1, 64)
        return float(np.square(x - reconstruct_vectors(result.codes, result.codebooks)).sum())

    opened = cost()
    monkeypatch.setattr("llmrec.index.semantic._INITIAL_SIZE_LIMIT", 64)
    assert opened < 0.98 * cost()


def test_codes_depend_on_the_seed() -> None:
    x = np.random.default_rng(5).normal(size=(400, 8)).astype(np.float32)
    once, twice, other = (residual_kmeans(x, 2, 16, balance=2, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(once.codes, twice.codes)
    np.testing.assert_array_equal(once.codebooks, twice.codebooks)
    assert not np.array_equal(once.codes, other.codes)


@pytest.mark.parametrize("balance", [0.0, 1.0])
@pytest.mark.parametrize(("n", "k"), [(1, 5), (50, 8), (50, 1)])
def test_equal_vectors_and_few_vectors(n: int, k: int, balance: float) -> None:
    # Rounded products of these values make distances of equal vectors slightly positive or negative.
    x = np.tile(np.random.default_rng(n).normal(size=40), (n, 1)).astype(np.float32)
    result = residual_kmeans(x, 3, k, balance=balance)
    np.testing.assert_allclose(reconstruct_vectors(result.codes, result.codebooks), x, atol=1e-6)
    if not balance:
        assert len(np.unique(result.codes, axis=0)) == 1
    else:
        assert np.bincount(result.codes[:, 0]).max() <= int(np.ceil(balance * n / k))
    zero = residual_kmeans(np.zeros_like(x), 2, k, balance=balance)
    assert np.isfinite(zero.codebooks).all() and not zero.codebooks.any()


def test_fewer_vectors_than_codes() -> None:
    x = np.random.default_rng(6).normal(size=(20, 4)).astype(np.float32)
    result = residual_kmeans(x, 1, 64)
    np.testing.assert_allclose(reconstruct_vectors(result.codes, result.codebooks), x, atol=1e-6)
    assert len(np.unique(result.codes)) == 20


def test_perplexity_by_hand() -> None:
    assert perplexity([1, 1, 1, 1]) == pytest.approx(4)
    assert perplexity([0, 0, 3]) == pytest.approx(1)
    assert perplexity([2, 1]) == pytest.approx(3 / 4 ** (1 / 3))


def least(costs: Floats, most: int) -> float:
    """Return the minimum total cost, computed by repeating each column."""
    repeated = np.repeat(costs, most, axis=1).astype(np.float64)
    rows, columns = linear_sum_assignment(repeated)
    return float(repeated[rows, columns].sum())


@pytest.mark.parametrize("most", [20, 30])
def test_bounded_assignment_is_nearly_optimal(most: int) -> None:
    rng = np.random.default_rng(most)
    # Nearly all rows prefer the same columns.
    costs = (rng.random((200, 10)) + np.linspace(0, 1, 10)).astype(np.float32)
    codes = assign_with_limit(costs, most)
    assert np.bincount(codes).max() <= most
    assert costs[np.arange(200), codes].sum() <= least(costs, most) + 200 * 1e-3 * np.ptp(costs)


def test_bounded_assignment_by_hand() -> None:
    costs = np.array([[0, 5], [0, 1], [0, 3], [0, 1]], np.float32)
    assert assign_with_limit(costs, 2).tolist() == [0, 1, 0, 1]
    assert assign_with_limit(np.zeros((4, 2), np.float32), 2).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("bid", [-1e-3, 1e-30])
def test_bounded_assignment_ends_with_tiny_bids(bid: float) -> None:
    # Rounding errors give such bids: each is a difference of products near zero.
    codes = assign_with_limit(np.array([[0, 0, 1]] * 6, np.float32), 2, bid=bid)
    assert np.bincount(codes).tolist() == [2, 2, 2]


@given(data=st.data(), n=st.integers(1, 12), k=st.integers(1, 5), values=st.integers(0, 4))
def test_any_costs_are_assigned(data: st.DataObject, n: int, k: int, values: int) -> None:
    cells = data.draw(st.lists(st.integers(0, values), min_size=n * k, max_size=n * k))
    costs = np.array(cells, np.float32).reshape(n, k)
    most = data.draw(st.integers(-(-n // k), n))
    codes = assign_with_limit(costs, most)
    assert np.bincount(codes, minlength=k).max() <= most and codes.min() >= 0
    # Many equal costs are the hardest case of an auction: bids grow before it ends.
    assert costs[np.arange(n), codes].sum() <= least(costs, most) + n * 0.3 * max(1, values)


@given(
    data=st.data(),
    n=st.integers(1, 25),
    k=st.integers(1, 9),
    levels=st.integers(1, 3),
    balance=st.sampled_from([0.0, 1.0, 1.3, 4.0]),
)
def test_any_vectors_are_quantised(data: st.DataObject, n: int, k: int, levels: int, balance: float) -> None:
    cells = data.draw(st.lists(st.integers(-2, 2), min_size=n * 3, max_size=n * 3))
    x = np.array(cells, np.float32).reshape(n, 3)
    result = residual_kmeans(x, levels, k, balance=balance, iterations=6)
    assert result.codes.shape == (n, levels) and result.codes.min() >= 0 and result.codes.max() < k
    assert np.isfinite(result.codebooks).all()
    if balance:
        most = int(np.ceil(balance * n / k))
        assert all(np.bincount(result.codes[:, level]).max() <= most for level in range(levels))
    again = residual_kmeans(x, levels, k, balance=balance, iterations=6)
    np.testing.assert_array_equal(result.codes, again.codes)
