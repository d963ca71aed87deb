"""Splits a data set, and returns histories, requests and texts of held-out interactions.

Ties in time are ordered by a seeded hash of (user, item), not by item id or file order: both can leak the target when
many interactions have the same timestamp. A recipe can select the file order of a published protocol. Without
timestamps, file order is time order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, overload

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.data.dataset import SCHEMA, Dataset
from llmrec.data.derived import with_derived_texts
from llmrec.data.events import Events
from llmrec.data.hashing import digest_frame, digest_strings, hash64
from llmrec.data.read.codes import PAIR_COLUMNS, coded_pairs, values_and_codes
from llmrec.data.split_kinds import (
    KNOWN,
    SPLIT_KINDS,
    TEST,
    TRAIN,
    VALID,
    TimeOrderedRows,
    cold_item_labels,
)
from llmrec.display import Displayed, Summary
from llmrec.errors import DataError
from llmrec.recipe.schema import Split
from llmrec.types import Event, Interaction, Request, SplitName

TieOrder = Literal["hash", "file"]
"""The order of interactions at the same time: a seeded hash, or the order of the rows."""


class Holdouts(Sequence[Interaction]):
    """The held-out interactions of a split, in columns; `Interaction` objects are created on request."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self.frame = frame.select(*SCHEMA)

    def __len__(self) -> int:
        return self.frame.height

    @overload
    def __getitem__(self, index: int) -> Interaction: ...

    @overload
    def __getitem__(self, index: slice) -> Holdouts: ...

    def __getitem__(self, index: int | slice) -> Interaction | Holdouts:
        if isinstance(index, slice):
            return Holdouts(self.frame[index])
        return Interaction(**self.frame.row(index, named=True))

    def __iter__(self) -> Iterator[Interaction]:
        return (Interaction(**row) for row in self.frame.iter_rows(named=True))

    def of(self, users: Collection[str] | None) -> Holdouts:
        """Return the held-out interactions of these users in order; of all users if None."""
        if users is None:
            return self
        names, rows = values_and_codes(self.frame["user_id"])
        return Holdouts(self.frame.filter(names.is_in(list(users)).to_numpy()[rows]))

    def first_users(self, count: int, *, but: Collection[str] = ()) -> tuple[str, ...]:
        """Return the first ``count`` users with held-out interactions, except the users in ``but``."""
        result = self.frame["user_id"].unique(maintain_order=True).cast(pl.String)
        return tuple(result.filter(~result.is_in(list(but))).head(count))


