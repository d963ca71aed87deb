"""Scores candidates behind prompts: their common beginnings merged into one tree a prompt, many prompts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrec.decode.beam import Fed, TreeEngine, Wanted


@dataclass(frozen=True)
class Candidates:
    """Candidates with common beginnings merged.

    Attributes:
        tokens: Every token that another follows, once, parents before their children.
        parents: The token that each follows, counted from 1; 0 is the prompt.
        depths: How many tokens come before each.
        sees: Which tokens each sees: its ancestors and itself, shape (tokens, tokens).
        owners: Of every token of every candidate, the candidate's number.
        after: The token that it follows, counted from 1; 0 is the prompt.
        wanted: The token itself.
    """

    tokens: list[int]
    parents: list[int]
    depths: NDArray[np.int64]
    sees: NDArray[np.bool_]
    owners: NDArray[np.int64]
    after: NDArray[np.int64]
    wanted: NDArray[np.int64]

    @staticmethod
    def of(tails: Sequence[tuple[int, ...]]) -> Candidates:
        """Merge what candidates begin with alike."""
        numbers: dict[tuple[int, ...], int] = {(): 0}
        parents: list[int] = []
        owners, after, wanted = [], [], []
        # In the order of their tokens: half precision rounds by columns, and a score must not depend on the order.
        for owner, tail in sorted(enumerate(tails), key=lambda pair: pair[1]):
            for end, token in enumerate(tail):
                before = tail[:end]
                if before not in numbers:
                    parents.append(numbers[before[:-1]])
                    numbers[before] = len(numbers)
                owners.append(owner)
                after.append(numbers[before])
                wanted.append(token)
        prefixes = list(numbers)[1:]
        sees = np.eye(len(prefixes), dtype=bool)
        for number, parent in enumerate(parents):
            if parent:
                sees[number] |= sees[parent - 1]
        return Candidates(
            tokens=[prefix[-1] for prefix in prefixes],
            parents=parents,
            depths=np.array([len(prefix) - 1 for prefix in prefixes], dtype=np.int64),
            sees=sees,
            owners=np.array(owners, dtype=np.int64),
            after=np.array(after, dtype=np.int64),
            wanted=np.array(wanted, dtype=np.int64),
        )


def read_through(
    engine: TreeEngine, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[tuple[int, ...]]]
) -> list[list[float]]:
    """Score candidates behind each prompt through an engine of searches: all trees are fed at once.

    Args:
        engine: Reads them.
        prompts: Token ids, n of them.
        candidates: The tokens of each prompt's candidates, n lists.

    Returns:
        The log-probability of each candidate, n lists.
    """
    trees = [Candidates.of(tails) for tails in candidates]
    # Prompts are numbered from 0, and all fed tokens behind them.
    begins = np.cumsum([len(prompts), *(len(tree.tokens) for tree in trees)])
    after = [np.where(tree.after == 0, n, tree.after - 1 + begins[n]) for n, tree in enumerate(trees)]
    parents = [
        np.where(np.array(tree.parents) == 0, n, np.array(tree.parents) - 1 + begins[n]) for n, tree in enumerate(trees)
    ]
    every, wanted = np.concatenate(after), np.concatenate([tree.wanted for tree in trees])
    order = np.argsort(every, kind="stable")
    first, later = order[every[order] < len(prompts)], order[every[order] >= len(prompts)]
    found = np.empty(len(order))
    try:
        found[first] = engine.open(prompts, Wanted(every[first], wanted[first]))
        if len(later):
            users = np.repeat(np.arange(len(prompts)), [len(tree.tokens) for tree in trees])
            tokens = np.array([token for tree in trees for token in tree.tokens])
            fed = Fed(users, np.concatenate(parents).astype(np.int64), tokens)
            found[later] = engine.feed(fed, Wanted(every[later], wanted[later]))
    finally:
        engine.close()
    parts = np.split(found, np.cumsum([len(tree.wanted) for tree in trees])[:-1])
    return [sums(part, tree.owners, len(tails)) for part, tree, tails in zip(parts, trees, candidates, strict=True)]


def sums(found: NDArray[np.float64], owners: NDArray[np.int64], count: int) -> list[float]:
    """Add up the tokens of each candidate."""
    return [float(total) for total in np.bincount(owners, weights=found, minlength=count)]
