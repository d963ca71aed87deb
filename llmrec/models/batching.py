"""Groups texts into batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence


def group_by_length(lengths: Sequence[int], limit: int, *, longest_first: bool = False) -> list[list[int]]:
    """Group texts of similar length into batches of at most ``limit`` padded tokens, and return their indices.

    A longer text is a separate batch. Batches have ascending lengths; with ``longest_first`` descending ones, so that
    insufficient memory is noticed early. Texts of equal length keep their order.
    """
    batches: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=longest_first):
        if batches and (len(batches[-1]) + 1) * max(1, lengths[n], lengths[batches[-1][0]]) <= limit:
            batches[-1].append(n)
        else:
            batches.append([n])
    return batches
