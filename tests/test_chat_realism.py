"""What tells simulated users from people: chance where nothing does, and all where one side has a word of its own."""

from __future__ import annotations

import numpy as np
import pytest

from eval.benchmarks.chat_realism import TITLE, masked, rows_of

WORDS = ("film", "like", "good", "see", "maybe", "old", "new", "fun")


def sessions(count: int, seed: int, own: str = "") -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [[" ".join([*rng.choice(WORDS, 5), own]).strip() for _ in range(4)] for _ in range(count)]


def test_titles_are_one_word_with_their_years() -> None:
    assert masked("I saw Heat (1995) and Heat 2", ["Heat", "Heat 2", ""]) == f"I saw {TITLE} and {TITLE}"


@pytest.mark.parametrize(("own", "low", "high"), [("", 0.35, 0.65), ("indeed", 0.99, 1.0)])
def test_a_classifier_finds_what_there_is_to_find(own: str, low: float, high: float) -> None:
    truth = np.repeat([1.0, 0.0], 40)
    rows = {row["classifier"]: row for row in rows_of([*sessions(40, 0), *sessions(40, 1, own)], truth, "made")}
    assert low <= rows["words"]["auc"] <= high and low <= rows["letters"]["auc"] <= high
    assert all(row["low"] <= row["auc"] <= row["high"] for row in rows.values())
