"""The benchmark of items that nobody chose: a constant list must not pass for a model."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eval.benchmarks.cold import share

EVENTS, ITEMS = 200, 20


@pytest.fixture(scope="module")
def truth() -> NDArray[np.int64]:
    """Two fifths of all events ask for item 0, the others for any."""
    rng = np.random.default_rng(3)
    return np.where(rng.random(EVENTS) < 0.4, 0, rng.integers(1, ITEMS, EVENTS))


def test_a_constant_list_beats_chance_and_does_not_pass_the_test(truth: NDArray[np.int64]) -> None:
    constant = np.tile(np.arange(1, ITEMS + 1), (EVENTS, 1))
    found = share(constant, truth, 1, 1 / ITEMS)
    assert found["HR"] == pytest.approx(np.mean(truth == 0)) and found["HR"] > 5 * found["chance"]
    assert found["exchanged_histories"] == pytest.approx(found["HR"]) and found["p_over_exchanged"] == 1.0
    assert found["best_constant_list"] == pytest.approx(found["HR"])


def test_a_model_that_reads_the_history_passes_it(truth: NDArray[np.int64]) -> None:
    rng = np.random.default_rng(4)
    ranks = np.array([rng.permutation(ITEMS) + 1 for _ in range(EVENTS)])
    for event in range(0, EVENTS, 2):  # half of the time it knows
        other = int(np.flatnonzero(ranks[event] == 1)[0])
        ranks[event, other], ranks[event, truth[event]] = ranks[event, truth[event]], 1
    found = share(ranks, truth, 1, 1 / ITEMS)
    assert found["p_over_exchanged"] < 0.001 and found["HR"] > found["exchanged_histories"] + 0.2


def test_intervals_are_over_items(truth: NDArray[np.int64]) -> None:
    # All events of item 0 are hits and no other is: as many clusters as items, not events.
    ranks = np.full((EVENTS, ITEMS), 2)
    ranks[:, 0] = 1
    found = share(ranks, truth, 1, 1 / ITEMS)
    narrow = 1.96 * np.sqrt(found["HR"] * (1 - found["HR"]) / EVENTS)
    assert found["high"] - found["low"] > 3 * narrow
