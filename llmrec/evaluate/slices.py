"""Metrics on subsets of test cases: cold-start and long-tail items, history length, user activity and attributes.

Slices are defined by counts of training interactions or attributes of users, and on a split by time also by the time
since training. The thresholds are part of the slice's name, which is part of the signature.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from llmrec.data.dataset import Dataset
from llmrec.data.read.codes import PAIR_COLUMNS, coded_pairs
from llmrec.evaluate.compare import is_request_mean
from llmrec.evaluate.figures import EvalProtocol, mean_figure
from llmrec.guard import clean
from llmrec.metrics.signature import parse_signature
from llmrec.results import Metric, SliceOfRow

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset
    from llmrec.types import Case


# --------------------------------------------------------------------------- user attributes
# Subsets by user attributes in the data, such as gender or age.
#
# The limits between subsets are computed from all users of the data, evaluated or not, and are part of their names.
# Values are untrusted, so names contain them percent-encoded.


MAX_VALUES = 8
"""Maximum number of values. With more, numbers are binned into quartiles, words into the most frequent and others."""
# A leading zero marks a code, such as a postcode, and not a number.
_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*)(?:\.\d+)?")
_MAX_VALUE_LENGTH = 60


def user_attributes(dataset: Dataset) -> tuple[str, ...]:
    """Return the names of the user attributes in the data, sorted."""
    return tuple(
        sorted({name for known in dataset.users.values() for name, value in known.items() if _clean_value(value)})
    )


def attribute_slices(users: Sequence[str], dataset: Dataset, name: str) -> dict[str, NDArray[np.bool_]]:
    """Return which cases belong to each subset by a user attribute.

    Args:
        users: The user of every case, shape (n,).
        dataset: The data with its users.
        name: One of `user_attributes`.

    Returns:
        Membership by slice name, shape (n,) each; the slices partition the cases. The last slice has the users without
        a value.
    """
    known = {user: text for user, item in dataset.users.items() if (text := _clean_value(item.get(name, "")))}
    counts = Counter(known.values())
    user_values = [known.get(user) for user in users]
    start = f"user:{quote(name, safe='', errors='backslashreplace')}"
    label, none = _slice_labeller(counts, start), f"{start}:none"
    labels = np.array([none if value is None else label(value) for value in user_values], dtype=object)
    names = dict.fromkeys(label(value) for value in sorted(counts, key=_value_sort_key(counts)))
    # The subset of all other values comes last.
    ordered = sorted(names, key=lambda slice: slice.endswith(":other"))
    return {slice: labels == slice for slice in (*ordered, none)}


def _slice_labeller(counts: Counter[str], start: str) -> Callable[[str], str]:
    """Return a function that maps a value to the name of its subset."""
    if len(counts) > MAX_VALUES and _are_numbers(counts):
        numbers = np.array([float(value) for value in counts.elements()], dtype=np.float64)
        # Limits are values of users; equal limits are merged.
        edges = np.unique(np.quantile(numbers, (0.25, 0.5, 0.75), method="higher"))
        above = numbers[numbers > numbers.min()]
        return _quartile_labeller(
            start, edges[edges > numbers.min()] if edges[-1] > numbers.min() else above.min(keepdims=True)
        )
    kept = (
        set(counts) if len(counts) <= MAX_VALUES else set(sorted(counts, key=_value_sort_key(counts))[: MAX_VALUES - 1])
    )
    return lambda value: f"{start}={quote(value, safe='')}" if value in kept else f"{start}:other"


def _quartile_labeller(start: str, edges: NDArray[np.float64]) -> Callable[[str], str]:
    ends = [np.format_float_positional(edge, trim="-") for edge in edges]
    names = [f"below-{ends[0]}", *(f"{low}-to-{high}" for low, high in pairwise(ends))]
    names.append(f"from-{ends[-1]}")
    return lambda value: f"{start}:{names[int(np.searchsorted(edges, float(value), side='right'))]}"


def _value_sort_key(counts: Counter[str]) -> Callable[[str], tuple[float, str]]:
    """Return the sort key of values: numbers by size, words by number of users."""
    if _are_numbers(counts):
        return lambda value: (float(value), value)
    return lambda value: (-counts[value], value)


def _are_numbers(counts: Counter[str]) -> bool:
    return all(_NUMBER.fullmatch(value) for value in counts)


def _clean_value(value: str) -> str:
    return clean(value, _MAX_VALUE_LENGTH)


COLD_START_LIMIT = 5
"""Items with fewer training interactions are cold-start items."""
HEAD_SHARE = 0.8
"""The most popular items with this share of training interactions are the head, the others the long tail."""
# Lower limits of the bins, except the first: of history lengths and of a user's training interactions, and in
# `target_slices` of an item's training interactions and words.
_LENGTH_EDGES, _COUNT_EDGES, _WORD_EDGES = (5, 10, 20, 50), (1, 5, 20, 100), (8, 16, 32)

SMALL_SLICE = 20
"""A slice with fewer cases is marked as small."""


def case_slices(
    cases: Sequence[Case], data: SplitDataset, attributes: Sequence[str] = ()
) -> dict[str, NDArray[np.bool_]]:
    """Return which cases belong to each subset.

    Item slices require that the item of every request, or its truth, is in the catalogue. The slices of one kind
    partition the cases.

    Args:
        cases: The evaluated cases.
        data: The data, whose training interactions are counted.
        attributes: Attributes of users to slice by; unknown ones are skipped.

    Returns:
        Membership by slice name, shape (n,) each.
    """
    result: dict[str, NDArray[np.bool_]] = {}
    items = [case_item(case, data) for case in cases]
    named = [item for item in items if item is not None]
    if cases and len(named) == len(cases):
        counts = _training_counts(data, "item_id")
        held = np.array([counts.get(item, 0) for item in named], dtype=np.int64)
        result[f"item:cold-below-{COLD_START_LIMIT}"] = held < COLD_START_LIMIT
        result[f"item:warm-from-{COLD_START_LIMIT}"] = held >= COLD_START_LIMIT
        least = _min_head_count(np.array(list(counts.values()), dtype=np.int64))
        result[f"item:head-{HEAD_SHARE}"] = held >= least
        result[f"item:long-tail-{HEAD_SHARE}"] = held < least
    result |= _binned_slices("history", [len(case.request.history) for case in cases], _LENGTH_EDGES)
    active, users = _training_counts(data, "user_id"), [case.request.user_id for case in cases]
    result |= _binned_slices("activity", [active.get(user, 0) for user in users], _LENGTH_EDGES)
    if data.kind == "global_time":
        result |= _age_slices(cases, items, data)
    known = user_attributes(data.dataset) if attributes else ()
    for name in dict.fromkeys(attributes):
        if name in known:
            result |= attribute_slices(users, data.dataset, name)
    return result


def target_slices(cases: Sequence[Case], data: SplitDataset) -> dict[str, NDArray[np.bool_]]:
    """Return which cases belong to subsets by the target's training count, its words, and history length.

    Finer than `case_slices`, for comparisons over many users.

    Args:
        cases: Evaluated cases with an item as truth.
        data: The data, with training interactions and the items' titles and fields.

    Returns:
        Membership by slice name, shape (n,) each; the slices of one kind partition the cases.
    """
    counts = _training_counts(data, "item_id")
    targets = [str(case.truth) for case in cases]
    items = [data.dataset.items[target] for target in targets if target in data.dataset.items]
    result = _binned_slices("count", [counts.get(target, 0) for target in targets], _COUNT_EDGES)
    if items and len(items) == len(targets) and any(item.fields or item.title != item.item_id for item in items):
        item_texts = [" ".join((item.title, *item.fields.values())) for item in items]
        result |= _binned_slices("words", [len(text.split()) for text in item_texts], _WORD_EDGES)
    return result | _binned_slices("history", [len(case.request.history) for case in cases], _LENGTH_EDGES)


def slice_figures(
    values: Mapping[str, NDArray[np.float64]],
    cases: Sequence[Case],
    data: SplitDataset,
    *,
    metrics: Mapping[str, Metric],
    protocol: EvalProtocol,
    attributes: Sequence[str] = (),
) -> tuple[SliceOfRow, ...]:
    """Return the metrics of each subset, with intervals over its users.

    Args:
        values: Per-request values by metric from `EvaluationResult.values`, shape (n,) each. Metrics that are not means
            of them, such as AUC, are omitted.
        cases: The cases in the same order.
        data: See `case_slices`.
        metrics: The overall figures, ``EvaluationResult.figures.metrics``, whose signatures are extended.
        protocol: The settings of intervals.
        attributes: See `case_slices`.

    Returns:
        One entry per slice, including empty ones.
    """
    users = np.array([case.request.user_id for case in cases], dtype=object)
    means = {
        metric: (item, parse_signature(metrics[metric].signature))
        for metric, item in values.items()
        if is_request_mean(metric)
    }
    figures = []
    for name, member in case_slices(cases, data, attributes).items():
        ids = users[member].tolist()
        result = {
            metric: mean_figure(
                metric,
                item[member],
                ids,
                str(replace(sign, slice=name)),
                resamples=protocol.resamples,
                seed=protocol.seed,
            )
            for metric, (item, sign) in means.items()
            if ids
        }
        figures.append(
            SliceOfRow(name=name, n=len(ids), users=len(set(ids)), small=len(ids) < SMALL_SLICE, metrics=result)
        )
    return tuple(figures)


# --------------------------------------------------------------------------- helpers


def case_item(case: Case, data: SplitDataset) -> str | None:
    """Return the item of a case: the item of its request, or its true answer."""
    for item in (case.request.item, case.truth):
        if isinstance(item, str) and item in data.dataset.items:
            return item
    return None


def _min_head_count(counts: NDArray[np.int64]) -> int:
    """Return the minimum training count of popular (head) items."""
    if not counts.size:
        return 1
    falling = np.sort(counts)[::-1]
    index = int(np.searchsorted(np.cumsum(falling), HEAD_SHARE * falling.sum() - 1e-9))
    return int(falling[min(index, len(falling) - 1)])


def _age_slices(cases: Sequence[Case], items: Sequence[str | None], data: SplitDataset) -> dict[str, NDArray[np.bool_]]:
    """Divide held-out interactions into quarters by time; empty if a case has no time."""
    pairs = list(zip([case.request.user_id for case in cases], items, strict=True))
    for held in (data.test, data.valid):
        times = coded_pairs(pairs, held).join(held, on=PAIR_COLUMNS, how="inner", maintain_order="left")["timestamp"]
        if len(times) == len(cases) and not times.has_nulls():
            edges = [held["timestamp"].quantile(share, interpolation="linear") for share in (0.25, 0.5, 0.75)]
            quarter = np.searchsorted(np.array(edges, dtype=np.float64), times.to_numpy(), side="right")
            return {f"age:quarter-{number + 1}": quarter == number for number in range(4)}
    return {}


def _training_counts(data: SplitDataset, column: str) -> dict[str, int]:
    """Return the number of training interactions of each user or item."""
    return dict(data.train.group_by(column).len().iter_rows())


def _binned_slices(kind: str, lengths: Sequence[int], edges: Sequence[int]) -> dict[str, NDArray[np.bool_]]:
    bins = np.searchsorted(np.array(edges), np.array(lengths, dtype=np.int64), side="right")
    starts = (0, *edges)
    names = [f"{kind}:{start}-{end - 1}" for start, end in zip(starts, edges, strict=False)]
    return {name: bins == index for index, name in enumerate([*names, f"{kind}:from-{starts[-1]}"])}
