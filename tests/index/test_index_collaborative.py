"""Codes from clusters of items that share users."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from catalogues import check_codes, trained
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse.linalg import ArpackNoConvergence

from llmrec.data.split import SplitDataset
from llmrec.errors import DataError, RecipeError
from llmrec.index import collaborative
from llmrec.index.table import ItemIndex, build_item_index, item_token, level_token
from llmrec.recipe.schema import IndexSection
from llmrec.types import Item
from tests.facts import Facts, raises


def chosen(histories: Mapping[str, Sequence[str]], more: Sequence[str] = ()) -> SplitDataset:
    """Training histories by user, and a catalogue of their items and some more."""
    pairs = [(user, item) for user, items in histories.items() for item in items]
    names = sorted({*more, *(item for _, item in pairs)})
    return trained(pairs, {name: Item(item_id=name, title=name) for name in names})


def build_index(data: SplitDataset, *, seed: int = 0, item_token: bool = False, **shape: int) -> ItemIndex:
    section = {"scheme": "collaborative", "item_token": item_token, "collaborative": shape}
    index = build_item_index(IndexSection.model_validate(section), data, seed=seed)
    assert index.codes.keys() == data.dataset.items.keys()
    proper(index)
    return index


def proper(index: ItemIndex) -> None:
    check_codes(index)
    sizes = Counter(pieces[:-1] for pieces in index.codes.values())
    assert max(sizes.values(), default=0) <= index.settings["leaf"]


def blocks(seed: int, *, sizes: Sequence[int] = (15, 15, 15, 15), noise: float = 0.0) -> SplitDataset:
    """Users who choose within one block of items; with noise, also from other blocks."""
    dice = random.Random(seed)
    items = [f"{block}-{n}" for block, size in enumerate(sizes) for n in range(size)]
    histories = {}
    for user in range(3 * sum(sizes)):
        block = user % len(sizes)
        block_items = [f"{block}-{n}" for n in range(sizes[block])]
        histories[f"u{user}"] = [
            dice.choice(items) if dice.random() < noise else dice.choice(block_items) for _ in range(6)
        ]
    return chosen(histories, items)


def mixed(users: int = 80, items: int = 60, seed: int = 0) -> SplitDataset:
    """Popular and rare items, one isolated item, and two without interactions."""
    rng = np.random.default_rng(seed)
    histories = {
        f"u{u}": [f"i{int(n):02d}" for n in np.minimum(rng.geometric(0.06, 6), items) - 1] for u in range(users)
    }
    return chosen({**histories, "hermit": ["alone"]}, ["never", "nowhere"])


@pytest.mark.parametrize(
    ("noise", "sizes"), [(0.0, (15, 15, 15, 15)), (0.1, (8, 12, 18, 24)), (0.1, (150, 150, 150, 150))]
)
def test_planted_blocks_are_found(noise: float, sizes: tuple[int, ...]) -> None:
    index = build_index(blocks(0, sizes=sizes, noise=noise), clusters=4, leaf=max(sizes))
    clusters = {item: pieces[0] for item, pieces in index.codes.items() if pieces[0] != level_token(0, 4)}
    pairs = {(item.partition("-")[0], first) for item, first in clusters.items()}
    assert len(pairs) == 4 == len({first for _, first in pairs}) and len(clusters) > 0.9 * sum(sizes)
    assert index.figures["depth"] == 1
    assert index.figures["inside"] == 1.0 if noise == 0 else 0.7 < index.figures["inside"] < 1.0


def test_nested_blocks_share_prefixes() -> None:
    dice, histories = random.Random(1), {}
    for user in range(400):
        outer, inner = user % 2, user // 2 % 2
        near = [f"{outer}{inner}{n}" for n in range(6)]
        far = [f"{outer}{1 - inner}{n}" for n in range(6)]
        histories[f"u{user:03d}"] = [*dice.sample(near, 4), *dice.sample(far, 1)]
    index = build_index(chosen(histories), clusters=2, leaf=6)
    assert len({(item[0], pieces[0]) for item, pieces in index.codes.items()}) == 2
    assert len({(item[:2], pieces[:2]) for item, pieces in index.codes.items()}) == 4
    assert {len(pieces) for pieces in index.codes.values()} == {3}


@pytest.mark.parametrize("size", [30, 500])
def test_spectrum_equals_dense_eigenvectors(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 400)
    rows = [[*rng.integers(0, size, 1), *(rng.integers(0, size // 3, 4) + size // 3 * label)] for label in labels]
    rows += [[n, (n + 1) % size] for n in range(size)]
    dense = np.zeros((len(rows), size))
    for row, items in enumerate(rows):
        dense[row, items] = 1
    graph = dense.T @ dense
    np.fill_diagonal(graph, 0)
    degrees = graph.sum(axis=0)
    normal = graph / np.sqrt(np.outer(degrees, degrees))
    expected = np.linalg.eigh(normal)[1][:, -3:]

    def fails(*args: Any, **kwargs: Any) -> None:
        raise ArpackNoConvergence("no convergence", np.empty(0), np.empty((size, 0)))

    users = sparse.csr_array(dense)
    spectra = [collaborative._leading_eigenvectors(users, 3)]
    monkeypatch.setattr(collaborative, "eigsh", fails)
    spectra.append(collaborative._leading_eigenvectors(users, 3))
    for vectors in spectra:
        # The vectors span the same subspace, in the same order.
        np.testing.assert_allclose(np.abs(np.linalg.svd(expected.T @ vectors)[1]), 1, atol=1e-6)
        values = np.diag(vectors.T @ normal @ vectors)
        assert values[0] == pytest.approx(1) and (np.diff(values) <= 1e-9).all()


def test_repeated_interactions_count_once() -> None:
    data = mixed()
    twice = replace(data, train=pl.concat([data.train, data.train]))
    assert build_index(twice, clusters=3, leaf=8).digest == build_index(data, clusters=3, leaf=8).digest


def test_seed_changes_only_the_order_within_leaves() -> None:
    one, two = (build_index(mixed(), seed=seed, clusters=3, leaf=8) for seed in (0, 1))
    assert one.codes != two.codes
    warm = [item for item, pieces in one.codes.items() if pieces[0] != level_token(0, 3)]
    assert all(one.codes[item][:-1] == two.codes[item][:-1] for item in warm)


def test_complete_graph_is_deterministic() -> None:
    names = [f"i{n:03d}" for n in range(450)]
    data = chosen({"u0": names, "u1": names})
    index = build_index(data, clusters=4, leaf=20)
    assert build_index(data, clusters=4, leaf=20).digest == index.digest


def test_items_without_interactions_have_a_separate_branch() -> None:
    index = build_index(mixed(), clusters=3, leaf=8)
    cold = {item for item, pieces in index.codes.items() if pieces[0] == level_token(0, 3)}
    assert cold == {"never", "nowhere"} and index.figures["untrained"] == 2
    assert index.codes["alone"][0] != level_token(0, 3) and index.figures["isolated"] == 1


def test_catalogue_without_interactions() -> None:
    index = build_index(chosen({}, [f"i{n}" for n in range(30)]), clusters=3, leaf=4)
    assert index.figures["leaves"] == 0 and index.figures["inside"] == 0
    assert {pieces[0] for pieces in index.codes.values()} == {level_token(0, 3)}
    # One path of length 1, three of length 2, then longer ones; four items per path.
    assert Counter(len(pieces) - 1 for pieces in index.codes.values()) == {1: 4, 2: 12, 3: 14}


def test_isolated_items_are_distributed_evenly() -> None:
    index = build_index(chosen({f"u{n}": [f"i{n}"] for n in range(20)}), clusters=4, leaf=5)
    assert index.figures["isolated"] == 20 and index.figures["leaves"] == 4
    assert Counter(pieces[0] for pieces in index.codes.values()) == {level_token(0, n): 5 for n in range(4)}


def test_too_large_last_level_is_cut_in_spectral_order() -> None:
    # The two ends of a chain must not share a leaf.
    data = chosen({f"u{n:03d}": [f"i{n:03d}", f"i{n + 1:03d}"] for n in range(59)})
    index = build_index(data, clusters=6, leaf=10, depth=1)
    assert index.figures["leaves"] == 6 and index.figures["largest_leaf"] == 10
    leaves: dict[str, list[int]] = {}
    for item, pieces in index.codes.items():
        leaves.setdefault(pieces[0], []).append(int(item[1:]))
    assert all(max(members) - min(members) == 9 for members in leaves.values())


def test_star_and_clique_are_split() -> None:
    star = {f"u{n:03d}": ["hub", f"i{n:03d}"] for n in range(100)}
    build_index(chosen(star), clusters=3, leaf=5)
    clique = {"u": [f"i{n:03d}" for n in range(100)]}
    full = build_index(chosen(clique), clusters=5, leaf=4, depth=2)
    assert full.figures == {**full.figures, "leaves": 25, "largest_leaf": 4, "depth": 2}


def test_rejects_too_small_tree() -> None:
    data = chosen({"u": [f"i{n:03d}" for n in range(13)]}, [f"n{n}" for n in range(13)])
    with raises(
        RecipeError,
        Facts("too-few", column="index.collaborative", says=("13 items", "clusters=2, depth=2 and leaf=3", "holds 12")),
    ):
        build_index(data, clusters=2, leaf=3, depth=2)
    with raises(
        RecipeError, Facts("too-few", column="index.collaborative", says=("13 items without training", "holds 12"))
    ):
        build_index(data, clusters=2, leaf=4, depth=2)
    assert build_index(data, clusters=2, leaf=5, depth=2).figures["depth"] == 2


def test_tokens_are_listed_by_level() -> None:
    index = build_index(mixed(), clusters=3, leaf=8)
    levels = int(index.settings["levels"])
    clusters = [level_token(level, n) for level in range(levels) for n in range(4 if level == 0 else 3)]
    assert list(index.tokens) == clusters + [item_token(n) for n in range(8)]
    assert levels == max(index.figures["depth"], 1)


def test_item_tokens_are_unique_last_pieces() -> None:
    plain, with_item_tokens = (
        build_index(mixed(), clusters=3, leaf=8, item_token=item_token) for item_token in (False, True)
    )
    last = [pieces[-1] for pieces in with_item_tokens.codes.values()]
    assert sorted(last) == sorted(item_token(n) for n in range(len(with_item_tokens.codes)))
    assert {item: pieces[:-1] for item, pieces in with_item_tokens.codes.items()} == {
        i: p[:-1] for i, p in plain.codes.items()
    }


def new(count: int, start: int = 0) -> dict[str, Item]:
    return {f"new{n}": Item(item_id=f"new{n}", title="new") for n in range(start, start + count)}


def test_extension_fills_all_codes_and_then_fails() -> None:
    index = build_index(mixed(), clusters=3, leaf=8)
    room = 8 * sum(3**level for level in range(int(index.settings["levels"]))) - 2
    full = index.extend(new(room))
    proper(full)
    assert full.tokens == index.tokens and {full.codes[item][0] for item in new(room)} == {level_token(0, 3)}
    with raises(
        DataError,
        Facts("exhausted", column="index.collaborative.leaf", says=(f"of {room + 1} new items", f"only {room} of")),
    ):
        index.extend(new(room + 1))


@given(
    histories=st.dictionaries(
        st.sampled_from([f"u{n}" for n in range(8)]),
        st.lists(st.sampled_from([f"i{n:02d}" for n in range(24)]), min_size=1, max_size=8),
        max_size=8,
    ),
    clusters=st.integers(2, 5),
    leaf=st.integers(1, 6),
    depth=st.integers(1, 8),
    item_token=st.booleans(),
)
def test_any_interactions_give_valid_codes(
    histories: dict[str, list[str]], clusters: int, leaf: int, depth: int, item_token: bool
) -> None:
    data = chosen(histories, ["x", "y"])
    items = {item for history in histories.values() for item in history}
    try:
        index = build_index(data, clusters=clusters, leaf=leaf, depth=depth, item_token=item_token)
    except RecipeError:
        assert len(items) > clusters**depth * leaf or leaf * sum(clusters**n for n in range(depth)) < 2
        return
    assert index.figures["depth"] <= depth and 0 <= index.figures["inside"] <= 1
    assert index.figures["leaves"] == len({p[:-1] for i, p in index.codes.items() if i in items})
