"""Stored candidate sets: each held-out item with its sampled negatives, and a hash over all sets.

Sets are drawn once and stored, so that every predictor ranks the same items. Random numbers come from SplitMix64
(Steele et al., OOPSLA 2014) keyed by the request id: a set depends only on the data, the seed and the request, not on
the version of a random number library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llmrec.data.hashing import digest_strings, hash_one
from llmrec.data.read.codes import PAIR_COLUMNS, UserRowRanges, map_ids_to_indices, values_and_codes
from llmrec.data.split import SplitDataset, request_id
from llmrec.errors import DataError
from llmrec.recipe.schema import CandidateSection
from llmrec.types import SplitName

_METADATA_KEY = b"llmrec.candidates"


@dataclass(frozen=True)
class CandidateSets:
    """The candidate sets of the requests of one split.

    Attributes:
        kind: How negatives were drawn, ``uniform`` or ``popularity``, or the retriever of all candidates.
        count: Candidates per request, including the target if they were drawn.
        seed: The seed of the draw.
        sets: Item ids by `request_id`, in the order in which predictors see them.
        digest: SHA-256 over all of the above.
        users: Users whose requests have sets; None: all. Not stored in the file.
    """

    kind: str
    count: int
    seed: int
    sets: Mapping[str, tuple[str, ...]]
    digest: str
    users: frozenset[str] | None = None

    @staticmethod
    def of(
        kind: str, count: int, seed: int, sets: Mapping[str, tuple[str, ...]], users: frozenset[str] | None = None
    ) -> CandidateSets:
        """Return candidate sets with their hash."""
        rows = [part for name in sorted(sets) for part in (name, json.dumps(sets[name]))]
        return CandidateSets(kind, count, seed, sets, digest_strings([kind, str(count), str(seed), *rows]), users)

    def save(self, path: Path) -> None:
        """Save the sets as Parquet: columns request_id and candidates; everything else as metadata."""
        names = sorted(self.sets)
        table = pa.table(
            {
                "request_id": pa.array(names, pa.string()),
                "candidates": pa.array([list(self.sets[name]) for name in names], pa.list_(pa.string())),
            }
        )
        head = {"kind": self.kind, "count": self.count, "seed": self.seed, "digest": self.digest}
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata({_METADATA_KEY: json.dumps(head).encode()}), path)


def sample_candidates(
    data: SplitDataset,
    split: SplitName,
    section: CandidateSection,
    *,
    seed: int,
    users: frozenset[str] | None = None,
) -> CandidateSets:
    """Draw candidates for the held-out interactions of a split, for all users or given users.

    Negatives are items that the user has not interacted with; see `interacted_items`. ``popularity`` draws them without
    replacement, with probabilities proportional to 1 + the number of *training* interactions. The order is shuffled, so
    that the target's position is uniform.

    Args:
        data: The split data.
        split: ``valid`` or ``test``.
        section: The recipe's ``eval.candidates``.
        seed: The run's seed.
        users: Users to draw for; None: all. A set does not depend on the other users drawn.

    Raises:
        DataError: If a user has too few items left to draw negatives from.
    """
    catalogue = sorted(data.dataset.items)
    index_of = {item: index for index, item in enumerate(catalogue)}
    weights = _sampling_weights(data, index_of, section.kind)
    total = np.cumsum(weights)
    interactions = interacted_items(data, split)
    # Filtered items have a name but no index, and no interactions.
    catalogue_indices = np.array([index_of.get(name, -1) for name in interactions.names])
    sets: dict[str, tuple[str, ...]] = {}
    for held in data.holdouts(split).of(users):
        banned = set(catalogue_indices[interactions.indices(held.user_id)].tolist())
        if len(catalogue) - len(banned) < section.count - 1:
            raise DataError(
                f"user {held.user_id!r} has interacted with {len(banned)} of {len(catalogue)} items, so only "
                f"{len(catalogue) - len(banned)} negatives are left; set eval.candidates.count to at most "
                f"{len(catalogue) - len(banned) + 1}",
                kind="too-few",
                column="eval.candidates.count",
            )
        name = request_id(held.user_id, held.item_id)
        numbers = _SplitMix64(hash_one("candidates", seed, name))
        chosen = [index_of[held.item_id], *_sample_negatives(numbers, weights, total, banned, section.count - 1)]
        sets[name] = tuple(catalogue[index] for index in numbers.shuffled(chosen))
    return CandidateSets.of(section.kind, section.count, seed, sets, users)


class InteractedItems:
    """The items that each user interacted with, in columns that take four bytes per row."""

    def __init__(self, frame: pl.DataFrame) -> None:
        users, rows = values_and_codes(frame["user_id"])
        names, items = values_and_codes(frame["item_id"])
        self.names = names.to_list()
        self._items = items[np.argsort(rows, kind="stable")]
        self._runs = UserRowRanges(users, rows)

    def indices(self, user: str) -> NDArray[np.integer]:
        """Return the indices of the items that a user interacted with."""
        return self._items[self._runs.of(user)]

    def __getitem__(self, user: str) -> frozenset[str]:
        return frozenset(map(self.names.__getitem__, self.indices(user).tolist()))


def interacted_items(data: SplitDataset, split: SplitName) -> InteractedItems:
    """Return, by user, the items that must not be drawn as negatives for a split's requests.

    For ``test`` these are the items of all splits. For ``valid`` they exclude those of test: otherwise choices made on
    validation would depend on the test items, because these would never be negatives.
    """
    frames = (data.train, data.known, data.valid) if split == "valid" else (data.dataset.interactions,)
    return InteractedItems(pl.concat([frame.select(PAIR_COLUMNS) for frame in frames if frame.height] or [frames[0]]))


def sample_across_groups(
    targets: Mapping[str, str], groups: Mapping[str, str], *, count: int, seed: int, kind: str
) -> CandidateSets:
    """Draw candidates uniformly from a given set of items.

    Args:
        targets: The target of every request, by the request's id.
        groups: The items to draw from, targets included, with a group each. Items of the target's group are not drawn,
            because they cannot be distinguished from it.
        count: Candidates per request, the target included; at most the number of groups.
        seed: The run's seed.
        kind: Name of this kind of candidates.
    """
    pool = sorted(groups)
    index_of = {item: index for index, item in enumerate(pool)}
    members: dict[str, set[int]] = {}
    for item in pool:
        members.setdefault(groups[item], set()).add(index_of[item])
    weights = np.ones(len(pool), dtype=np.uint64)
    total = np.cumsum(weights)
    sets: dict[str, tuple[str, ...]] = {}
    for name, target in targets.items():
        banned = members[groups[target]]
        numbers = _SplitMix64(hash_one(f"candidates {kind}", seed, name))
        chosen = [index_of[target], *_sample_negatives(numbers, weights, total, banned, count - 1)]
        sets[name] = tuple(pool[index] for index in numbers.shuffled(chosen))
    return CandidateSets.of(kind, count, seed, sets)


def _sampling_weights(data: SplitDataset, index_of: Mapping[str, int], kind: str) -> NDArray[np.uint64]:
    weights = np.ones(len(index_of), dtype=np.uint64)
    if kind == "popularity":
        indices = map_ids_to_indices(
            data.train["item_id"], lambda names: np.array([index_of.get(name, -1) for name in names])
        )
        weights += np.bincount(indices, minlength=len(index_of)).astype(np.uint64)
    return weights


def _sample_negatives(
    numbers: _SplitMix64, weights: NDArray[np.uint64], total: NDArray[np.uint64], banned: set[int], need: int
) -> list[int]:
    """Draw ``need`` items outside ``banned`` without replacement, with probabilities proportional to the weights."""
    taken: dict[int, None] = {}
    # Rejecting banned and already drawn items leaves the probabilities of the rest correct. Where this would take long,
    # the rest is listed and sampled directly, which gives the same distribution.
    for _ in range(4):
        indices = np.searchsorted(total, numbers.below(total[-1], 2 * need + 8), side="right")
        for index in indices.tolist():
            if index not in banned and len(taken) < need:
                taken[index] = None
        if len(taken) == need:
            return list(taken)
    rest = np.array([index for index in range(len(weights)) if index not in banned and index not in taken], dtype=int)
    while len(taken) < need:
        sums = np.cumsum(weights[rest])
        index_in_rest = int(np.searchsorted(sums, numbers.below(sums[-1], 1), side="right")[0])
        taken[int(rest[index_in_rest])] = None
        rest = np.delete(rest, index_in_rest)
    return list(taken)


class _SplitMix64:
    """A stream of pseudorandom numbers (SplitMix64)."""

    def __init__(self, key: int) -> None:
        self._state = key

    def below(self, bound: int | np.uint64, size: int) -> NDArray[np.uint64]:
        """Return integers in [0, bound), shape (size,); the modulo bias is below bound / 2**64."""
        steps = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        word = steps + np.uint64(self._state)
        self._state = (self._state + size * 0x9E3779B97F4A7C15) % 2**64
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (word ^ (word >> np.uint64(31))) % np.uint64(bound)

    def shuffled(self, values: list[int]) -> list[int]:
        """Return the values in a random order (Fisher-Yates)."""
        values = list(values)
        words = self.below(2**63, len(values)).tolist()
        for last in range(len(values) - 1, 0, -1):
            other = words[last] % (last + 1)
            values[last], values[other] = values[other], values[last]
        return values
