"""Batches of similar length."""

from __future__ import annotations

from llmrec.models.batching import group_by_length


def test_batches_stay_within_the_limit_and_keep_the_order_of_equal_lengths() -> None:
    lengths = [3, 5, 3, 20, 0, 5]
    assert group_by_length(lengths, 10) == [[4, 0, 2], [1, 5], [3]]
    assert group_by_length(lengths, 10, longest_first=True) == [[3], [1, 5], [0, 2, 4]]
    assert group_by_length([], 10) == []
