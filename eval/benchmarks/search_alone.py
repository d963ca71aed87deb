"""Benchmarks of the catalogue and the search without a model, sections of eval/benchmarks/search.py."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.benchmarks.search_peers import Trie
from eval.benchmarks.timing import Summary, alternated, at_most, faster, summary, within
from llmrec.decode.beam import Floats, LogprobQueries, TreeTokens, beam_search
from llmrec.decode.token_tree import TokenTrie

FIRST, LEVEL = 32_000, 256
ROUNDS, USERS, WIDTH = 3, 8, 20
MILLION = 1_000_000


def build_codes() -> list[tuple[int, ...]]:
    """10,000 codes of 4 tokens that branch at every token."""
    sizes = (20, 20, 5, 5)
    levels = [range(FIRST + LEVEL * n, FIRST + LEVEL * n + size) for n, size in enumerate(sizes)]
    return list(itertools.product(*levels))


def random_codes(items: int) -> np.ndarray[Any, Any]:
    """Distinct random codes of 4 tokens, with 256 tokens per level."""
    numbers = np.random.default_rng(0).choice(LEVEL**4, size=items, replace=False)
    digits = np.stack([(numbers >> shift) & (LEVEL - 1) for shift in (24, 16, 8, 0)], axis=1)
    return (digits + FIRST + LEVEL * np.arange(4)).astype(np.int32)


# --------------------------------------------------------------------------- catalogue


def measure_catalogue() -> dict[str, Any]:
    """Building the tree of a million items, and the search without a model over ten thousand and a million items."""
    codes = random_codes(MILLION)
    listed = codes.tolist()
    ways: dict[str, Callable[[], Any]] = {
        "llmrec": lambda: TokenTrie.of(codes),
        "llmrec, of lists": lambda: TokenTrie.of(listed),
        "dict trie": lambda: Trie(listed),
    }
    seconds, results = alternated(ROUNDS, ways)
    megabytes = results["llmrec"].nbytes / 1e6
    steps = measure_steps()
    return {
        "what": f"The tree of {MILLION:,} items with codes of 4 tokens, {LEVEL} at each level. A step of the search "
        f"alone, no model: {USERS} users, {WIDTH} prefixes kept of 200, 200 more opened.",
        "seconds": seconds,
        "step_seconds": steps,
        "goals": {
            "making": at_most(seconds["llmrec"], 1.0, "s") | {"what": "seconds to make the tree from an array"},
            "size": at_most({"arrays": megabytes}, 16.0, "MB") | {"what": "megabytes of the tree"},
            "trie": faster(seconds, "dict trie", "llmrec, of lists", 8.0)
            | {"what": "times faster to make from lists than a dict trie"},
            "step": within(steps, "1,000,000 items", "10,000 items", 1.2)
            | {"what": "times as long for a step at a million items as at ten thousand"},
        },
    }


class Instant:
    """Returns random log-probabilities, and records the time of the search between calls."""

    def __init__(self) -> None:
        self.numbers = -np.random.default_rng(0).exponential(size=MILLION)
        self.at = 0
        self.steps: list[tuple[int, int, float]] = []
        self._count, self._since = 0, 0.0

    def open(self, prompts: Sequence[Sequence[int]], targets: LogprobQueries) -> Floats:
        self._count = 0
        return self._answers(targets)

    def feed(self, fed: TreeTokens, targets: LogprobQueries) -> Floats:
        return self._answers(targets)

    def close(self) -> None:
        pass

    def _answers(self, targets: LogprobQueries) -> Floats:
        count = len(targets.tokens)
        if self._count:
            self.steps.append((self._count, count, time.perf_counter() - self._since))
        self.at = (self.at + 9973) % (MILLION - count)
        logprobs = self.numbers[self.at : self.at + count]
        self._count, self._since = count, time.perf_counter()
        return logprobs


def measure_steps() -> Summary:
    """One step between two model calls, with the same number of branches for every catalogue size."""
    ten = np.arange(10, dtype=np.int32)
    trees = {
        f"{10**depth:,} items": TokenTrie.of(np.stack(np.meshgrid(*[ten] * depth), axis=-1).reshape(-1, depth))
        for depth in (4, 6)
    }
    engines = {name: Instant() for name in trees}
    for _ in range(100):
        for name, tree in trees.items():
            beam_search(engines[name], tree, [()] * USERS, k=WIDTH, width=WIDTH)
    full = USERS * WIDTH * len(ten)
    steps = {name: [step for step in engine.steps if step[:2] == (full, full)] for name, engine in engines.items()}
    return {name: summary([seconds for *_, seconds in equal]) for name, equal in steps.items()}
