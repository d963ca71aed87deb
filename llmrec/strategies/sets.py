"""Ranking by the best of small sets, sorted in a heap (setwise, Zhuang et al., SIGIR 2024)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial

from llmrec.strategies.asking import Prompting
from llmrec.strategies.rounds import Question, Rounds, Said, Steps, mixed, placed
from llmrec.types import Request


def setwise_ranker(
    asker: Prompting, *, set_size: int, depth: int, permutations: int = 1, training: Sequence[Request] = ()
) -> Rounds:
    """Sort the top of the list in a heap whose nodes have ``set_size - 1`` children.

    One question finds the best of a node and its children, by the probability of their labels. What the heap has not
    given out after ``depth`` places shares the last place.

    Args:
        asker: How to ask.
        set_size: Most items in a question, at least 2.
        depth: Places that are decided.
        permutations: Orders in which each set is shown; see `Rounds`.
        training: Questions that measure what positions add; see `Rounds`.
    """
    steps = partial(_heap, children=set_size - 1, depth=depth)
    return Rounds("setwise", asker, steps, permutations=permutations, training=training)


def _heap(request: Request, *, children: int, depth: int) -> Steps:
    heap = list(request.candidates or ())
    for node in reversed(range(-(-(len(heap) - 1) // children))):
        yield from _sift(request, heap, node, children)
    best: list[str] = []
    while heap and len(best) < depth:
        best.append(heap[0])
        last = heap.pop()
        if heap:
            heap[0] = last
            if len(best) < depth:
                yield from _sift(request, heap, 0, children)
    return placed(best, heap)


def _sift(request: Request, heap: list[str], node: int, children: int) -> Generator[list[Question], list[Said], None]:
    """Let an item sink until it is the best of its set; of equal ones the upper stays."""
    while places := range(node * children + 1, min((node + 1) * children + 1, len(heap))):
        (said,) = yield [Question(mixed(request, [heap[place] for place in (node, *places)]))]
        best = max((node, *places), key=lambda place: said[heap[place]])
        if best == node:
            return
        heap[node], heap[best] = heap[best], heap[node]
        node = best
