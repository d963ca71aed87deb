"""Rollouts: valid items, drawn with their probabilities, independent of the batch."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chisquare

from llmrec.decode.beam import Floats, LogprobQueries, TreeTokens
from llmrec.decode.rollouts import RolloutGroup, RolloutMethod, sample_rollouts
from llmrec.decode.token_tree import TokenTrie

WAYS: tuple[RolloutMethod, ...] = ("beam", "sampled", "without-replacement")
# Six items, and branchings after none, one and two tokens; the middle of (3, 1, 2) is forced.
PATHS = ((1, 1), (1, 2), (2,), (3, 1, 2), (3, 1, 3), (3, 4))
SIZE, MANY = 6, 3000


class Markov:
    """A `TreeEngine` whose next token depends only on the previous one, with probability on tokens outside the tree."""

    def __init__(self, table: NDArray[np.float64]) -> None:
        self.table = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
        self.last: list[int] = []

    def open(self, prompts: object, targets: LogprobQueries) -> Floats:
        self.last = [each[-1] for each in prompts]  # type: ignore[attr-defined]
        return self._read(targets)

    def feed(self, fed: TreeTokens, targets: LogprobQueries) -> Floats:
        self.last += fed.tokens.tolist()
        return self._read(targets)

    def close(self) -> None:
        self.last = []

    def _read(self, targets: LogprobQueries) -> Floats:
        return np.array([self.table[self.last[n], t] for n, t in zip(targets.after, targets.tokens, strict=True)])


def engine(seed: int = 0) -> Markov:
    return Markov(np.random.default_rng(seed).normal(size=(SIZE, SIZE)))


def draw(
    way: RolloutMethod, prompts: list[list[int]], count: int, temperature: float = 1.0, first: int = 0
) -> list[RolloutGroup]:
    seeds = [first + n for n in range(len(prompts))]
    tree = TokenTrie.of(PATHS)
    return sample_rollouts(engine(), tree, prompts, way=way, count=count, temperature=temperature, seeds=seeds)


def policy(last: int, temperature: float = 1.0) -> NDArray[np.float64]:
    """Return the probability of each item by enumerating all paths."""
    table, probabilities = engine().table / temperature, []
    for path in PATHS:
        p, before = 1.0, last
        for depth, token in enumerate(path):
            legal = {other[depth] for other in PATHS if other[:depth] == path[:depth]}
            p *= np.exp(table[before, token]) / sum(np.exp(table[before, each]) for each in legal)
            before = token
        probabilities.append(p)
    return np.array(probabilities)


@pytest.mark.parametrize("way", WAYS)
def test_groups_have_distinct_items_and_normalized_weights(way: RolloutMethod) -> None:
    for count in (2, 4, 9):
        for group in draw(way, [[0], [5], [2, 3]], count):
            assert len(set(group.items.tolist())) == len(group.items) <= min(count, len(PATHS))
            assert set(group.items.tolist()) <= set(range(len(PATHS)))
            assert group.weights.sum() == pytest.approx(1, abs=1e-12)
            assert (np.diff(group.scores) <= 0).all()
    assert way == "sampled" or len(group.items) == len(PATHS)


def test_scores_are_full_log_probabilities() -> None:
    table = engine().table
    for way in WAYS:
        (group,) = draw(way, [[5]], 9)
        for item, score in zip(group.items.tolist(), group.scores.tolist(), strict=True):
            tokens = (5, *PATHS[item])
            assert score == pytest.approx(sum(table[a, b] for a, b in pairwise(tokens)), abs=1e-9)


def test_sets_without_replacement_have_the_enumerated_frequencies() -> None:
    """Three items are drawn one after another, each in proportion to its share of the remaining probability."""
    temperature = 0.5
    p = policy(0, temperature)
    frequencies: Counter[tuple[int, ...]] = Counter()
    for order in permutations(range(len(PATHS)), 3):
        probability, rest = 1.0, 1.0
        for item in order:
            probability, rest = probability * p[item] / rest, rest - p[item]
        frequencies[tuple(sorted(order))] += probability  # type: ignore[assignment]
    groups = draw("without-replacement", [[0]] * MANY, 3, temperature)
    seen = Counter(tuple(sorted(group.items.tolist())) for group in groups)
    assert set(seen) <= set(frequencies)
    often = [key for key in frequencies if frequencies[key] * MANY >= 5]
    observed = [*(seen[key] for key in often), max(MANY - sum(seen[key] for key in often), 0)]
    expected = [*(frequencies[key] * MANY for key in often), MANY - sum(frequencies[key] * MANY for key in often)]
    if expected[-1] < 1e-6:
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed, expected).pvalue > 0.01


def test_draws_with_replacement_are_counted() -> None:
    p, times = policy(0), np.zeros(len(PATHS))
    for group in draw("sampled", [[0]] * (MANY // 5), 5):
        counts = group.weights * 5
        assert np.abs(counts - counts.round()).max() < 1e-9
        times[group.items] += counts.round()
    assert chisquare(times, p * MANY).pvalue > 0.01


@pytest.mark.parametrize("way", ["sampled", "without-replacement"])
def test_mean_over_groups_is_unbiased(way: RolloutMethod) -> None:
    values = np.array([0.0, 1.0, 5.0, -2.0, 3.0, 0.5])
    true = float(policy(0) @ values)
    means = [float(group.weights @ values[group.items]) for group in draw(way, [[0]] * MANY, 4)]
    # The bias of normalised weights is below the noise of this many groups.
    assert np.mean(means) == pytest.approx(true, abs=4 * np.std(means) / np.sqrt(MANY) + 0.02)


@pytest.mark.parametrize("way", WAYS)
def test_draws_depend_on_prompt_and_seed_only(way: RolloutMethod) -> None:
    together = draw(way, [[0], [5], [1, 2], [0]], 3)
    for n, prompt in enumerate([[0], [5], [1, 2], [0]]):
        (alone,) = draw(way, [prompt], 3, first=n)
        assert alone.items.tolist() == together[n].items.tolist()
        assert alone.weights.tolist() == together[n].weights.tolist()
