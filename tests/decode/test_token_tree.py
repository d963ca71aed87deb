"""The tree of valid outputs against plain Python over the same paths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.decode.token_tree import TokenTrie
from llmrec.errors import DataError
from tests.facts import Facts, raises

END = 9
PATHS = st.lists(st.lists(st.integers(0, 3), max_size=4).map(lambda path: (*path, END)), min_size=1, unique=True)


@given(PATHS)
def test_nodes_children_and_ranges(paths: list[tuple[int, ...]]) -> None:
    tree, ordered = TokenTrie.of(paths), sorted(paths)
    assert len(tree) == len(paths) and tree.depth == max(map(len, paths))
    assert [paths[item] for item in tree.order] == ordered
    assert [tree.path(number) for number in range(len(paths))] == ordered
    assert all(ordered[tree.ranks[item]] == path for item, path in enumerate(paths))
    depths = range(1, tree.depth + 1)
    prefixes = [(), *(p for d in depths for p in sorted({path[:d] for path in paths if len(path) >= d}))]
    assert len(prefixes) == len(tree.marks)
    assert list(tree.starts) == [0, *(sum(len(p) <= d for p in prefixes) for d in range(tree.depth + 1))]
    positions = [
        [number for number, path in enumerate(ordered) if path[: len(prefix)] == prefix] for prefix in prefixes
    ]
    lows, highs = np.array([numbers[0] for numbers in positions]), np.array([numbers[-1] + 1 for numbers in positions])
    nodes = np.arange(len(prefixes))
    children = tree.below(nodes, lows, highs)
    expected = [(node, child) for node in nodes for child in nodes if prefixes[child][:-1] == prefixes[node] and child]
    assert list(zip(children.parents.tolist(), children.nodes.tolist(), strict=True)) == expected
    assert (children.lows == lows[children.nodes]).all() and (children.highs == highs[children.nodes]).all()
    assert tree.tokens(nodes[1:]).tolist() == [prefix[-1] for prefix in prefixes[1:]]
    # One node at a time gives the same.
    for node in nodes:
        alone = tree.below(nodes[[node]], lows[[node]], highs[[node]])
        assert (alone.lows == children.lows[children.parents == node]).all()


def test_array_of_paths() -> None:
    table = np.random.default_rng(0).integers(0, 50_000, (500, 5))
    one, two = TokenTrie.of(table), TokenTrie.of([tuple(row) for row in table.tolist()])
    assert (one.order == two.order).all() and (one.marks == two.marks).all()
    # Wide ids in many columns do not fit one integer, and are sorted column by column.
    wide = TokenTrie.of(np.hstack([table, table]))
    assert (wide.order == one.order).all()


@pytest.mark.parametrize(
    ("paths", "facts"),
    [
        ([], Facts("empty")),
        ([(1,), ()], Facts("missing-value", says="item 1 ")),
        ([(1, 2), (3,), (1, 2)], Facts("duplicate", says="items 0 and 2 ")),
        ([(1, 2, 3), (5,), (1, 2)], Facts("duplicate", says=("item 2 of", "of item 0"))),
        ([(1, -3)], Facts("bad-value")),
    ],
)
def test_rejects_ambiguous_or_empty_paths(paths: list[tuple[int, ...]], facts: Facts) -> None:
    with raises(DataError, facts):
        TokenTrie.of(paths)


def test_saved_tree_is_loaded_unchanged(tmp_path: Path) -> None:
    tree = TokenTrie.of([(1, 2, 9), (1, 9), (3, 9)])
    tree.save(tmp_path / "catalogue.safetensors")
    again = TokenTrie.load(tmp_path / "catalogue.safetensors")
    assert again.starts == tree.starts and again.lowest == 1
    assert [again.path(number) for number in range(3)] == [(1, 2, 9), (1, 9), (3, 9)]
    (tmp_path / "torn").write_bytes(b"x")
    with raises(DataError, Facts("damaged", tmp_path / "torn", says="rebuild it")):
        TokenTrie.load(tmp_path / "torn")


@pytest.mark.parametrize(("spread", "bytes_a_token"), [(1, 1), (300, 2), (100_000, 4)])
def test_memory_per_node_and_item(spread: int, bytes_a_token: int) -> None:
    codes = np.unique(np.random.default_rng(0).integers(0, 64, (20_000, 4)), axis=0) * spread + 150_000
    tree = TokenTrie.of(codes)
    *_, above, last, nodes = tree.starts
    assert len(tree.marks) == nodes and last - above > 0.9 * len(tree)
    assert tree.nbytes == bytes_a_token * nodes + 4 * (last + 1 + above + len(tree))
    assert tree.tokens(np.arange(1, nodes)).max() == codes.max()
