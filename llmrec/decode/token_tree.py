"""The token paths of a catalogue as a tree, with at most three integers per node.

Every item is a path of token ids, and no path is a prefix of another. In sorted order, the paths below a node are a
range, and the children of a node are adjacent among the nodes of the next depth. So a node is its token, the index of
its first child, and the start of its range. At the last depth, where most nodes are, no node has children, and the
range of a node directly above has the length of its number of children, so these values are not stored. No array grows
with the vocabulary, and no step of a search grows with the catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.durable import replace_atomically
from llmrec.errors import DataError, require

Ints = NDArray[np.int32]
Index = NDArray[np.int64]
_MAX_KEY_BITS = 63
ROOT = 0


@dataclass(frozen=True)
class TokenTrie:
    """Token paths of a set of items; nodes are ordered by depth, then by path.

    Attributes:
        marks: The last token of each node's path minus the lowest token, in the smallest sufficient type, shape
            (nodes,); node 0 is the root, which has no token. `tokens` returns the token ids.
        lowest: The lowest token id.
        firsts: The first child of each node above the last depth, and one past the last node, shape (starts[depth] +
            1,); those of node v end where those of v + 1 begin.
        lows: The first of each node's items among the sorted paths, for all nodes whose children may have children,
            shape (starts[depth - 1],). `below` returns the others.
        starts: The first node of each depth, and one past the last node; depth 0 is the root.
        order: The item index of each sorted path, in the order of the given paths, shape (items,).
    """

    marks: NDArray[np.unsignedinteger[Any]]
    lowest: int
    firsts: Ints
    lows: Ints
    starts: tuple[int, ...]
    order: Ints

    @staticmethod
    def of(paths: Sequence[Sequence[int]] | NDArray[np.integer[Any]]) -> TokenTrie:
        """Build the tree from token paths.

        Args:
            paths: One path per item; or paths of equal length as an array, shape (items, length).

        Raises:
            DataError: If a path is empty, two are equal, or one is a prefix of another.
        """
        table, lengths = _padded_paths(paths)
        order = _path_order(table)
        return _build_tree(table[order], lengths[order], order)

    def __len__(self) -> int:
        """Number of items."""
        return len(self.order)

    @property
    def depth(self) -> int:
        """Number of tokens of the longest path."""
        return len(self.starts) - 2

    @property
    def nbytes(self) -> int:
        """Size of the arrays in bytes."""
        return int(self.marks.nbytes + self.firsts.nbytes + self.lows.nbytes + self.order.nbytes)

    @cached_property
    def ranks(self) -> Ints:
        """The rank of each item when paths are sorted, shape (items,)."""
        result = np.empty(len(self.order), dtype=np.int32)
        result[self.order] = np.arange(len(self.order), dtype=np.int32)
        return result

    def tokens(self, nodes: NDArray[np.integer[Any]]) -> Index:
        """Return the last token of the path to each node, shape (n,)."""
        result: Index = self.marks[nodes].astype(np.int64) + self.lowest
        return result

    def spans(self, nodes: NDArray[np.integer[Any]]) -> tuple[Index, Index]:
        """Return the first child and the number of children of each node, shape (n,) each."""
        last = len(self.firsts) - 1
        first = self.firsts[np.minimum(nodes, last)].astype(np.int64)
        return first, self.firsts[np.minimum(nodes + 1, last)] - first

    def below(self, nodes: Index, lows: Index, highs: Index) -> Children:
        """Return the children of nodes.

        Args:
            nodes: The nodes, shape (n,).
            lows: The first of each node's items among the sorted paths.
            highs: The end of each node's items.
        """
        first, counts = self.spans(nodes)
        parents = np.repeat(np.arange(len(nodes)), counts)
        heads = np.cumsum(counts) - counts
        children = np.repeat(first - heads, counts) + np.arange(len(parents))
        deep = children >= len(self.lows)
        begins = np.empty(0, dtype=np.int64)
        if deep.any():
            # Below are single tokens, each the end of an item, or nothing if the nodes are items.
            sizes = np.maximum(self.spans(children)[1], 1)
            passed = np.cumsum(sizes) - sizes
            begins = np.repeat(lows - passed[np.minimum(heads, len(passed) - 1)], counts) + passed
        if not deep.all():
            begins = np.where(deep, begins if len(begins) else 0, self.lows[np.where(deep, 0, children)])
        # The items of the last sibling end where those of its parent end.
        ends = np.append(begins[1:], 0)
        ends[(heads + counts - 1)[counts > 0]] = highs[counts > 0]
        return Children(parents, children, begins, ends)

    def path(self, rank: int) -> tuple[int, ...]:
        """Return the tokens of a path, given its rank in sorted order."""
        return tuple(token for token, _ in self.choices(rank))

    def choices(self, rank: int) -> list[tuple[int, Index]]:
        """Return the tokens of a path, each with all tokens allowed at its position."""
        results: list[tuple[int, Index]] = []
        opened = self.below(np.array([ROOT]), np.array([0]), np.array([len(self)]))
        while len(opened.nodes):
            at = [int(np.searchsorted(opened.lows, rank, side="right")) - 1]
            legal = self.tokens(opened.nodes)
            results.append((int(legal[at[0]]), legal))
            opened = self.below(opened.nodes[at], opened.lows[at], opened.highs[at])
        return results

    def save(self, file: Path) -> None:
        """Save the arrays as safetensors, atomically."""
        arrays = {name: getattr(self, name) for name in ("marks", "firsts", "lows", "order")}
        numbers = {name: np.array(getattr(self, name), dtype=np.int64) for name in ("starts", "lowest")}
        with replace_atomically(file) as draft:
            require("safetensors.numpy", "train").save_file({**arrays, **numbers}, draft)

    @staticmethod
    def load(file: Path) -> TokenTrie:
        """Load a catalogue written by `save`.

        Raises:
            DataError: If the file cannot be read.
        """
        tensors = require("safetensors.numpy", "train")
        try:
            result = tensors.load_file(file)
            starts, lowest = (result.pop(name) for name in ("starts", "lowest"))
            return TokenTrie(starts=tuple(int(start) for start in starts), lowest=int(lowest), **result)
        except Exception as error:
            raise DataError(
                f"the catalogue {file} cannot be read ({error}); rebuild it", kind="damaged", at=file
            ) from error


@dataclass(frozen=True)
class Children:
    """The children of several nodes, concatenated.

    Attributes:
        parents: The index of each child's parent among the nodes, ascending, shape (n,).
        nodes: The children.
        lows: The first of each child's items among the sorted paths.
        highs: The end of each child's items.
    """

    parents: Index
    nodes: Index
    lows: Index
    highs: Index


def _padded_paths(paths: Sequence[Sequence[int]] | NDArray[np.integer[Any]]) -> tuple[Ints, Ints]:
    """Return paths as rows padded with -1, and their lengths."""
    if isinstance(paths, np.ndarray):
        table = paths.astype(np.int32, copy=False)
        lengths = np.full(len(table), table.shape[1], dtype=np.int32)
    else:
        lengths = np.array([len(path) for path in paths], dtype=np.int32)
        table = np.full((len(paths), int(lengths.max(initial=0))), -1, dtype=np.int32)
        flat = np.fromiter(chain.from_iterable(paths), dtype=np.int32, count=int(lengths.sum()))
        table[np.arange(table.shape[1]) < lengths[:, None]] = flat
    if len(table) == 0:
        raise DataError("the catalogue has no items; add items", kind="empty")
    if lengths.min() == 0:
        raise DataError(
            f"item {int(lengths.argmin())} of the catalogue has no tokens; give the item a code", kind="missing-value"
        )
    if int(table[:, 0].min()) < 0 or table.min() < -1:
        raise DataError("the catalogue has a negative token id", kind="bad-value")
    return table, lengths


def _path_order(table: Ints) -> NDArray[np.int64]:
    """Return the order that sorts rows by their tokens."""
    lowest = table.min(axis=0).astype(np.int64)
    bits = [int(high - low).bit_length() for high, low in zip(table.max(axis=0).tolist(), lowest.tolist(), strict=True)]
    if sum(bits) <= _MAX_KEY_BITS:
        # One integer per path sorts several times faster than separate columns.
        key = np.zeros(len(table), dtype=np.int64)
        for column, width, low in zip(table.T, bits, lowest, strict=True):
            key <<= width
            key |= column - low
        return np.argsort(key, kind="stable")
    order: NDArray[np.int64] = np.lexsort(table.T[::-1])
    return order


def _build_tree(table: Ints, lengths: Ints, order: NDArray[np.int64]) -> TokenTrie:
    """Build the nodes from sorted rows."""
    # A node begins where a path differs from the previous one, in the same or an earlier token.
    fresh = np.zeros(len(table), dtype=bool)
    fresh[0] = True
    lows = [np.zeros(1, dtype=np.int64)]
    lowest = int(np.where(table < 0, table.max(), table).min())
    kind = np.min_scalar_type(int(table.max()) - lowest)
    marks = [np.zeros(1, dtype=kind)]
    for column in range(table.shape[1]):
        fresh[1:] |= table[1:, column] != table[:-1, column]
        lows.append(np.flatnonzero(fresh & (lengths > column)))
        marks.append((table[lows[-1], column] - lowest).astype(kind))
    _check_unambiguous(table, lengths, order, fresh)
    starts = np.cumsum([0, *(len(low) for low in lows)])
    firsts = [starts[at + 1] + np.searchsorted(after, before) for at, (before, after) in enumerate(pairwise(lows))]
    return TokenTrie(
        marks=np.concatenate(marks),
        lowest=lowest,
        firsts=np.concatenate([*firsts, starts[-1:]]).astype(np.int32),
        lows=np.concatenate([np.empty(0, dtype=np.int64), *lows[:-2]]).astype(np.int32),
        starts=tuple(starts.tolist()),
        order=order.astype(np.int32),
    )


def _check_unambiguous(table: Ints, lengths: Ints, order: NDArray[np.int64], fresh: NDArray[np.bool_]) -> None:
    equal = np.flatnonzero(~fresh)
    if len(equal):
        one, two = sorted((int(order[equal[0] - 1]), int(order[equal[0]])))
        raise DataError(
            f"items {one} and {two} of the catalogue have the same tokens; give each item a unique code",
            kind="duplicate",
        )
    for row in np.flatnonzero(lengths[:-1] < lengths[1:]):
        size = int(lengths[row])
        if np.array_equal(table[row, :size], table[row + 1, :size]):
            one, two = int(order[row]), int(order[row + 1])
            raise DataError(
                f"the tokens of item {one} of the catalogue are a prefix of the tokens of item {two}; end codes with "
                "a line break or the end of the turn",
                kind="duplicate",
            )
