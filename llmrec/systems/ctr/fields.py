"""Converts requests to fields: item and user with attributes, the latest ratings, and count features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from llmrec.baselines.rating_features import RequestFeatures
from llmrec.data.read.codes import values_and_codes
from llmrec.data.split import history_without_item
from llmrec.types import Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

# A field with more values, or longer ones, is a text and not an attribute.
_MAX_VALUES, _MAX_VALUE_LENGTH = 5_000, 60
# Maximum number of values per item and attribute, and minimum number of occurrences of a value.
_MAX_ENTITY_VALUES, _MIN_VALUE_COUNT = 8, 2


@dataclass(frozen=True)
class Attribute:
    """A categorical field of items or users, with values indexed from 1.

    Attributes:
        name: The name of the field.
        numbers: Index by value; other values are unknown, 0.
    """

    name: str
    numbers: Mapping[str, int]

    @staticmethod
    def all_of(entries: Iterable[Mapping[str, str]]) -> tuple[Attribute, ...]:
        """Return the attributes among the fields of items or users."""
        counts: dict[str, Counter[str]] = {}
        for fields in entries:
            for name, value in fields.items():
                counts.setdefault(name, Counter()).update(_split_values(value))
        results = []
        for name, counted in sorted(counts.items()):
            values = sorted(value for value, count in counted.items() if count >= _MIN_VALUE_COUNT)
            longest = max(map(len, values), default=0)
            if len(values) > 1 and len(values) <= _MAX_VALUES and longest <= _MAX_VALUE_LENGTH:
                results.append(Attribute(name, {value: index for index, value in enumerate(values, start=1)}))
        return tuple(results)

    def of(self, entries: Sequence[Mapping[str, str]]) -> NDArray[np.int64]:
        """Return the value indices of each item or user, shape (n, values), padded with 0."""
        table = np.zeros((len(entries), _MAX_ENTITY_VALUES), dtype=np.int64)
        for row, fields in enumerate(entries):
            known = [number for part in _split_values(fields.get(self.name, "")) if (number := self.numbers.get(part))]
            table[row, : min(len(known), _MAX_ENTITY_VALUES)] = known[:_MAX_ENTITY_VALUES]
        return table


def _split_values(value: str) -> list[str]:
    return [part.strip() for part in value.replace(" > ", ", ").split(", ") if part.strip()]


@dataclass(frozen=True)
class EncodedRows:
    """Requests as indices; 0 means unknown or none.

    Attributes:
        users: User indices, shape (n,).
        items: Item indices, shape (n,).
        user_names: The original user ids, shape (n,).
        item_names: The original item ids, shape (n,).
        of_users: Value indices of each user attribute, shape (n, values).
        events: Items of the latest ratings, the last one last, shape (n, window).
        liked: 1 for a like, shape (n, window).
        numbers: Count features, shape (n, k).
        truth: 1 for a yes, shape (n,); 0 if unknown.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    user_names: NDArray[Any]
    item_names: NDArray[Any]
    of_users: tuple[NDArray[np.int64], ...]
    events: NDArray[np.int64]
    liked: NDArray[np.int64]
    numbers: NDArray[np.float32]
    truth: NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.items)

    def of(self, indices: NDArray[np.int64] | NDArray[np.bool_]) -> EncodedRows:
        """Return the selected rows."""
        of_users = tuple(values[indices] for values in self.of_users)
        columns = {name: values[indices] for name, values in vars(self).items() if name != "of_users"}
        return EncodedRows(of_users=of_users, **columns)


