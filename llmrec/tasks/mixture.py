"""One stream of training rows from several tasks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

from llmrec.errors import RecipeError
from llmrec.types import Example, Task


def mixture(
    tasks: Mapping[str, tuple[Task, float]], seed: int, size: Callable[[Example], int] | None = None
) -> Iterator[Example]:
    """Interleave the tasks' training rows so that their shares follow the weights.

    The next row comes from the task that is furthest behind its share of what was given out so far. That is
    deterministic, and after any number of rows each task is within one row of its share.

    Args:
        tasks: A task and its weight, by name; tasks of weight 0 give no rows.
        seed: Decides who goes first where several are equally far behind.
        size: What a row counts, such as its number of tokens; None: one, so that shares are shares of rows.

    Raises:
        RecipeError: If no weight is above 0.
    """
    weights = {name: weight for name, (_, weight) in sorted(tasks.items()) if weight > 0}
    if not weights:
        raise RecipeError("every task has weight 0, so there is nothing to train on; set tasks.<family>.weight")
    order = list(weights)
    random.Random(seed).shuffle(order)
    return _interleave({name: tasks[name][0].examples("train") for name in order}, weights, size)


def _interleave(
    streams: Mapping[str, Iterator[Example]], weights: Mapping[str, float], size: Callable[[Example], int] | None
) -> Iterator[Example]:
    served = dict.fromkeys(streams, 0.0)
    while True:
        name = min(streams, key=lambda each: served[each] / weights[each])
        example = next(streams[name], None)
        if example is None:
            return
        # A row that counts nothing would be chosen for ever.
        served[name] += max(1, size(example)) if size else 1
        yield example
