"""Slices by what a source knows of a user, such as gender or age.

Where a slice begins and ends is read off all users of the data, evaluated or not, and stands in its name. Values are
what others wrote, so that a name holds them percent-encoded: no value can end a name, or pass for another slice.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from llmrec.data.dataset import Dataset
from llmrec.guard import clean

MOST = 8
"""An attribute of more values is cut: numbers into quartiles, words into the most frequent and the others."""
# A leading zero marks a code, such as a postcode, and no number.
_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*)(?:\.\d+)?")
_LONG = 60


def attributes_of(dataset: Dataset) -> tuple[str, ...]:
    """Return the names of the attributes that some user of the data has, sorted."""
    return tuple(sorted({name for known in dataset.users.values() for name, value in known.items() if _said(value)}))


def attribute_slices(users: Sequence[str], dataset: Dataset, name: str) -> dict[str, NDArray[np.bool_]]:
    """Say for each slice of one attribute which cases belong to it.

    Args:
        users: The user of every case, shape (n,).
        dataset: Says who its users are.
        name: One of `attributes_of`.

    Returns:
        Membership by slice name, shape (n,) each; together they hold every case once. The last slice is that of users
        without a value.
    """
    known = {user: said for user, each in dataset.users.items() if (said := _said(each.get(name, "")))}
    counts = Counter(known.values())
    own = [known.get(user) for user in users]
    start = f"user:{quote(name, safe='', errors='backslashreplace')}"
    label, none = _labels(counts, start), f"{start}:none"
    labels = np.array([none if value is None else label(value) for value in own], dtype=object)
    names = dict.fromkeys(label(value) for value in sorted(counts, key=_order(counts)))
    # A slice of the rest stands behind those with a name of their own.
    ordered = sorted(names, key=lambda slice: slice.endswith(":other"))
    return {slice: labels == slice for slice in (*ordered, none)}


def _labels(counts: Counter[str], start: str) -> Callable[[str], str]:
    """Return what gives a value the name of its slice."""
    if len(counts) > MOST and _are_numbers(counts):
        numbers = np.array([float(value) for value in counts.elements()], dtype=np.float64)
        # Edges are values that users have; of edges that fall together, as where most users share a value, one stays.
        edges = np.unique(np.quantile(numbers, (0.25, 0.5, 0.75), method="higher"))
        above = numbers[numbers > numbers.min()]
        return _quartiles(
            start, edges[edges > numbers.min()] if edges[-1] > numbers.min() else above.min(keepdims=True)
        )
    kept = set(counts) if len(counts) <= MOST else {value for value, _ in _most_frequent(counts)[: MOST - 1]}
    return lambda value: f"{start}={quote(value, safe='')}" if value in kept else f"{start}:other"


def _quartiles(start: str, edges: NDArray[np.float64]) -> Callable[[str], str]:
    ends = [np.format_float_positional(edge, trim="-") for edge in edges]
    names = [f"below-{ends[0]}", *(f"{low}-to-{high}" for low, high in pairwise(ends))]
    names.append(f"from-{ends[-1]}")
    return lambda value: f"{start}:{names[int(np.searchsorted(edges, float(value), side='right'))]}"


def _order(counts: Counter[str]) -> Callable[[str], tuple[float, str]]:
    """Sort numbers by size, and words by how many users have them."""
    if _are_numbers(counts):
        return lambda value: (float(value), value)
    return lambda value: (-counts[value], value)


def _most_frequent(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda each: (-each[1], each[0]))


def _are_numbers(counts: Counter[str]) -> bool:
    return all(_NUMBER.fullmatch(value) for value in counts)


def _said(value: str) -> str:
    return clean(value, _LONG)
