"""Cuts a stream of rows into optimiser steps of about equal work."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmrec.backends.encode import IGNORED, Encoder, Row
from llmrec.types import Example

# Rows sorted together: larger means less padding, smaller means better mixed steps.
_BUFFER_STEPS = 8


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one optimiser step."""

    rows: tuple[Row, ...]

    @property
    def padded_tokens(self) -> int:
        """Tokens computed, padding included."""
        return len(self.rows) * max(len(row.ids) for row in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def targets(self) -> int:
        """Tokens with loss."""
        return sum(row.targets for row in self.rows)


def plan(rows: Iterator[Row], *, steps: int, batch_tokens: int, seed: int) -> list[Step]:
    """Group rows of similar length into steps of at most ``batch_tokens`` padded tokens, in seeded order.

    A row longer than ``batch_tokens`` makes a step of its own.
    """
    rng = random.Random(seed)
    planned: list[Step] = []
    while len(planned) < steps:
        buffer: list[Row] = []
        while sum(len(row.ids) for row in buffer) < _BUFFER_STEPS * batch_tokens:
            row = next(rows, None)
            if row is None:
                break
            buffer.append(row)
        if not buffer:
            break
        cut = _cut(sorted(buffer, key=lambda row: len(row.ids)), batch_tokens)
        rng.shuffle(cut)
        planned.extend(cut)
    return planned[:steps]


def _cut(rows: Sequence[Row], batch_tokens: int) -> list[Step]:
    steps: list[Step] = []
    group: list[Row] = []
    for row in rows:
        if group and (len(group) + 1) * len(row.ids) > batch_tokens:
            steps.append(Step(tuple(group)))
            group = []
        group.append(row)
    return [*steps, Step(tuple(group))]


def fit_row(example: Example, encoder: Encoder, limit: int) -> Row | None:
    """Encode a row and cut it to ``limit`` tokens at its end; None if no target is left.

    A user row cut at its end is a shorter user row: the targets that remain see the same context as before.
    """
    row = encoder.row(example)
    if len(row.ids) > limit:
        row = Row(row.ids[:limit], row.labels[:limit])
    return row if row.targets else None


def padded(rows: Sequence[Row], pad: int) -> tuple[list[list[int]], list[list[int]]]:
    """Right-pad ids and labels to the longest row."""
    longest = max(len(row.ids) for row in rows)
    ids = [[*row.ids, *[pad] * (longest - len(row.ids))] for row in rows]
    labels = [[*row.labels, *[IGNORED] * (longest - len(row.labels))] for row in rows]
    return ids, labels
