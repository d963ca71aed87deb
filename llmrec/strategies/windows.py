"""Ranking by a window that slides from the back of the list to its front (RankGPT, Sun et al., EMNLP 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from llmrec.strategies.asking import Prompting
from llmrec.strategies.rounds import Question, Rounds, Steps, mixed, placed
from llmrec.types import Request


def window_ranker(
    asker: Prompting, *, window: int, window_step: int, permutations: int = 1, training: Sequence[Request] = ()
) -> Rounds:
    """Order one window after the other, each overlapping the one before, so that good items move to the front.

    The window begins at the back of the stored, shuffled order. Inside a window items are ordered by the probability
    of their labels, and shown in an order that says nothing of where they stood.

    Args:
        asker: How to ask.
        window: Items in a window.
        window_step: Places that it moves; fewer than ``window``.
        permutations: Orders in which each window is shown; see `Rounds`.
        training: Questions that measure what positions add; see `Rounds`.
    """
    steps = partial(_slide, window=window, step=window_step)
    return Rounds("window", asker, steps, permutations=permutations, training=training)


def _slide(request: Request, *, window: int, step: int) -> Steps:
    items = list(request.candidates or ())
    for begin, end in window_places(len(items), window, step):
        (said,) = yield [Question(mixed(request, items[begin:end]))]
        items[begin:end] = sorted(items[begin:end], key=lambda item: -said[item])
    return placed(items)


def window_places(count: int, window: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield where the windows over ``count`` items begin and end, from the back to the front; none for one item."""
    begin = max(0, count - window)
    while count > 1:
        yield begin, min(begin + window, count)
        if begin == 0:
            return
        begin = max(0, begin - step)
