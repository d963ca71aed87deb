"""Rollouts: only items, drawn as often as their probabilities say, whoever else is asked."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chisquare

from llmrec.decode.beam import Fed, Floats, Targets
from llmrec.decode.rollouts import Group, Way, rollouts
from llmrec.decode.token_tree import Catalogue

WAYS: tuple[Way, ...] = ("beam", "sampled", "without-replacement")
# Six items, and branchings after none, one and two tokens; the middle of (3, 1, 2) is forced.
PATHS = ((1, 1), (1, 2), (2,), (3, 1, 2), (3, 1, 3), (3, 4))
SIZE, MANY = 6, 3000


class Markov:
    """A `TreeEngine` whose next token depends on the token before it alone, with mass on tokens that are no branch."""

    def __init__(self, table: NDArray[np.float64]) -> None:
        self.table = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
        self.last: list[int] = []

    def open(self, prompts: object, wanted: Targets) -> Floats:
        self.last = [each[-1] for each in prompts]  # type: ignore[attr-defined]
        return self._read(wanted)

    def feed(self, fed: Fed, wanted: Targets) -> Floats:
        self.last += fed.tokens.tolist()
        return self._read(wanted)

    def close(self) -> None:
        self.last = []

    def _read(self, wanted: Targets) -> Floats:
        return np.array([self.table[self.last[n], t] for n, t in zip(wanted.after, wanted.tokens, strict=True)])


def engine(seed: int = 0) -> Markov:
    return Markov(np.random.default_rng(seed).normal(size=(SIZE, SIZE)))


def draw(way: Way, prompts: list[list[int]], count: int, temperature: float = 1.0, first: int = 0) -> list[Group]:
    seeds = [first + n for n in range(len(prompts))]
    tree = Catalogue.of(PATHS)
    return rollouts(engine(), tree, prompts, way=way, count=count, temperature=temperature, seeds=seeds)


def policy(last: int, temperature: float = 1.0) -> NDArray[np.float64]:
    """The probability of each item, by going through all paths."""
    table, found = engine().table / temperature, []
    for path in PATHS:
        p, before = 1.0, last
        for depth, token in enumerate(path):
            legal = {other[depth] for other in PATHS if other[:depth] == path[:depth]}
            p *= np.exp(table[before, token]) / sum(np.exp(table[before, each]) for each in legal)
            before = token
        found.append(p)
    return np.array(found)


def test_the_policy_is_one_over_the_catalogue() -> None:
    assert policy(0).sum() == pytest.approx(1, abs=1e-12)
    assert policy(0, 0.3).max() > policy(0).max()


@pytest.mark.parametrize("way", WAYS)
def test_groups_are_different_items_whose_weights_sum_to_one(way: Way) -> None:
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


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sets_without_replacement_are_drawn_as_often_as_enumeration_says(temperature: float) -> None:
    """Drawing three items one after the other, each in proportion to its share of what is left."""
    p = policy(0, temperature)
    wanted: Counter[tuple[int, ...]] = Counter()
    for order in permutations(range(len(PATHS)), 3):
        chance, left = 1.0, 1.0
        for item in order:
            chance, left = chance * p[item] / left, left - p[item]
        wanted[tuple(sorted(order))] += chance  # type: ignore[assignment]
    groups = draw("without-replacement", [[0]] * MANY, 3, temperature)
    seen = Counter(tuple(sorted(group.items.tolist())) for group in groups)
    assert set(seen) <= set(wanted)
    often = [key for key in wanted if wanted[key] * MANY >= 5]
    rest = max(MANY - sum(seen[key] for key in often), 0)
    observed = [*(seen[key] for key in often), rest]
    expected = [*(wanted[key] * MANY for key in often), MANY - sum(wanted[key] * MANY for key in often)]
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
def test_a_mean_over_groups_is_that_over_the_catalogue(way: Way) -> None:
    values = np.array([0.0, 1.0, 5.0, -2.0, 3.0, 0.5])
    true = float(policy(0) @ values)
    means = [float(group.weights @ values[group.items]) for group in draw(way, [[0]] * MANY, 4)]
    # Normalised weights are biased by less than the noise of so many groups.
    assert np.mean(means) == pytest.approx(true, abs=4 * np.std(means) / np.sqrt(MANY) + 0.02)


@pytest.mark.parametrize("way", WAYS)
def test_a_draw_depends_on_its_prompt_and_seed_alone(way: Way) -> None:
    together = draw(way, [[0], [5], [1, 2], [0]], 3)
    for n, prompt in enumerate([[0], [5], [1, 2], [0]]):
        (alone,) = draw(way, [prompt], 3, first=n)
        assert alone.items.tolist() == together[n].items.tolist()
        assert alone.weights.tolist() == together[n].weights.tolist()
