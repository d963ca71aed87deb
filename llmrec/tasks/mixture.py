"""Mixes the training examples of several tasks according to their weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from llmrec.errors import RecipeError
from llmrec.recipe.schema import TrainSection

T = TypeVar("T")


def training_shares(
    weights: Mapping[str, float], size: Callable[[str], int], section: TrainSection
) -> dict[str, float]:
    """Return the relative training share of each task.

    With sizes n, ``proportional`` gives min(n, limit) and ``temperature`` its power of 1 / T, as T5 mixes its tasks
    (Raffel et al., arXiv 1910.10683, section 3.5.2). At T = 1 the two are the same, and with growing T the shares
    become equal. The shares are of tokens, since the example lengths of families differ by an order of magnitude;
    the paper's are shares of examples.

    Args:
        weights: Weights by family; a family of weight 0 is excluded from any mixture.
        size: Returns the number of training interactions of a family; called only if the mixture depends on it.
        section: The recipe's ``train`` section.

    Returns:
        The unchanged weights, or shares that sum to 1.
    """
    chosen = {name: weight for name, weight in weights.items() if weight > 0}
    if section.mixture == "weights" or not chosen:
        return chosen
    raw = dict.fromkeys(chosen, 1.0)
    if section.mixture != "equal":
        power = 1 / section.temperature if section.mixture == "temperature" else 1.0
        sizes = {name: size(name) for name in chosen}
        raw = {name: min(n, section.mixture_limit or n) ** power for name, n in sizes.items()}
    total = sum(raw.values())
    return {name: share / total for name, share in raw.items()}


def interleave(
    streams: Mapping[str, Iterator[T]],
    weights: Mapping[str, float],
    seed: int,
    size: Callable[[T], int] | None = None,
) -> Iterator[tuple[str, T]]:
    """Interleave streams of examples so that their shares follow the weights.

    The next row comes from the stream that is furthest below its share so far. This is deterministic, and after any
    number of rows each stream is within one row of its share.

    Args:
        streams: Rows by name.
        weights: Weights by name; streams of weight 0 yield nothing.
        seed: Breaks ties between streams.
        size: The weight of a row, such as its number of tokens; None: one, so that shares are shares of rows.

    Raises:
        RecipeError: If no weight is above 0.
    """
    order = sorted(name for name, weight in weights.items() if weight > 0)
    if not order:
        raise RecipeError(
            "every task has weight 0, so there is nothing to train on; set tasks.<family>.weight",
            kind="bad-value",
            column="tasks",
        )
    random.Random(seed).shuffle(order)
    return _interleave({name: streams[name] for name in order}, weights, size)


def _interleave(
    streams: Mapping[str, Iterator[T]], weights: Mapping[str, float], size: Callable[[T], int] | None
) -> Iterator[tuple[str, T]]:
    served = dict.fromkeys(streams, 0.0)
    while True:
        name = min(streams, key=lambda stream: served[stream] / weights[stream])
        try:
            row = next(streams[name])
        except StopIteration:
            return
        # A stream of empty examples would be chosen forever.
        served[name] += max(1, size(row)) if size else 1
        yield name, row
