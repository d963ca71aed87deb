"""Packs examples into sequences in which common prefixes are computed only once (shared-prefix packing).

The rows of a packed sequence form a trie in depth-first order: a token's descendants follow it directly. So one number
per column, the end of its subtree, defines the attention mask: column k is an ancestor of column q, or q itself, if
k <= q < end of k. The mask is built from these numbers when a step is computed, and rows with different beginnings do
not see each other. Where rows diverge, the token after a column is not the next column, so targets are pairs of a
column and the token after it, one for each label of each row: a shared token with loss in two rows counts twice, as
without packing. Such masks are known from decoding (tree attention in SpecInfer, arXiv 2305.09781).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmrec.backends.encode import IGNORED, TokenRow

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The rows of a packed sequence, and its number of columns."""

    rows: tuple[TokenRow, ...]
    columns: int


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """A packed sequence of several examples, or a batch of them: shape (columns,), or (sequences, columns) padded.

    Attributes:
        ids: The token of each column.
        positions: The position id of each column, its number of ancestors.
        ends: Where the subtree of each column ends, counted within its sequence; padding sees only itself.
        after: The column that each target follows, counted over all sequences, shape (targets,).
        targets: The target token, shape (targets,).
        weights: The weight of each target, float32, shape (targets,).
        owners: The number of each target's row, in the order of the rows' tokens, shape (targets,).
    """

    ids: Ints
    positions: Ints
    ends: Ints
    after: Ints
    targets: Ints
    weights: NDArray[np.float32]
    owners: Ints


def pack_rows(rows: Sequence[TokenRow]) -> PackedSequence:
    """Arrange tokenised examples as one packed sequence.

    Tokens from the last target of a row on are omitted, since nothing is predicted from them.
    """
    bodies = _sorted_bodies(rows)
    size = sum(len(body.ids) for body in bodies)
    ids, positions, ends = (np.zeros(size, dtype=np.int64) for _ in range(3))
    after, targets, weights = [], [], []
    owners = np.repeat(np.arange(len(bodies)), [len(body.targets) for body in bodies])
    path, columns = np.zeros(0, dtype=np.int64), 0
    for n, body in enumerate(bodies):
        shared = common_prefix_length(bodies[n - 1].ids, body.ids) if n else 0
        grown = columns + len(body.ids) - shared
        ids[columns:grown] = body.ids[shared:]
        positions[columns:grown] = np.arange(shared, len(body.ids))
        path = np.concatenate([path[:shared], np.arange(columns, grown)])
        ends[path] = grown
        after.append(path[body.targets - 1])
        targets.append(body.labels[body.targets])
        weights.append(np.full(len(body.targets), body.row.weight, dtype=np.float32))
        columns = grown
    joined = np.concatenate(after), np.concatenate(targets), np.concatenate(weights)
    return PackedSequence(ids[:columns], positions[:columns], ends[:columns], *joined, owners)


def stack_sequences(packed: Sequence[PackedSequence], pad: int) -> PackedSequence:
    """Stack packed sequences into a batch, padded on the right."""
    longest = max(len(item.ids) for item in packed)
    shape = (len(packed), longest)
    ids, positions = np.full(shape, pad, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    ends = np.tile(np.arange(1, longest + 1), (len(packed), 1))
    for row, item in enumerate(packed):
        filled = len(item.ids)
        ids[row, :filled], positions[row, :filled], ends[row, :filled] = item.ids, item.positions, item.ends
    after = np.concatenate([item.after + row * longest for row, item in enumerate(packed)])
    targets, weights = (np.concatenate([getattr(item, name) for item in packed]) for name in ("targets", "weights"))
    before = accumulate((len(np.unique(item.owners)) for item in packed), initial=0)
    owners = np.concatenate([item.owners + first for item, first in zip(packed, before, strict=False)])
    return PackedSequence(ids, positions, ends, after, targets, weights, owners)


def pack_into_bins(rows: Sequence[TokenRow], width: int) -> list[PackedRows]:
    """Distribute rows over packed sequences of at most ``width`` columns (first-fit decreasing).

    Rows that share at least half of the shorter one stay together as far as ``width`` allows. A row longer than
    ``width`` gets its own sequence.
    """
    groups = sorted(_prefix_groups(rows, width), key=lambda group: -group.columns)
    filled: list[list[_Group]] = []
    room: list[int] = []
    for group in groups:
        first = group.bodies[0]
        for n, others in enumerate(filled):
            # A prefix that is already in the sequence, such as a system message, takes no additional columns.
            shared = max(common_prefix_length(first.ids, other.bodies[0].ids) for other in others)
            if group.columns - shared <= room[n]:
                others.append(group)
                room[n] -= group.columns - shared
                break
        else:
            filled.append([group])
            room.append(width - group.columns)
    return [_packed_rows([body for group in groups for body in group.bodies]) for groups in filled]


def pack_into_one_bin(rows: Sequence[TokenRow]) -> PackedRows:
    """Put all rows in one packed sequence, regardless of its width."""
    return _packed_rows(_sorted_bodies(rows))


def common_prefix_length(one: Ints, two: Ints) -> int:
    """Return the length of the common prefix of two rows."""
    both = min(len(one), len(two))
    parts = one[:both] != two[:both]
    at = int(parts.argmax()) if both else 0
    return at if both and parts[at] else both


class _Body(NamedTuple):
    """A tokenised example as arrays: tokens that are read, all labels, and positions of targets, never the first."""

    row: TokenRow
    ids: Ints
    labels: Ints
    targets: Ints


class _Group(NamedTuple):
    """Rows that are kept together, sorted by their tokens."""

    bodies: list[_Body]
    columns: int


def _sorted_bodies(rows: Sequence[TokenRow]) -> list[_Body]:
    """Sort rows by their tokens, so that neighbouring rows share long prefixes."""
    bodies = []
    for row in rows:
        labels = np.array(row.labels, dtype=np.int64)
        targets = np.flatnonzero(labels[1:] != IGNORED) + 1
        read = int(targets[-1]) if len(targets) else 0
        bodies.append(_Body(row, np.array(row.ids[:read], dtype=np.int64), labels, targets))
    return sorted(bodies, key=lambda body: body.ids.tolist())


def _prefix_groups(rows: Sequence[TokenRow], width: int) -> list[_Group]:
    groups: list[_Group] = []
    for body in _sorted_bodies(rows):
        if groups:
            bodies, columns = groups[-1]
            shared = common_prefix_length(bodies[-1].ids, body.ids)
            grown = columns + len(body.ids) - shared
            if 2 * shared >= min(len(bodies[-1].ids), len(body.ids)) and grown <= width:
                groups[-1] = _Group([*bodies, body], grown)
                continue
        groups.append(_Group([body], len(body.ids)))
    return groups


def _packed_rows(bodies: Sequence[_Body]) -> PackedRows:
    ordered = sorted(bodies, key=lambda body: body.ids.tolist())
    shared = sum(common_prefix_length(one.ids, two.ids) for one, two in pairwise(ordered))
    return PackedRows(tuple(body.row for body in ordered), sum(len(body.ids) for body in ordered) - shared)
