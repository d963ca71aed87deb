"""Paths of clusters: planted blocks come back, bounds hold whatever the graph, and held-out data is not looked at."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest
from catalogues import trained
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse.linalg import ArpackNoConvergence

from llmrec.data.split import SplitDataset
from llmrec.errors import DataError, RecipeError
from llmrec.index import collaborative
from llmrec.index.collaborative import cluster_qr
from llmrec.index.table import ItemIndex, build, item_token, token
from llmrec.recipe.schema import IndexSection
from llmrec.types import Item
from tests.facts import Facts, raises


def chosen(histories: Mapping[str, Sequence[str]], more: Sequence[str] = ()) -> SplitDataset:
    """Training histories by user, and a catalogue of their items and some more."""
    pairs = [(user, item) for user, items in histories.items() for item in items]
    names = sorted({*more, *(item for _, item in pairs)})
    return trained(pairs, {name: Item(item_id=name, title=name) for name in names})


def coded(data: SplitDataset, *, seed: int = 0, item_token: bool = False, **shape: int) -> ItemIndex:
    section = {"scheme": "collaborative", "item_token": item_token, "collaborative": shape}
    index = build(IndexSection.model_validate(section), data, seed=seed)
    assert index.codes.keys() == data.dataset.items.keys()
    proper(index)
    return index


def proper(index: ItemIndex) -> None:
    """Every code leads back to its item, none begins another, and no leaf is too large."""
    assert all(index.decode(index.encode(item)) == item for item in index.codes)
    paths = sorted(index.codes.values())
    assert all(b[: len(a)] != a for a, b in pairwise(paths))
    sizes = Counter(pieces[:-1] for pieces in index.codes.values())
    assert max(sizes.values(), default=0) <= index.settings["leaf"]


def blocks(seed: int, *, sizes: Sequence[int] = (15, 15, 15, 15), noise: float = 0.0) -> SplitDataset:
    """Users who choose within one block of items; now and then one of any block."""
    dice = random.Random(seed)
    items = [f"{block}-{n}" for block, size in enumerate(sizes) for n in range(size)]
    histories = {}
    for user in range(3 * sum(sizes)):
        block = user % len(sizes)
        own = [f"{block}-{n}" for n in range(sizes[block])]
        histories[f"u{user}"] = [dice.choice(items) if dice.random() < noise else dice.choice(own) for _ in range(6)]
    return chosen(histories, items)


def mixed(users: int = 80, items: int = 60, seed: int = 0) -> SplitDataset:
    """Popular and rare items, one that is alone, two that nobody chose."""
    rng = np.random.default_rng(seed)
    histories = {
        f"u{u}": [f"i{int(n):02d}" for n in np.minimum(rng.geometric(0.06, 6), items) - 1] for u in range(users)
    }
    return chosen({**histories, "hermit": ["alone"]}, ["never", "nowhere"])


# --------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [(15, 15, 15, 15), (8, 12, 18, 24), (150, 150, 150, 150)])
def test_planted_blocks_come_back(seed: int, noise: float, sizes: tuple[int, ...]) -> None:
    index = coded(blocks(seed, sizes=sizes, noise=noise), clusters=4, leaf=max(sizes))
    trained = {item: pieces[0] for item, pieces in index.codes.items() if pieces[0] != token(0, 4)}
    found = {(item.partition("-")[0], first) for item, first in trained.items()}
    assert len(found) == 4 == len({first for _, first in found}) and len(trained) > 0.9 * sum(sizes)
    assert index.figures["depth"] == 1
    assert index.figures["inside"] == 1.0 if noise == 0 else 0.7 < index.figures["inside"] < 1.0


def test_blocks_within_blocks_share_the_beginning_of_their_paths() -> None:
    dice, histories = random.Random(1), {}
    for user in range(400):
        outer, inner = user % 2, user // 2 % 2
        near = [f"{outer}{inner}{n}" for n in range(6)]
        far = [f"{outer}{1 - inner}{n}" for n in range(6)]
        histories[f"u{user:03d}"] = [*dice.sample(near, 4), *dice.sample(far, 1)]
    index = coded(chosen(histories), clusters=2, leaf=6)
    assert len({(item[0], pieces[0]) for item, pieces in index.codes.items()}) == 2
    assert len({(item[:2], pieces[:2]) for item, pieces in index.codes.items()}) == 4
    assert {len(pieces) for pieces in index.codes.values()} == {3}


def test_clusters_do_not_depend_on_the_rotation_of_the_basis() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), (5, 6, 7, 8))
    basis = np.linalg.qr(np.eye(4)[truth] + 0.05 * rng.normal(size=(26, 4)))[0]
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    for found in (cluster_qr(basis), cluster_qr(basis @ turn), cluster_qr(basis * [1, -1, 1, -1])):
        assert len({*zip(truth.tolist(), found.tolist(), strict=True)}) == 4 == len({*found.tolist()})


@pytest.mark.parametrize("size", [30, 500])
def test_the_spectrum_is_that_of_the_normalised_graph(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
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
    found = [collaborative._spectrum(users, 3)]
    monkeypatch.setattr(collaborative, "eigsh", fails)
    found.append(collaborative._spectrum(users, 3))
    for vectors in found:
        # The same space, and in it the same order.
        np.testing.assert_allclose(np.abs(np.linalg.svd(expected.T @ vectors)[1]), 1, atol=1e-6)
        values = np.diag(vectors.T @ normal @ vectors)
        assert values[0] == pytest.approx(1) and (np.diff(values) <= 1e-9).all()


# --------------------------------------------------------------------------- what does not matter


@pytest.mark.parametrize("item_token", [False, True])
def test_the_order_of_rows_does_not_matter(item_token: bool) -> None:
    data = mixed()
    index = coded(data, clusters=3, leaf=8, item_token=item_token)
    assert coded(data, clusters=3, leaf=8, item_token=item_token).digest == index.digest
    for seed in range(3):
        turned = replace(
            data,
            train=data.train.sample(fraction=1.0, shuffle=True, seed=seed),
            dataset=replace(data.dataset, items=dict(sorted(data.dataset.items.items(), reverse=True))),
        )
        assert coded(turned, clusters=3, leaf=8, item_token=item_token).digest == index.digest
    # Items that were chosen twice by a user count once.
    twice = replace(data, train=pl.concat([data.train, data.train]))
    assert coded(twice, clusters=3, leaf=8, item_token=item_token).digest == index.digest


def test_another_seed_changes_the_order_within_leaves_alone() -> None:
    one, two = (coded(mixed(), seed=seed, clusters=3, leaf=8) for seed in (0, 1))
    assert one.codes != two.codes
    warm = [item for item, pieces in one.codes.items() if pieces[0] != token(0, 3)]
    assert all(one.codes[item][:-1] == two.codes[item][:-1] for item in warm)


def test_a_graph_without_any_structure_gives_the_same_codes_twice() -> None:
    names = [f"i{n:03d}" for n in range(450)]
    data = chosen({"u0": names, "u1": names})
    index = coded(data, clusters=4, leaf=20)
    assert coded(data, clusters=4, leaf=20).digest == index.digest


# --------------------------------------------------------------------------- odd graphs


def test_items_that_nobody_chose_have_a_branch_of_their_own() -> None:
    index = coded(mixed(), clusters=3, leaf=8)
    cold = {item for item, pieces in index.codes.items() if pieces[0] == token(0, 3)}
    assert cold == {"never", "nowhere"} and index.figures["untrained"] == 2
    assert index.codes["alone"][0] != token(0, 3) and index.figures["isolated"] == 1


def test_a_catalogue_that_nobody_chose_from_is_coded_all_the_same() -> None:
    index = coded(chosen({}, [f"i{n}" for n in range(30)]), clusters=3, leaf=4)
    assert index.figures["leaves"] == 0 and index.figures["inside"] == 0
    assert {pieces[0] for pieces in index.codes.values()} == {token(0, 3)}
    # One path of length 1, three of length 2, then longer ones, each with four places.
    assert Counter(len(pieces) - 1 for pieces in index.codes.values()) == {1: 4, 2: 12, 3: 14}


def test_a_catalogue_of_one_leaf_is_not_cut() -> None:
    index = coded(blocks(0), clusters=4, leaf=60)
    assert {len(pieces) for item, pieces in index.codes.items() if pieces[0] != token(0, 4)} == {1}


def test_items_without_any_edge_are_dealt_evenly() -> None:
    index = coded(chosen({f"u{n}": [f"i{n}"] for n in range(20)}), clusters=4, leaf=5)
    assert index.figures["isolated"] == 20 and index.figures["leaves"] == 4
    assert Counter(pieces[0] for pieces in index.codes.values()) == {token(0, n): 5 for n in range(4)}


def test_what_is_too_large_at_the_last_level_is_cut_in_order() -> None:
    # A chain: its two ends must not meet in one leaf.
    data = chosen({f"u{n:03d}": [f"i{n:03d}", f"i{n + 1:03d}"] for n in range(59)})
    index = coded(data, clusters=6, leaf=10, depth=1)
    assert index.figures["leaves"] == 6 and index.figures["largest_leaf"] == 10
    leaves: dict[str, list[int]] = {}
    for item, pieces in index.codes.items():
        leaves.setdefault(pieces[0], []).append(int(item[1:]))
    assert all(max(members) - min(members) == 9 for members in leaves.values())


def test_a_star_and_a_clique_end() -> None:
    star = {f"u{n:03d}": ["hub", f"i{n:03d}"] for n in range(100)}
    assert coded(chosen(star), clusters=3, leaf=5).figures["largest_leaf"] <= 5
    clique = {"u": [f"i{n:03d}" for n in range(100)]}
    assert coded(chosen(clique), clusters=3, leaf=5).figures["largest_leaf"] <= 5
    full = coded(chosen(clique), clusters=5, leaf=4, depth=2)
    assert full.figures == {**full.figures, "leaves": 25, "largest_leaf": 4, "depth": 2}


def test_a_tree_that_is_too_small_is_refused_with_its_keys() -> None:
    data = chosen({"u": [f"i{n:03d}" for n in range(13)]}, [f"n{n}" for n in range(13)])
    with raises(
        RecipeError,
        Facts("too-few", column="index.collaborative", says=("13 items", "clusters=2, depth=2 and leaf=3", "holds 12")),
    ):
        coded(data, clusters=2, leaf=3, depth=2)
    with raises(
        RecipeError, Facts("too-few", column="index.collaborative", says=("13 items without training", "holds 12"))
    ):
        coded(data, clusters=2, leaf=4, depth=2)
    assert coded(data, clusters=2, leaf=5, depth=2).figures["depth"] == 2


# --------------------------------------------------------------------------- pieces


def test_tokens_are_listed_level_by_level() -> None:
    index = coded(mixed(), clusters=3, leaf=8)
    levels = int(index.settings["levels"])
    clusters = [token(level, n) for level in range(levels) for n in range(4 if level == 0 else 3)]
    assert list(index.tokens) == clusters + [item_token(n) for n in range(8)]
    assert levels == max(index.figures["depth"], 1)


def test_with_item_tokens_the_last_piece_is_an_items_own() -> None:
    plain, own = (coded(mixed(), clusters=3, leaf=8, item_token=item_token) for item_token in (False, True))
    last = [pieces[-1] for pieces in own.codes.values()]
    assert sorted(last) == sorted(item_token(n) for n in range(len(own.codes)))
    assert {item: pieces[:-1] for item, pieces in own.codes.items()} == {i: p[:-1] for i, p in plain.codes.items()}


# --------------------------------------------------------------------------- extension


def new(count: int, start: int = 0) -> dict[str, Item]:
    return {f"new{n}": Item(item_id=f"new{n}", title="new") for n in range(start, start + count)}


def test_new_items_take_free_places_of_known_tokens() -> None:
    index = coded(mixed(), clusters=3, leaf=8)
    one = index.extend(new(9))
    two = one.extend(new(12, 9))
    proper(two)
    assert two.tokens == index.tokens and len(two.codes) == len(index.codes) + 21
    assert all(two.codes[item] == pieces for item, pieces in one.codes.items())
    assert {two.codes[item][0] for item in new(21)} == {token(0, 3)}


def test_new_items_without_room_are_refused() -> None:
    index = coded(mixed(), clusters=3, leaf=8)
    room = 8 * sum(3**level for level in range(int(index.settings["levels"]))) - 2
    proper(index.extend(new(room)))
    with raises(
        DataError,
        Facts("exhausted", column="index.collaborative.leaf", says=(f"of {room + 1} new items", f"only {room} of")),
    ):
        index.extend(new(room + 1))


def test_new_items_with_tokens_of_their_own_have_room_without_end() -> None:
    index = coded(blocks(0), clusters=2, leaf=30, item_token=True)
    more = index.extend(new(200)).extend(new(100, 200))
    assert len(more.tokens) == len(index.tokens) + 300 == len({*more.tokens})
    assert all(more.decode(more.encode(item)) == item for item in more.codes)
    assert all(more.codes[item] == pieces for item, pieces in index.codes.items())


# --------------------------------------------------------------------------- any table


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
def test_any_table_gives_proper_codes(
    histories: dict[str, list[str]], clusters: int, leaf: int, depth: int, item_token: bool
) -> None:
    data = chosen(histories, ["x", "y"])
    items = {item for history in histories.values() for item in history}
    try:
        index = coded(data, clusters=clusters, leaf=leaf, depth=depth, item_token=item_token)
    except RecipeError:
        assert len(items) > clusters**depth * leaf or leaf * sum(clusters**n for n in range(depth)) < 2
        return
    assert index.figures["depth"] <= depth and 0 <= index.figures["inside"] <= 1
    assert index.figures["leaves"] == len({p[:-1] for i, p in index.codes.items() if i in items})
