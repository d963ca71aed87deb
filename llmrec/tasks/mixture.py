"""One stream of training rows from several tasks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from llmrec.errors import RecipeError

T = TypeVar("T")


def interleave(
    streams: Mapping[str, Iterator[T]],
    weights: Mapping[str, float],
    seed: int,
    size: Callable[[T], int] | None = None,
) -> Iterator[tuple[str, T]]:
    """Interleave streams of rows so that their shares follow the weights; yields each row with its stream's name.

    The next row comes from the stream that is furthest behind its share of what was given out so far. That is
    deterministic, and after any number of rows each stream is within one row of its share.

    Args:
        streams: Rows by name.
        weights: By name; streams of weight 0 give no rows.
        seed: Decides who goes first where several are equally far behind.
        size: What a row counts, such as its number of tokens; None: one, so that shares are shares of rows.

    Raises:
        RecipeError: If no weight is above 0.
    """
    order = sorted(name for name, weight in weights.items() if weight > 0)
    if not order:
        raise RecipeError("every task has weight 0, so there is nothing to train on; set tasks.<family>.weight")
    random.Random(seed).shuffle(order)
    return _interleave({name: streams[name] for name in order}, weights, size)


def _interleave(
    streams: Mapping[str, Iterator[T]], weights: Mapping[str, float], size: Callable[[T], int] | None
) -> Iterator[tuple[str, T]]:
    served = dict.fromkeys(streams, 0.0)
    while True:
        name = min(streams, key=lambda each: served[each] / weights[each])
        try:
            row = next(streams[name])
        except StopIteration:
            return
        # A row that counts nothing would be chosen for ever.
        served[name] += max(1, size(row)) if size else 1
        yield name, row