@dataclass(frozen=True)
class FieldEncoder:
    """Maps users, items and attribute values to indices.

    Attributes:
        users: Index by id of the users with training ratings.
        items: Index by id of the whole catalogue.
        warm: Indices of the items with training ratings, shape (items + 1,); the others have no embedding.
        item_attributes: The attributes of items.
        item_values: Indices of each item's values, by attribute, shape (items + 1, values).
        user_attributes: The attributes of users.
        profiles: The profiles of users.
        counted: The count features.
        window: Number of latest ratings in the input.
    """

    users: Mapping[str, int]
    items: Mapping[str, int]
    warm: NDArray[np.int64]
    item_attributes: tuple[Attribute, ...]
    item_values: tuple[NDArray[np.int64], ...]
    user_attributes: tuple[Attribute, ...]
    profiles: Mapping[str, Mapping[str, str]]
    counted: RequestFeatures
    window: int

    @staticmethod
    def of(
        data: SplitDataset, name: str, *, liked: float | None, window: int, decay: float
    ) -> tuple[FieldEncoder, EncodedRows]:
        """Return the index mappings, and the training ratings as requests.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        counted, known, numbers = RequestFeatures.of(data, name, liked, decay, before=True)
        items = {item: index for index, item in enumerate(sorted(data.dataset.items), start=1)}
        warm = np.zeros(len(items) + 1, dtype=np.int64)
        warm_items = np.array([items[item] for item in known.item_index])
        warm[warm_items] = warm_items
        entries = [{}, *(data.dataset.items[item].fields for item in items)]
        attributes = Attribute.all_of(entries)
        profiles = {user: dict(data.dataset.users.get(user, {})) for user in known.user_index}
        fields = FieldEncoder(
            users={user: index for index, user in enumerate(known.user_index, start=1)},
            items=items,
            warm=warm,
            item_attributes=attributes,
            item_values=tuple(attribute.of(entries) for attribute in attributes),
            user_attributes=Attribute.all_of(profiles.values()),
            profiles=data.dataset.users,
            counted=counted,
            window=window,
        )
        return fields, fields._training(data, numbers[np.argsort(known.order)])

    def _training(self, data: SplitDataset, numbers: NDArray[np.float64]) -> EncodedRows:
        frames = [data.known.drop_nulls("rating"), data.train.drop_nulls("rating")]
        columns = ["user_id", "item_id", "rating", "timestamp"]
        both = pl.concat([frame.select(pl.col(columns[:2]).cast(pl.String), *columns[2:]) for frame in frames])
        learned = np.arange(both.height) >= frames[0].height
        _, of_user = values_and_codes(both["user_id"])
        keys = [np.arange(both.height), of_user]
        if data.kind == "given":  # a given split may hold out ratings that are older than training ratings
            keys.insert(1, both["timestamp"].fill_null(-np.inf).to_numpy())
        order = np.lexsort(keys)
        items = np.array([self.items.get(item, 0) for item in both["item_id"]], dtype=np.int64)[order]
        likes = (both["rating"].to_numpy() >= self.counted.counts.liked).astype(np.int64)[order]
        of_user, learned = of_user[order], learned[order]
        begins = np.concatenate([[0], np.flatnonzero(of_user[1:] != of_user[:-1]) + 1])
        depth = np.arange(len(items)) - np.repeat(begins, np.diff(np.append(begins, len(items))))
        events = np.zeros((len(items), self.window), dtype=np.int64)
        liked = np.zeros_like(events)
        for back in range(1, self.window + 1):
            usable = np.flatnonzero(depth >= back)
            # an earlier rating of the same item would reveal the answer
            usable = usable[items[usable - back] != items[usable]]
            events[usable, -back], liked[usable, -back] = items[usable - back], likes[usable - back]
        user_names = both["user_id"].to_numpy()[order]
        profiles = [self.profiles.get(user, {}) for user in user_names.tolist()]
        rows = EncodedRows(
            users=np.array([self.users.get(user, 0) for user in user_names.tolist()], dtype=np.int64),
            items=items,
            user_names=user_names,
            item_names=both["item_id"].to_numpy()[order],
            of_users=tuple(user_attribute.of(profiles) for user_attribute in self.user_attributes),
            events=events,
            liked=liked,
            numbers=np.zeros((len(items), numbers.shape[1]), dtype=np.float32),
            truth=likes.astype(np.float32),
        )
        result = rows.of(learned)
        # in the order of the training data, like the count features
        back_in_order = np.argsort(order[learned])
        result = result.of(back_in_order)
        result.numbers[:] = numbers
        return result

    def encode(self, requests: Sequence[Request], truth: Sequence[float] | None = None) -> EncodedRows:
        """Convert requests to indices; a request without an item has item 0."""
        shape = len(requests), self.window
        events, liked = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        level = self.counted.counts.liked
        for row, request in enumerate(requests):
            shown = [
                event for event in history_without_item(request.history, request.item) if event.rating is not None
            ][-self.window :]
            start = self.window - len(shown)
            events[row, start:] = [self.items.get(event.item_id, 0) for event in shown]
            liked[row, start:] = [float(event.rating or 0) >= level for event in shown]
        profiles = [self.profiles.get(request.user_id, {}) for request in requests]
        numbers = [self.counted.row(request) for request in requests]
        return EncodedRows(
            users=np.array([self.users.get(request.user_id, 0) for request in requests], dtype=np.int64),
            items=np.array([self.items.get(request.item or "", 0) for request in requests], dtype=np.int64),
            user_names=np.array([request.user_id for request in requests], dtype=object),
            item_names=np.array([request.item or "" for request in requests], dtype=object),
            of_users=tuple(user_attribute.of(profiles) for user_attribute in self.user_attributes),
            events=events,
            liked=liked,
            numbers=np.array(numbers, dtype=np.float32).reshape(len(requests), len(self.counted.mean)),
            truth=np.zeros(len(requests), np.float32) if truth is None else np.array(truth, np.float32),
        )
