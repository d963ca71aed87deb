"""Request and candidate features, such as popularity, that a learned ensemble uses in addition to member scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Request

# Share of the training period that counts as recent.
_RECENT_SHARE = 0.1


class ContextFeatures:
    """Item features (popularity, recency, age, price) and history lengths of a split.

    They are computed from training interactions, the catalogue and the history of the request. Features without data
    are left out. Text similarities are not included, since they are in the scores of members that use texts.

    Args:
        data: The split; its held-out interactions are not used.
    """

    def __init__(self, data: SplitDataset) -> None:
        self._data = data
        self.ids = tuple(sorted(data.dataset.items))
        self._codes = {item: code for code, item in enumerate(self.ids)}

    def codes(self, items: Sequence[str]) -> NDArray[np.int64]:
        """Return the codes of items; -1 for an unknown item."""
        return np.array([self._codes.get(item, -1) for item in items], dtype=np.int64)

    def features(
        self, requests: Sequence[Request], rows: NDArray[np.int64], codes: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float32]]:
        """Return each feature for (request, candidate) pairs, shape (n,); NaN if unknown.

        Args:
            requests: The requests.
            rows: The request of each pair, ascending.
            codes: The item of each pair; see `codes`.
        """
        result = {name: _values_at(values, codes) for name, values in self._item_features.items()}
        lengths = np.log1p([len(request.history) for request in requests])
        return result | {"history: length": lengths.astype(np.float32)[rows]}

    @cached_property
    def _item_features(self) -> Mapping[str, NDArray[np.float32]]:
        train = self._data.train
        counts = self._count_interactions(train)
        result = {"item: popularity": np.log1p(counts)}
        times = train["timestamp"].drop_nulls()
        if len(times) == len(train) and len(times) and times.min() != times.max():
            start, end = float(times.min()), float(times.max())  # type: ignore[arg-type]
            recent = train.filter(pl.col("timestamp") >= end - _RECENT_SHARE * (end - start))
            result["item: recent popularity"] = np.log1p(self._count_interactions(recent))
            first = np.full(len(self.ids), np.nan)
            begins = train.group_by("item_id").agg(pl.col("timestamp").min())
            first[self.codes(begins["item_id"].cast(pl.String).to_list())] = begins["timestamp"].to_numpy()
            result["item: age"] = (end - first) / (end - start)
        prices = [_parse_price(self._data.dataset.items[item].fields.get("price")) for item in self.ids]
        if not np.isnan(prices).all():
            result["item: price"] = np.log1p(np.maximum(prices, 0))
        return {name: np.asarray(values, dtype=np.float32) for name, values in result.items()}

    def _count_interactions(self, rows: pl.DataFrame) -> NDArray[np.float64]:
        counts = np.zeros(len(self.ids))
        known = rows["item_id"].cast(pl.String).value_counts()
        counts[self.codes(known["item_id"].to_list())] = known["count"].to_numpy()
        return counts


def _values_at(values: NDArray[np.float32], codes: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.where(codes >= 0, values[np.maximum(codes, 0)], np.float32(np.nan))


def _parse_price(text: str | None) -> float:
    try:
        return float(str(text).strip().lstrip("$€£"))
    except ValueError:
        return float("nan")
