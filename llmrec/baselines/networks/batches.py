"""Sequences of numbered items as batches: cut into pieces, put together by length, padded on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrec.baselines.base import Log

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """Items and what follows each, padded on the right, shape (b, t); a target of -1 is none."""

    items: NDArray[np.int64]
    targets: NDArray[np.int64]


def pieces_of(events: Log, max_len: int, leads: NDArray[np.int64] | None = None) -> list[NDArray[np.int64]]:
    """Cut every user's items into pieces of at most ``max_len + 1``, from the end.

    Pieces share the item at the cut, which is seen in the one and a target in the other; behind a lead every item of a
    piece is a target, so that they share none.

    Args:
        events: Of training.
        max_len: Items that are seen of a piece.
        leads: What stands before each piece of a user, shape (users,); None: nothing.
    """
    ends = np.cumsum(np.bincount(events.users, minlength=events.user_count))
    pieces = []
    for user, items in enumerate(np.split(events.items.astype(np.int64), ends[:-1])):
        steps = (1, -max_len) if leads is None else (0, -max_len - 1)
        for end in range(len(items), *steps):
            piece = items[max(0, end - max_len - 1) : end]
            pieces.append(piece if leads is None else np.concatenate([leads[user : user + 1], piece]))
    return pieces


def batches_of(sequences: Sequence[NDArray[np.int64]], size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Yield batches of about ``size`` targets, of sequences about as long, in a random order."""
    mixed = rng.permutation(len(sequences))
    lengths = np.array([len(sequences[place]) - 1 for place in mixed])
    order = mixed[np.argsort(lengths, kind="stable")]
    groups: list[list[int]] = [[]]
    for place in order.tolist():
        if groups[-1] and (len(groups[-1]) + 1) * (len(sequences[place]) - 1) > size:
            groups.append([])
        groups[-1].append(place)
    for number in rng.permutation(len(groups)).tolist():
        rows = [sequences[place] for place in groups[number]]
        if rows:
            yield _padded(rows)


def _padded(rows: Sequence[NDArray[np.int64]]) -> Batch:
    longest = max(len(row) for row in rows) - 1
    items = np.zeros((len(rows), longest), dtype=np.int64)
    targets = np.full((len(rows), longest), -1, dtype=np.int64)
    for place, row in enumerate(rows):
        items[place, : len(row) - 1], targets[place, : len(row) - 1] = row[:-1], row[1:]
    return Batch(items, targets)


def of_one_length(histories: Sequence[NDArray[np.int64]], most: int) -> Iterator[NDArray[np.int64]]:
    """Yield the places of histories of the same length, at most ``most`` together; empty ones are left out."""
    lengths = np.array([len(history) for history in histories], dtype=np.int64)
    for length in np.unique(lengths[lengths > 0]).tolist():
        places = np.flatnonzero(lengths == length)
        yield from (places[start : start + most] for start in range(0, len(places), most))
