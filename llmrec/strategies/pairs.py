"""Ranking by comparing two candidates at a time (PRP, Qin et al., Findings of NAACL 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import permutations as arrangements

from llmrec.strategies.asking import Prompting
from llmrec.strategies.rounds import Question, Rounds, Said, Steps, by_score, placed
from llmrec.types import Request


def pairwise_ranker(asker: Prompting, *, all_pairs: int, depth: int) -> Rounds:
    """Ask about pairs, each in both orders, and average the two: what a position adds cancels out.

    Up to ``all_pairs`` candidates every pair is asked, and an item's score is the number of others that it beats in
    expectation. More candidates are sorted by passes from the back to the front, in which the better of two neighbours
    moves on: after k passes the first k places are decided. The others share the last place.

    Args:
        asker: How to ask.
        all_pairs: Most candidates of which every pair is asked.
        depth: Passes.
    """
    return Rounds("pairwise", asker, partial(_compare, all_pairs=all_pairs, depth=depth))


def _compare(request: Request, *, all_pairs: int, depth: int) -> Steps:
    items = list(request.candidates or ())
    if len(items) < 2:
        return placed(items)
    if len(items) <= all_pairs:
        pairs = list(arrangements(items, 2))
        said = yield [Question(pair) for pair in pairs]
        return by_score(_wins(items, dict(zip(pairs, said, strict=True))))
    passes = min(depth, len(items) - 1)
    for front in range(passes):
        for place in range(len(items) - 1, front, -1):
            ahead, behind = items[place - 1], items[place]
            one, other = yield [Question((ahead, behind)), Question((behind, ahead))]
            if _lead(behind, ahead, one, other) > 0:
                items[place - 1], items[place] = behind, ahead
    decided = len(items) if passes == len(items) - 1 else passes
    return placed(items[:decided], items[decided:])


def _lead(first: str, second: str, one: Said, other: Said) -> float:
    """Return the log-odds of the first item over the second, the mean over both orders."""
    return (one[first] - one[second] + other[first] - other[second]) / 2


def _wins(items: Sequence[str], said: Mapping[tuple[str, ...], Said]) -> dict[str, float]:
    """Return for each item how many of the others it beats, in expectation."""
    wins = dict.fromkeys(items, 0.0)
    for first, second in said:
        lead = _lead(first, second, said[first, second], said[second, first])
        wins[first] += 0.5 * (1 + math.tanh(lead / 2))
    return wins
