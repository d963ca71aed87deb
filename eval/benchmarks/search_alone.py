"""The catalogue and the search without a model: sections of eval/benchmarks/search.py."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.benchmarks.search_peers import Trie
from eval.benchmarks.timing import Summary, alternated, at_most, faster, summary, within
from llmrec.decode.beam import Fed, Floats, Wanted, beam
from llmrec.decode.token_tree import ROOT, Catalogue

FIRST, LEVEL = 32_000, 256
ROUNDS, USERS, WIDTH, BEST = 3, 8, 20, 10
MILLION = 1_000_000


def made_codes() -> list[tuple[int, ...]]:
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
        "llmrec": lambda: Catalogue.of(codes),
        "llmrec, of lists": lambda: Catalogue.of(listed),
        "dict trie": lambda: Trie(listed),
    }
    seconds, given = alternated(ROUNDS, ways)
    million = given["llmrec"]
    megabytes = million.nbytes / 1e6
    steps = measure_steps()
    return {
        "what": f"The tree of {MILLION:,} items with codes of 4 tokens, {LEVEL} at each level. A step of the search "
        f"alone, no model: {USERS} users, {WIDTH} prefixes kept of 200, 200 more opened.",
        "seconds": seconds,
        "step_seconds": steps,
        "whole_search": measure_searches({"10,000": Catalogue.of(random_codes(10_000)), "1,000,000": million}),
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
        self.at = self.opened = 0
        self.steps: list[tuple[int, int, float]] = []
        self._wanted, self._since = 0, 0.0

    def open(self, prompts: Sequence[Sequence[int]], wanted: Wanted) -> Floats:
        self._wanted = 0
        return self._answers(wanted)

    def feed(self, fed: Fed, wanted: Wanted) -> Floats:
        return self._answers(wanted)

    def close(self) -> None:
        pass

    def _answers(self, wanted: Wanted) -> Floats:
        count = len(wanted.tokens)
        if self._wanted:
            self.steps.append((self._wanted, count, time.perf_counter() - self._since))
        self.at = (self.at + 9973) % (MILLION - count)
        found = self.numbers[self.at : self.at + count]
        self.opened += count
        self._wanted, self._since = count, time.perf_counter()
        return found


def measure_steps() -> Summary:
    """One step between two model calls, with the same number of branches for every catalogue size."""
    ten = np.arange(10, dtype=np.int32)
    trees = {
        f"{10**depth:,} items": Catalogue.of(np.stack(np.meshgrid(*[ten] * depth), axis=-1).reshape(-1, depth))
        for depth in (4, 6)
    }
    engines = {name: Instant() for name in trees}
    for _ in range(100):
        for name, tree in trees.items():
            beam(engines[name], tree, [()] * USERS, k=WIDTH, width=WIDTH)
    full = USERS * WIDTH * len(ten)
    alike = {name: [spent for *sizes, spent in each.steps if sizes == [full, full]] for name, each in engines.items()}
    return {name: summary(spent) for name, spent in alike.items()}


def measure_searches(trees: dict[str, Catalogue]) -> dict[str, Any]:
    """The whole search without a model, over random codes; a larger catalogue has more children per node."""
    engines = {name: Instant() for name in trees}

    def search(name: str) -> Callable[[], Any]:
        return lambda: beam(engines[name], trees[name], [()] * USERS, k=WIDTH, width=WIDTH)

    rounds = 30
    seconds, _ = alternated(rounds, {name: search(name) for name in trees})
    return {
        "seconds": seconds,
        "branches_opened_per_user": {name: engine.opened / rounds / USERS for name, engine in engines.items()},
        "nodes_by_depth": {name: np.diff(tree.starts).tolist() for name, tree in trees.items()},
    }


# --------------------------------------------------------------------------- exact


class Sharp:
    """A model with all its probability on codes: random logits at every node, with a given standard deviation."""

    def __init__(self, tree: Catalogue, users: int, spread: float) -> None:
        counts = np.diff(tree.firsts)
        logits = spread * np.random.default_rng(0).standard_normal((users, len(tree.marks)))
        owners = np.repeat(np.arange(len(counts)), counts)
        weights = np.exp(logits[:, 1:])
        totals = np.stack([np.bincount(owners, row, minlength=len(counts)) for row in weights])
        self.tree, self.logprobs = tree, np.zeros_like(logits)
        self.logprobs[:, 1:] = np.log(weights / totals[:, owners])

    def open(self, prompts: Sequence[Sequence[int]], wanted: Wanted) -> Floats:
        self.nodes = np.full(len(prompts), ROOT)
        self.users = np.array([prompt[0] for prompt in prompts])
        return self._answers(wanted)

    def feed(self, fed: Fed, wanted: Wanted) -> Floats:
        # Codes branch at every token, so no token depends on another one in the same batch.
        self.nodes = np.concatenate([self.nodes, self._children(fed.parents, fed.tokens)])
        self.users = np.concatenate([self.users, self.users[fed.users]])
        return self._answers(wanted)

    def close(self) -> None:
        pass

    def _answers(self, wanted: Wanted) -> Floats:
        found: Floats = self.logprobs[self.users[wanted.after], self._children(wanted.after, wanted.tokens)]
        return found

    def _children(self, parents: Any, tokens: Any) -> Any:
        # The children of a node are numbered without gaps.
        firsts = self.tree.firsts[self.nodes[parents]]
        return firsts + tokens - self.tree.tokens(firsts)


def measure_exact() -> dict[str, Any]:
    """Share of proofs at one width, and the width for proving the others, for models of increasing certainty."""
    tree, users, rows = Catalogue.of(made_codes()), 200, []
    asked = [(n,) for n in range(users)]
    for spread in (0.5, 1.0, 1.5, 2.0, 3.0):
        engine = Sharp(tree, users, spread)
        once = beam(engine, tree, asked, k=BEST, width=WIDTH)
        proven = beam(engine, tree, asked, k=BEST, width=WIDTH, exact=True)
        first = engine.logprobs[:, tree.starts[1] : tree.starts[2]]
        rows.append(
            {
                "spread": spread,
                "perplexity_of_first_token": float(np.exp(-(np.exp(first) * first).sum(1)).mean()),
                "certified": statistics.mean(each.certified for each in once),
                "same_list": statistics.mean(a.items == b.items for a, b in zip(once, proven, strict=True)),
                "median_width": statistics.median(each.width for each in proven),
                "largest_width": max(each.width for each in proven),
            }
        )
    return {
        "what": f"{users} users, {len(tree):,} codes of 4 tokens, the {BEST} best by {WIDTH} beams, then as many as a "
        "proof takes. The models choose by chance among codes, each token with a perplexity that is told.",
        "models": rows,
        "goals": {},
    }
