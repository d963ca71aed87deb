"""Cuts a stream of rows into optimiser steps of about equal work."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from llmrec.backends.encode import IGNORED, Encoder, Row, pieces
from llmrec.train.packing import Bin, bins
from llmrec.types import Example

# Rows sorted together: larger means less padding, smaller means better mixed steps.
_BUFFER_STEPS = 8


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one optimiser step; with ``bins``, how they are packed into masked rows."""

    rows: tuple[Row, ...]
    bins: tuple[Bin, ...] = ()

    @property
    def padded_tokens(self) -> int:
        """Tokens computed, padding included."""
        if self.bins:
            return len(self.bins) * max(each.columns for each in self.bins)
        return len(self.rows) * max(len(row.ids) for row in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens computed without padding; what masked rows share counts once."""
        if self.bins:
            return sum(each.columns for each in self.bins)
        return sum(len(row.ids) for row in self.rows)

    @property
    def targets(self) -> int:
        """Tokens with loss."""
        return sum(row.targets for row in self.rows)


def plan(
    rows: Iterator[Row],
    *,
    steps: int,
    batch_tokens: int,
    seed: int,
    width: int | None = None,
    band: int | None = None,
) -> list[Step]:
    """Group rows into steps of at most ``batch_tokens`` padded tokens, in seeded order.

    Args:
        rows: Training rows, drawn as far as they are needed.
        steps: How many steps to plan at most.
        batch_tokens: Padded tokens of a step. A longer row makes a step of its own.
        seed: Decides the order of steps.
        width: Pack rows into masked rows of so many columns. None: rows of similar length stand together, padded.
        band: Packed rows of lists: how many lines before its own a token sees. None: all.
    """
    rng = random.Random(seed)
    planned: list[Step] = []
    while len(planned) < steps:
        buffer: list[Row] = []
        held = 0
        while held < _BUFFER_STEPS * batch_tokens and (row := next(rows, None)) is not None:
            buffer.append(row)
            held += len(row.ids)
        if not buffer:
            break
        if width is None:
            cut = _cut(sorted(buffer, key=lambda row: len(row.ids)), batch_tokens)
        else:
            made = bins(buffer, min(width, batch_tokens), band)
            cut = _cut_packed(sorted(made, key=lambda each: each.columns), batch_tokens)
        rng.shuffle(cut)
        planned.extend(cut)
    return planned[:steps]


def _cut(rows: Sequence[Row], batch_tokens: int) -> list[Step]:
    lengths = [len(row.ids) for row in rows]
    return [Step(tuple(rows[start:end])) for start, end in _spans(lengths, batch_tokens)]


def _cut_packed(made: Sequence[Bin], batch_tokens: int) -> list[Step]:
    groups = [made[start:end] for start, end in _spans([each.columns for each in made], batch_tokens)]
    return [Step(tuple(row for each in group for row in each.rows), tuple(group)) for group in groups]


def _spans(lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, int]]:
    """Cut ascending lengths into stretches that take at most ``batch_tokens`` once padded."""
    spans, start = [], 0
    for n, length in enumerate(lengths):
        if n > start and (n + 1 - start) * length > batch_tokens:
            spans.append((start, n))
            start = n
    return [*spans, (start, len(lengths))]


def fit_row(example: Example, encoder: Encoder, limit: int, *, lines: bool = False) -> Row | None:
    """Encode a row and cut it to ``limit`` tokens at its end; None if no target is left.

    A user row cut at its end is a shorter user row: the targets that remain see the same context as before. With
    ``lines`` a list row also says where its lines begin.
    """
    row = encoder.row(example)
    starts = tuple(start for start in _lines(example, encoder, len(row.ids)) if start < limit) if lines else ()
    if starts or len(row.ids) > limit:
        row = Row(row.ids[:limit], row.labels[:limit], starts)
    return row if row.targets else None


def _lines(example: Example, encoder: Encoder, length: int) -> list[int]:
    """Return where the lines of a list row begin; a piece of nothing but line breaks belongs to the line before it."""
    if example.ends_turn:
        return []
    texts = pieces(example.answer)
    lengths = [len(encoder.piece(text)) for text in texts]
    starts = accumulate(lengths, initial=length - sum(lengths))
    ended = [True, *(text.endswith("\n") for text in texts)]
    return [start for start, text, fresh in zip(starts, texts, ended, strict=False) if fresh and text.strip("\n")]


def padded(rows: Sequence[Row], pad: int) -> tuple[list[list[int]], list[list[int]]]:
    """Right-pad ids and labels to the longest row."""
    longest = max(len(row.ids) for row in rows)
    ids = [[*row.ids, *[pad] * (longest - len(row.ids))] for row in rows]
    labels = [[*row.labels, *[IGNORED] * (longest - len(row.labels))] for row in rows]
    return ids, labels
