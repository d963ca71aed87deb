"""Recognises candidate sets that one next-token distribution can score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Labels:
    """``shared`` tokens that every label starts with, then one distinct token each."""

    shared: tuple[int, ...]
    distinct: tuple[int, ...]


def single_token_labels(tails: Sequence[tuple[int, ...]]) -> Labels | None:
    """Return how labels differ if they do so in exactly one last token, else None.

    A shared first token (some tokenizers write ``" 4"`` as a space and a digit) is moved into the prompt; it adds
    the same amount to every label, so order and normalised distribution stay exact.
    """
    if len(tails) < 2 or len({len(tail) for tail in tails}) != 1 or not tails[0]:
        return None
    shared = tails[0][:-1]
    distinct = tuple(tail[-1] for tail in tails)
    if any(tail[:-1] != shared for tail in tails) or len(set(distinct)) != len(distinct):
        return None
    return Labels(shared, distinct)