@dataclass(frozen=True, repr=False)
class SplitDataset(Displayed):
    """A data set split into training, validation and test interactions.

    Frames hold the interaction columns, grouped by user, each user's rows in time order.

    Attributes:
        dataset: The data set.
        kind: One of `llmrec.data.split_kinds.SPLIT_KINDS`.
        seed: Seed of ties in time, of the held-out users, and of the order of `holdouts`.
        train: Training interactions.
        valid: Held-out interactions for validation.
        test: Held-out interactions for testing.
        held_out: Every (user_id, item_id) of ``valid`` or ``test``, and all others of ``cold`` items; none of them is
            in ``train``.
        known: Interactions shown as history but never used for training: the past of held-out users.
        cold: Cold-start items: no interaction with them is in ``train``, in ``known`` or in a history.
        drawn: Numbers that order the sampling of ``valid`` rows, smallest first; None: hashes of their ids.
    """

    dataset: Dataset
    kind: str
    seed: int
    train: pl.DataFrame
    valid: pl.DataFrame
    test: pl.DataFrame
    held_out: frozenset[tuple[str, str]]
    known: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=dict(SCHEMA)))
    cold: frozenset[str] = frozenset()
    drawn: NDArray[np.uint64] | None = field(default=None, compare=False)

    def _summary(self) -> Summary:
        parts = {"training": self.train, "validation": self.valid, "test": self.test, "history only": self.known}
        facts = {"split": self.kind, **{name: f"{frame.height:,} interactions" for name, frame in parts.items()}}
        return Summary(f"Split of {self.dataset.name!r}", facts)

    @property
    def measures(self) -> bool:
        """Whether any interaction is held out, so that metrics can be computed."""
        return bool(self.valid.height or self.test.height)

    def without(self, pairs: frozenset[tuple[str, str]]) -> SplitDataset:
        """Return this split without the held-out pairs of another data set."""
        if not pairs:
            return self
        train, known = (
            frame.join(coded_pairs(pairs, frame), on=PAIR_COLUMNS, how="anti", maintain_order="left")
            for frame in (self.train, self.known)
        )
        result = replace(self, train=train, known=known)
        return replace(result, dataset=with_derived_texts(result.dataset, result.train, seed=self.seed))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the data and the assignment of rows to training, validation and test."""
        frames = (self.train, self.valid, self.test, self.known)
        return digest_strings([self.dataset.fingerprint, self.kind, *[digest_frame(frame) for frame in frames]])

    @cached_property
    def readable(self) -> str:
        """SHA-256 over the interactions that models may read: training rows, and rows that are only history."""
        return digest_strings([digest_frame(self.train), digest_frame(self.known)])

    def users(self) -> tuple[str, ...]:
        """Return all users of the data set, sorted."""
        return self._users

    def train_events(self, user_id: str) -> tuple[Event, ...]:
        """Return the training interactions of a user, oldest first; empty for an unknown user."""
        return self._events["train"].of(user_id)

    def known_events(self, user_id: str) -> tuple[Event, ...]:
        """Return the interactions of a user that are only history, oldest first; empty for an unknown user."""
        return self._events["known"].of(user_id)

    def train_counts(self, *, rated: bool = False) -> Mapping[str, int]:
        """Return the number of training interactions (or rated ones) by user."""
        return self._events["train"].counts(rated=rated)

    def history(self, user_id: str, split: SplitName) -> tuple[Event, ...]:
        """Return the interactions of a user before the held-out ones, oldest first.

        For ``train`` and ``valid`` these are the training interactions; for ``test`` the validation interactions follow
        them. A held-out user of a user-disjoint split has the interactions before the held-out one. With
        ``global_time`` all interactions before the split's period are included, and none of that period. With ``given``
        the source decides, regardless of the time of the held-out interaction.
        """
        past = self._events["known"].of(user_id) + self._events["train"].of(user_id)
        if split == "test":
            past += self._events["valid"].of(user_id)
        # A source may hold out interactions that are older than its training rows.
        return past if self.kind != "given" else tuple(sorted(past, key=lambda event: event.timestamp or 0.0))

    def holdouts(self, split: SplitName) -> Holdouts:
        """Return held-out interactions in the order of a seeded hash, so that the first n are an unbiased sample.

        Raises:
            DataError: If ``split`` is the training split, which has no held-out interactions.
        """
        if split == "train":
            raise DataError("the training split has no held-out interactions; use 'valid' or 'test'", kind="bad-value")
        return self._holdouts[split]

    @cached_property
    def _users(self) -> tuple[str, ...]:
        names, row_codes = values_and_codes(self.dataset.interactions["user_id"])
        return tuple(names.filter(np.bincount(row_codes, minlength=len(names)) > 0))

    @cached_property
    def _events(self) -> Mapping[str, Events]:
        frames = {"train": self.train, "valid": self.valid, "known": self.known}
        return {name: Events(frame) for name, frame in frames.items()}

    @cached_property
    def _holdouts(self) -> Mapping[str, Holdouts]:
        return {"valid": _in_hash_order(self.valid, self.seed), "test": _in_hash_order(self.test, self.seed)}


def split_validation_users(data: SplitDataset, share: float) -> tuple[SplitDataset, SplitDataset]:
    """Divide the validation users into two splits: one to select hyperparameters and one to fit ensemble weights.

    Users that set the weights of an ensemble must not have been used to choose a member's hyperparameters or epoch.

    Args:
        data: The split.
        share: Share of the users for weighting, chosen by a seeded hash of the user.
    """
    weighs = hash64("reserved", data.seed, data.valid["user_id"]) < np.uint64(share * 2**64)
    return replace(data, valid=data.valid.filter(~weighs)), replace(data, valid=data.valid.filter(weighs))


def _in_hash_order(frame: pl.DataFrame, seed: int) -> Holdouts:
    # This is not the hash that orders ties: of tied interactions the one with the highest hash is held out, so a sample
    # in the order of that hash would have fewer users with ties.
    key = hash64("holdouts", seed, frame["user_id"], frame["item_id"])
    return Holdouts(frame[np.argsort(key, kind="stable")])


def split_dataset(dataset: Dataset, section: Split, *, seed: int) -> SplitDataset:
    """Hold out validation and test interactions.

    A held-out (user, item) pair occurs nowhere else: earlier interactions of the same pair are dropped. The order of
    rows does not matter if there are timestamps.

    Args:
        dataset: The data set to split.
        section: The recipe's ``data.split``.
        seed: The run's seed.

    Raises:
        DataError: If there are too few interactions or users for the split.
    """
    if (
        section.kind in ("last_share", "global_time", "user_disjoint", "prefix", "cold_items")
        and not 0 < section.valid + section.test < 1
    ):
        raise DataError(
            f"data.split: valid ({section.valid}) and test ({section.test}) are shares; their sum must be between 0 "
            "and 1",
            kind="bad-value",
            column="data.split",
        )
    order = time_order(dataset, seed, moments=section.kind == "global_time", ties=section.ties)
    rows = TimeOrderedRows(dataset.interactions[order])
    labels = SPLIT_KINDS[section.kind](dataset, rows, section, seed)
    frames = [_grouped_by_user(rows, labels == label) for label in (TRAIN, VALID, TEST, KNOWN)]
    if frames[0].is_empty():
        raise DataError.at(
            dataset.name,
            "too-few",
            f": the split {section.kind} leaves no training interaction; hold out fewer interactions",
            "data.split",
        )
    cold = rows.frame[:0]
    if section.kind == "cold_items":
        cold = rows.frame.filter(cold_item_labels(dataset, rows, section, seed) != TRAIN)
    return SplitDataset(
        # Features that the source lacks are derived here, where the training interactions are known.
        dataset=with_derived_texts(dataset, frames[0], seed=seed),
        kind=section.kind,
        seed=seed,
        train=frames[0],
        valid=frames[1],
        test=frames[2],
        held_out=frozenset(pair for frame in (*frames[1:3], cold) for pair in frame.select(PAIR_COLUMNS).iter_rows()),
        known=frames[3],
        cold=frozenset(cold["item_id"].unique()),
    )


def split_without_test(dataset: Dataset, *, seed: int, ties: TieOrder = "hash", valid: float = 0.0) -> SplitDataset:
    """Return a split without test interactions, to train a model that answers requests and is not evaluated.

    Args:
        dataset: The data set.
        seed: Seed of ties in time and of the held-out users.
        ties: The order of interactions at the same time.
        valid: Share of users whose last interaction is held out for validation, to stop training.
    """
    rows = TimeOrderedRows(dataset.interactions[time_order(dataset, seed, ties=ties)])
    train = _grouped_by_user(rows, np.ones(rows.frame.height, dtype=np.bool_))
    none = train.clear()
    data = SplitDataset(with_derived_texts(dataset, train, seed=seed), "given", seed, train, none, none, frozenset())
    if not valid:
        return data
    position, count = pl.int_range(pl.len()).over("user_id"), pl.len().over("user_id")
    last = train.filter((position == count - 1) & (count > 1))
    held = last.filter(pl.Series(hash64("stops", seed, last["user_id"]) < np.uint64(valid * 2**64), dtype=pl.Boolean))
    rest = train.join(held, on=PAIR_COLUMNS, how="anti", maintain_order="left")
    pairs = frozenset(held.select(PAIR_COLUMNS).iter_rows())
    return replace(data, train=rest, valid=held, held_out=pairs) if rest.height else data


def time_order(dataset: Dataset, seed: int, *, moments: bool = False, ties: TieOrder = "hash") -> NDArray[np.integer]:
    """Return the row indices of the interactions, oldest first; without timestamps in row order.

    Args:
        dataset: The data set.
        seed: Seed of the order of ties.
        moments: Whether the order of different users' interactions at the same time matters.
        ties: The order of interactions at the same time: by hash, or by row.
    """
    frame = dataset.interactions
    if not dataset.has_time:
        return np.arange(frame.height)
    times = frame["timestamp"].fill_null(-np.inf).to_numpy()
    order = np.argsort(times, kind="stable")
    if ties == "file":
        return order
    tied = _tied_indices(times[order], None if moments else values_and_codes(frame["user_id"])[1][order])
    if len(tied):
        # The hash matters only for interactions at the same time.
        rows = frame[order[tied]]
        tie = hash64("tie", seed, rows["user_id"], rows["item_id"])
        # Ratings and texts order only repeated interactions of one pair at the same time.
        keys = [rows["timestamp"], pl.Series("_tie", tie), *rows.select(*PAIR_COLUMNS, "rating", "text")]
        order[tied] = order[tied][pl.DataFrame(keys).with_row_index("_row").sort(pl.exclude("_row"))["_row"].to_numpy()]
    return order


def _tied_indices(times: NDArray[np.float64], users: NDArray[np.integer] | None) -> NDArray[np.int64]:
    """Return the indices of interactions with equal times, optionally only of the same user.

    Args:
        times: Ascending times, shape (n,).
        users: Code of each interaction's user, shape (n,).
    """
    same = times[1:] == times[:-1]
    indices = np.flatnonzero(np.concatenate([[False], same]) | np.concatenate([same, [False]]))
    if users is None or not len(indices):
        return indices
    begins = np.concatenate([[True], ~same])[indices]
    keys = np.cumsum(begins).astype(np.uint64) << np.uint64(32) | users[indices].astype(np.uint64)
    order = np.argsort(keys)
    again = keys[order[1:]] == keys[order[:-1]]
    both = np.concatenate([[False], again]) | np.concatenate([again, [False]])
    return np.sort(indices[order[both]])


def _grouped_by_user(rows: TimeOrderedRows, chosen: NDArray[np.bool_]) -> pl.DataFrame:
    """Return the chosen rows grouped by user, each group in time order."""
    indices = np.flatnonzero(chosen)
    # User and row index in one number: sorting numbers takes less memory than sorting indices by a key.
    keys = rows.users[indices].astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= indices.astype(np.uint32)
    del indices
    keys.sort()
    return rows.frame[keys.astype(np.uint32)]


def count_holdouts_before_training(train: pl.DataFrame, held: pl.DataFrame) -> int:
    """Count the held-out interactions that precede a training interaction of the same user."""
    last = train.group_by("user_id").agg(pl.col("timestamp").max().alias("_last"))
    return held.join(last, on="user_id").filter(pl.col("timestamp") < pl.col("_last")).height


def request_id(user_id: str, item_id: str) -> str:
    """Return the id of a held-out pair: ``user|item``, with ``|`` and backslash in ids escaped."""
    return "|".join(part.replace("\\", "\\\\").replace("|", "\\|") for part in (user_id, item_id))


def request_of(
    data: SplitDataset,
    held: Interaction,
    split: SplitName,
    *,
    item: str | None = None,
    candidates: tuple[str, ...] | None = None,
    context: Mapping[str, str] | None = None,
) -> Request:
    """Return the request for a held-out interaction, with the history before it.

    Args:
        data: The split data.
        held: The interaction.
        split: The split in which it is held out.
        item: The item to rate or to explain.
        candidates: Items to rank; None: the whole catalogue.
        context: Further texts by name.
    """
    return Request(
        id=request_id(held.user_id, held.item_id),
        user_id=held.user_id,
        history=data.history(held.user_id, split),
        candidates=candidates,
        item=item,
        context=context or {},
    )


def history_without_item(events: Sequence[Event], item: str | None) -> tuple[Event, ...]:
    """Return a history without interactions with the evaluated item, which would reveal the answer."""
    return tuple(event for event in events if event.item_id != item)


def liked_threshold(scale: tuple[float, float], liked: float | None) -> float:
    """Return the lowest rating that counts as a like; by default three quarters of the scale (4 for 1 to 5)."""
    low, high = scale
    return low + 0.75 * (high - low) if liked is None else liked


def scale_of(data: SplitDataset) -> tuple[float, float]:
    """Return the lowest and highest rating: set in the recipe, defined by the source, or else from training.

    Raises:
        DataError: If training has no ratings.
    """
    if data.dataset.rating_scale is not None:
        return data.dataset.rating_scale
    values = data.train["rating"].drop_nulls().to_numpy()
    if not len(values):
        raise DataError(
            f"{data.dataset.name} has no training ratings; set data.columns.rating, or remove settings that require "
            "ratings",
            kind="missing-column",
            at=data.dataset.name,
            column="rating",
        )
    return float(values.min()), float(values.max())


MAX_RATING_STEPS = 101
"""The maximum number of steps of a rating scale."""


def rating_steps(low: float, high: float, ratings: Iterable[float]) -> tuple[float, int, int]:
    """Return the step of a rating scale, 1 or 0.5, and the lowest and highest rating in steps."""
    integral = all(float(value).is_integer() for value in (*ratings, low, high))
    step = 1.0 if integral or high - low > MAX_RATING_STEPS // 2 else 0.5
    return step, math.floor(low / step), math.ceil(high / step)


ReviewPart = Literal["sentence", "headline"]


def with_review_part(data: SplitDataset, part: ReviewPart) -> SplitDataset:
    """Select one part of each review as the text of its interaction; data without reviews are unchanged.

    The task, baselines and metrics of a family then read the same column. An interaction without that part has no text.
    With sentences, the frames have an additional column ``feature``.
    """
    reviews = data.dataset.reviews
    if not reviews:
        return data

    def with_part(frame: pl.DataFrame) -> pl.DataFrame:
        results = [reviews.get(pair) for pair in frame.select("user_id", "item_id").iter_rows()]
        columns = {"text": part, "feature": "feature"} if part == "sentence" else {"text": part}
        return frame.with_columns(
            pl.Series(column, [(getattr(review, name) if review else None) or None for review in results], pl.String)
            for column, name in columns.items()
        )

    return replace(
        data,
        dataset=replace(data.dataset, interactions=with_part(data.dataset.interactions)),
        train=with_part(data.train),
        valid=with_part(data.valid),
        test=with_part(data.test),
        known=with_part(data.known),
    )
