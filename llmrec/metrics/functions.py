"""Ranking metrics as functions of ranked lists and relevant items: ``llmrec.metrics.ndcg(lists, truth, k=10)``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from llmrec.data.lists import GroundTruth, RankedLists, read_lists, read_truth
from llmrec.errors import RecipeError
from llmrec.metrics.multi_target import RelevantRanks, RequestItemValues, match_relevant
from llmrec.registry import METRICS, import_attribute

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, repr=False)
class Metric:
    """A ranking metric of `llmrec.registry.METRICS` as a function.

    Users without a list count as 0, users without relevant items are left out, and tied scores are resolved by
    expectation; see `llmrec.metrics.multi_target`. `llmrec.score` computes all metrics with intervals.

    Attributes:
        name: Its name in tables.
    """

    name: str

    def __call__(self, lists: Any, truth: Any, k: int | None = 10, *, graded: bool = False) -> float:
        """Return the mean over users.

        Args:
            lists: The items of each user, best first, as ``{user: [item, ...]}`` or a sequence of lists; or a frame or
                a file as `llmrec.score` takes it.
            truth: The relevant items of each user, as ``{user: item}``, ``{user: [item, ...]}`` or
                ``{user: {item: relevance}}``, or a sequence in the order of ``lists``; or a frame or a file.
            k: The number of first items that count; None: all, for metrics without a cut-off.
            graded: Whether NDCG uses the relevance as gain; otherwise every relevant item has a gain of 1.

        Raises:
            DataError: If the lists or the relevant items cannot be read.
            RecipeError: If the metric cannot be cut at ``k``.
        """
        return float(np.mean(list(self.per_user(lists, truth, k, graded=graded).values())))

    def per_user(self, lists: Any, truth: Any, k: int | None = 10, *, graded: bool = False) -> dict[str, float]:
        """Return the value of each user, sorted by user; see `__call__`."""
        entry = METRICS[self.name]
        uncut = k is None and entry.both
        if isinstance(k, bool) or not (uncut or (isinstance(k, int) and k >= 1)):
            raise RecipeError(
                f"k: {k!r} is not a valid cut-off for {self.name}; use at least 1", kind="bad-value", column="k"
            )
        relevant = read_truth(_relevance_records(truth))
        ranked = read_lists(_ranking_records(lists), relevant.unit)
        keys = relevant.frame["key"].unique().sort()
        values = import_attribute(entry.several)(match_lists(ranked, relevant, keys, graded=graded), k)
        return dict(zip(keys.to_list(), values.tolist(), strict=True))

    def __repr__(self) -> str:
        return f"{self.name}: {METRICS[self.name].about}"


def match_lists(lists: RankedLists, truth: GroundTruth, keys: pl.Series, *, graded: bool = False) -> RelevantRanks:
    """Match ranked lists with relevant items.

    Args:
        lists: The lists; those of other keys are left out.
        truth: The relevant items.
        keys: The keys of ``truth``, sorted.
        graded: Use the relevance as gain; otherwise every relevant item has gain 1.
    """
    frame, relevant = lists.frame.filter(pl.col("key").is_in(keys.implode())), truth.frame
    items = pl.concat([frame["item"], relevant["item"]]).unique().sort()
    gains = relevant["gain"].to_numpy() if graded else np.ones(relevant.height)
    ranked = RequestItemValues(
        _sorted_positions(frame["key"], keys), _sorted_positions(frame["item"], items), frame["score"].to_numpy()
    )
    return match_relevant(
        ranked,
        RequestItemValues(_sorted_positions(relevant["key"], keys), _sorted_positions(relevant["item"], items), gains),
        len(keys),
    )


def _sorted_positions(names: pl.Series, known: pl.Series) -> NDArray[np.int64]:
    return known.search_sorted(names).to_numpy().astype(np.int64)


def _entries_by_user(data: Any) -> Iterable[tuple[Any, Any]] | None:
    """Return the entries by user; None for data frames, lists of records and paths."""
    if isinstance(data, Mapping):
        return data.items()
    rows = isinstance(data, list) and data and isinstance(data[0], Mapping)
    return enumerate(data) if isinstance(data, list | tuple) and not rows else None


def _ranking_records(data: Any) -> Any:
    users = _entries_by_user(data)
    return data if users is None else [{"user": str(user), "items": [*map(str, items)]} for user, items in users]


def _relevance_records(data: Any) -> Any:
    if (users := _entries_by_user(data)) is None:
        return data
    rows = []
    for user, items in users:
        single = isinstance(items, str) or not isinstance(items, Iterable)
        for item in [items] if single else items:
            gain = float(items[item]) if isinstance(items, Mapping) else 1.0
            rows.append({"user": str(user), "item": str(item), "relevance": gain})
    return rows
