"""The one index of legal outputs: the token paths of a catalogue, as a tree of at most three integers a node.

Every item is a path of token ids that ends where no other goes on. Sorted, the paths below a node are a range, and the
children of a node stand side by side among the nodes of the next depth. So a node is its token, where its children
begin, and where its range begins. At the last depth, where most nodes are, no node has children, and the range of a
node right above it is as long as the number of its children: what follows from that is not stored. Nothing here grows
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

from llmrec.durable import replacing
from llmrec.errors import DataError, require

Ints = NDArray[np.int32]
Index = NDArray[np.int64]
_LONGEST_KEY = 63
ROOT = 0


@dataclass(frozen=True)
class Catalogue:
    """Token paths of a set of items; nodes by depth and, within one, in the order of their paths.

    Attributes:
        marks: The last token of each node's path, less the lowest of all, in as few bytes as hold it, shape (nodes,);
            node 0 is the root, which has none. `tokens` tells them.
        lowest: The lowest token.
        firsts: The first child of each node above the last depth, and one past the last node, shape
            (starts[depth] + 1,); those of node v end where those of v + 1 begin.
        lows: Where each node's items begin among the sorted paths, of all nodes whose children may have children,
            shape (starts[depth - 1],). `below` tells the others.
        starts: The first node of each depth, and one past the last node; depth 0 is the root.
        order: Which item each sorted path is, as its place in the sequence that was given, shape (items,).
    """

    marks: NDArray[np.unsignedinteger[Any]]
    lowest: int
    firsts: Ints
    lows: Ints
    starts: tuple[int, ...]
    order: Ints

    @staticmethod
    def of(paths: Sequence[Sequence[int]] | NDArray[np.integer[Any]]) -> Catalogue:
        """Build the tree.

        Args:
            paths: One path an item; or equally long ones as an array, shape (items, length).

        Raises:
            DataError: If a path is empty, two are equal, or one begins another.
        """
        table, lengths = _table(paths)
        order = _sorted(table)
        return _tree(table[order], lengths[order], order)

    def __len__(self) -> int:
        """Number of items."""
        return len(self.order)

    @property
    def depth(self) -> int:
        """Tokens of the longest path."""
        return len(self.starts) - 2

    @property
    def nbytes(self) -> int:
        """Size of the arrays in bytes."""
        return int(self.marks.nbytes + self.firsts.nbytes + self.lows.nbytes + self.order.nbytes)

    @cached_property
    def places(self) -> Ints:
        """Where each item stands among the sorted paths, shape (items,)."""
        result = np.empty(len(self.order), dtype=np.int32)
        result[self.order] = np.arange(len(self.order), dtype=np.int32)
        return result

    def tokens(self, nodes: NDArray[np.integer[Any]]) -> Index:
        """Return the last token of the paths of nodes below the root, shape (n,)."""
        result: Index = self.marks[nodes].astype(np.int64) + self.lowest
        return result

    def spans(self, nodes: NDArray[np.integer[Any]]) -> tuple[Index, Index]:
        """Return the first child of each node and how many it has, shape (n,) each."""
        last = len(self.firsts) - 1
        first = self.firsts[np.minimum(nodes, last)].astype(np.int64)
        return first, self.firsts[np.minimum(nodes + 1, last)] - first

    def below(self, nodes: Index, lows: Index, highs: Index) -> Below:
        """Return the children of nodes.

        Args:
            nodes: Where, shape (n,).
            lows: Where the items of each begin among the sorted paths.
            highs: Where they end.
        """
        first, counts = self.spans(nodes)
        parents = np.repeat(np.arange(len(nodes)), counts)
        heads = np.cumsum(counts) - counts
        children = np.repeat(first - heads, counts) + np.arange(len(parents))
        deep = children >= len(self.lows)
        begins = np.empty(0, dtype=np.int64)
        if deep.any():
            # What lies below these are single tokens, each the end of an item, or nothing where they end one.
            sizes = np.maximum(self.spans(children)[1], 1)
            passed = np.cumsum(sizes) - sizes
            begins = np.repeat(lows - passed[np.minimum(heads, len(passed) - 1)], counts) + passed
        if not deep.all():
            begins = np.where(deep, begins if len(begins) else 0, self.lows[np.where(deep, 0, children)])
        # The items of the last sibling end where its parent's do.
        ends = np.append(begins[1:], 0)
        ends[(heads + counts - 1)[counts > 0]] = highs[counts > 0]
        return Below(parents, children, begins, ends)

    def path(self, place: int) -> tuple[int, ...]:
        """Return the tokens of the path at a place of the sorted order."""
        return tuple(token for token, _ in self.choices(place))

    def choices(self, place: int) -> list[tuple[int, Index]]:
        """Return the tokens of the path at a place of the sorted order, each beside all that may stand there."""
        results: list[tuple[int, Index]] = []
        opened = self.below(np.array([ROOT]), np.array([0]), np.array([len(self)]))
        while len(opened.nodes):
            at = [int(np.searchsorted(opened.lows, place, side="right")) - 1]
            legal = self.tokens(opened.nodes)
            results.append((int(legal[at[0]]), legal))
            opened = self.below(opened.nodes[at], opened.lows[at], opened.highs[at])
        return results

    def save(self, file: Path) -> None:
        """Write the arrays as safetensors, in one step."""
        arrays = {name: getattr(self, name) for name in ("marks", "firsts", "lows", "order")}
        numbers = {name: np.array(getattr(self, name), dtype=np.int64) for name in ("starts", "lowest")}
        with replacing(file) as draft:
            require("safetensors.numpy", "train").save_file({**arrays, **numbers}, draft)

    @staticmethod
    def load(file: Path) -> Catalogue:
        """Read what `save` wrote.

        Raises:
            DataError: If the file cannot be read.
        """
        tensors = require("safetensors.numpy", "train")
        try:
            result = tensors.load_file(file)
            starts, lowest = (result.pop(name) for name in ("starts", "lowest"))
            return Catalogue(starts=tuple(int(start) for start in starts), lowest=int(lowest), **result)
        except Exception as error:
            raise DataError(
                f"the catalogue {file} cannot be read ({error}); make it again", kind="damaged", at=file
            ) from error


@dataclass(frozen=True)
class Below:
    """Children of nodes, side by side.

    Attributes:
        parents: Which of the nodes each is a child of, ascending, shape (n,).
        nodes: The children.
        lows: Where the items of each begin among the sorted paths.
        highs: Where they end.
    """

    parents: Index
    nodes: Index
    lows: Index
    highs: Index


def _table(paths: Sequence[Sequence[int]] | NDArray[np.integer[Any]]) -> tuple[Ints, Ints]:
    """Return paths as rows, -1 behind their ends, and their lengths."""
    if isinstance(paths, np.ndarray):
        table = paths.astype(np.int32, copy=False)
        lengths = np.full(len(table), table.shape[1], dtype=np.int32)
    else:
        lengths = np.array([len(path) for path in paths], dtype=np.int32)
        table = np.full((len(paths), int(lengths.max(initial=0))), -1, dtype=np.int32)
        flat = np.fromiter(chain.from_iterable(paths), dtype=np.int32, count=int(lengths.sum()))
        table[np.arange(table.shape[1]) < lengths[:, None]] = flat
    if len(table) == 0:
        raise DataError("the catalogue holds no item; give it some", kind="empty")
    if lengths.min() == 0:
        raise DataError(
            f"item {int(lengths.argmin())} of the catalogue has no tokens; give it a code", kind="missing-value"
        )
    if int(table[:, 0].min()) < 0 or table.min() < -1:
        raise DataError("the catalogue holds a negative token id", kind="bad-value")
    return table, lengths


def _sorted(table: Ints) -> NDArray[np.int64]:
    """Return the order of rows by their tokens."""
    lowest = table.min(axis=0).astype(np.int64)
    bits = [int(high - low).bit_length() for high, low in zip(table.max(axis=0).tolist(), lowest.tolist(), strict=True)]
    if sum(bits) <= _LONGEST_KEY:
        # One integer a path sorts several times faster than its columns one by one.
        key = np.zeros(len(table), dtype=np.int64)
        for column, width, low in zip(table.T, bits, lowest, strict=True):
            key <<= width
            key |= column - low
        return np.argsort(key, kind="stable")
    order: NDArray[np.int64] = np.lexsort(table.T[::-1])
    return order


def _tree(table: Ints, lengths: Ints, order: NDArray[np.int64]) -> Catalogue:
    """Cut sorted rows into nodes."""
    # A node begins where a path differs from the one before it in its own token or an earlier one.
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
    _refuse_ambiguous(table, lengths, order, fresh)
    starts = np.cumsum([0, *(len(low) for low in lows)])
    firsts = [starts[at + 1] + np.searchsorted(after, own) for at, (own, after) in enumerate(pairwise(lows))]
    return Catalogue(
        marks=np.concatenate(marks),
        lowest=lowest,
        firsts=np.concatenate([*firsts, starts[-1:]]).astype(np.int32),
        lows=np.concatenate([np.empty(0, dtype=np.int64), *lows[:-2]]).astype(np.int32),
        starts=tuple(starts.tolist()),
        order=order.astype(np.int32),
    )


def _refuse_ambiguous(table: Ints, lengths: Ints, order: NDArray[np.int64], fresh: NDArray[np.bool_]) -> None:
    equal = np.flatnonzero(~fresh)
    if len(equal):
        one, two = sorted((int(order[equal[0] - 1]), int(order[equal[0]])))
        raise DataError(
            f"items {one} and {two} of the catalogue have the same tokens; give each its own code", kind="duplicate"
        )
    for place in np.flatnonzero(lengths[:-1] < lengths[1:]):
        size = int(lengths[place])
        if np.array_equal(table[place, :size], table[place + 1, :size]):
            one, two = int(order[place]), int(order[place + 1])
            raise DataError(
                f"the tokens of item {one} of the catalogue begin those of item {two}; end codes by a line break or "
                "the end of the turn",
                kind="duplicate",
            )
