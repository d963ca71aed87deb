"""The kinds of splits: each assigns interactions to training, validation and test.

Each function takes the interactions in time order, oldest first, and returns one label per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.data.dataset import Dataset
from llmrec.data.hashing import hash64
from llmrec.data.read.codes import coded_pairs, pair_codes, values_and_codes
from llmrec.errors import DataError
from llmrec.recipe.schema import Split

TRAIN, VALID, TEST, KNOWN = range(4)
"""Labels of rows: training, held out for validation, held out for test, or history only."""
EXCLUDED = 4
"""The label of rows in no part: earlier ones of a held-out pair, and the other interactions with cold items."""
_MIN_COUNT = 3
"""Minimum number of items, or of different times, of a user with held-out validation and test interactions."""

Labels = NDArray[np.int8]


class TimeOrderedRows:
    """Interactions sorted by time, oldest first.

    Attributes:
        frame: The columns of `llmrec.data.dataset.SCHEMA`.
        users: Code of each row's user, shape (n,).
        names: The users by code.
    """

    def __init__(self, frame: pl.DataFrame) -> None:
        self.frame = frame
        self.names, self.users = values_and_codes(frame["user_id"])

    @cached_property
    def latest(self) -> NDArray[np.int64]:
        """Indices of the latest interaction of each (user, item) pair, oldest first."""
        keys = pair_codes(self.frame["user_id"], self.frame["item_id"])
        if pl.Series(keys).n_unique() == len(keys):
            return np.arange(len(keys))
        _, first = np.unique(keys[::-1], return_index=True)
        return np.sort(len(keys) - 1 - first)

    def labels(self, valid: NDArray[np.int64], test: NDArray[np.int64], rest: Labels | int = TRAIN) -> Labels:
        """Return a label for every row, given the indices of validation and test rows.

        Args:
            valid: Indices of the validation rows, among `latest`.
            test: Indices of the test rows, among `latest`.
            rest: Labels of all other rows.
        """
        result = np.full(len(self.users), rest, dtype=np.int8) if isinstance(rest, int) else rest
        if len(self.latest) < len(result):
            keys = pair_codes(self.frame["user_id"], self.frame["item_id"])
            result[np.isin(keys, keys[np.concatenate([valid, test])])] = EXCLUDED
        result[valid], result[test] = VALID, TEST
        return result

    def by_user(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return indices grouped by user, with the group size and the number of later indices, shape (n,) each."""
        users = self.users[indices]
        indices = indices[np.argsort(users, kind="stable")]
        counts = np.bincount(users, minlength=len(self.names))
        sizes = np.repeat(counts, counts)
        return indices, sizes, np.repeat(np.cumsum(counts), counts) - 1 - np.arange(len(indices))


def _leave_one_out(dataset: Dataset, rows: TimeOrderedRows, section: Split, seed: int) -> Labels:
    """Hold out each user's last interaction for test and the one before for validation, if a user has enough."""
    counts = np.bincount(rows.users[rows.latest], minlength=len(rows.names))
    latest = rows.latest[counts[rows.users[rows.latest]] >= _MIN_COUNT]
    if not len(latest):
        raise DataError.at(
            dataset.name,
            "too-few",
            f": no user has {_MIN_COUNT} interactions with different items, as leave_one_out requires; "
            "use another data.split.kind or more data",
            "data.split.kind",
        )
    test = _last_indices(rows, latest)
    return rows.labels(_last_indices(rows, np.setdiff1d(latest, test, assume_unique=True)), test)


def _last_indices(rows: TimeOrderedRows, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the last index of every user that has any; indices are ascending."""
    result = _last_by_user(rows, indices)
    return result[result >= 0]


def _last_by_user(rows: TimeOrderedRows, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the last index of every user, shape (users,), or -1 if there is none; indices are ascending."""
    result = np.full(len(rows.names), -1, dtype=np.int64)
    # For repeated indices, numpy keeps the last assigned value.
    result[rows.users[indices]] = indices
    return result


def _last_share(dataset: Dataset, rows: TimeOrderedRows, section: Split, seed: int) -> Labels:
    """Hold out the last share of each user's items for test, and the share before for validation.

    Shares are rounded down, and a user's first item is always training. Short users stay in training.
    """
    return _hold_out_last(dataset, rows, section, rows.latest, "here; use another data.split.kind or more data")


def _hold_out_last(
    dataset: Dataset,
    rows: TimeOrderedRows,
    section: Split,
    among: NDArray[np.int64],
    remedy: str,
    labels: Labels | int = TRAIN,
    after: str = "",
) -> Labels:
    """Hold out the last validation and test share of each user's interactions, among the given rows."""
    parts = sum(share > 0 for share in (section.valid, section.test))
    indices, sizes, later = rows.by_user(among)
    able = sizes > parts
    if not able.any():
        raise DataError.at(
            dataset.name,
            "too-few",
            f": no user has {parts + 1} interactions with different items{after}, as {section.kind} requires {remedy}",
            "data.split.kind",
        )
    indices, sizes, later = indices[able], sizes[able], later[able]
    tests = np.minimum(_share_sizes(section.test, sizes), sizes - parts)
    valids = np.minimum(_share_sizes(section.valid, sizes), sizes - tests - 1)
    return rows.labels(indices[(later >= tests) & (later < tests + valids)], indices[later < tests], labels)


def _last_basket(dataset: Dataset, rows: TimeOrderedRows, section: Split, seed: int) -> Labels:
    """Hold out each user's items at the last time for test, and the items at the time before for validation.

    For repeated items the last time counts. Users with fewer than three different times stay in training.
    """
    if not dataset.has_time:
        raise DataError.at(
            dataset.name,
            "contradiction",
            " has no timestamps, which identify baskets; set data.columns.time, or use another data.split.kind",
            "data.split.kind",
        )
    indices, _, _ = rows.by_user(rows.latest)
    users, times = rows.users[indices], rows.frame["timestamp"].to_numpy()[indices]
    last = np.concatenate([users[1:] != users[:-1], [True]])
    begins = np.concatenate([[True], (times[1:] != times[:-1]) | last[:-1]])
    # Consecutive numbers of distinct times; the last number of a user belongs to the user's last interaction.
    moment = np.cumsum(begins)
    counts = np.bincount(users, minlength=len(rows.names))
    after = np.cumsum(counts)
    ends, starts = moment[(after - 1)[users]], moment[(after - counts)[users]]
    able = ends - starts + 1 >= _MIN_COUNT
    if not able.any():
        raise DataError.at(
            dataset.name,
            "too-few",
            f": no user has interactions at {_MIN_COUNT} different times, as last_basket requires; use another "
            "data.split.kind or more data",
            "data.split.kind",
        )
    return rows.labels(indices[able & (moment == ends - 1)], indices[able & (moment == ends)])


def _share_sizes(share: float, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of items for a share of each user's items, at least 1 for a share above 0."""
    # A tenth of 30 is 3, despite the rounding of the binary product.
    counts: NDArray[np.int64] = np.floor(sizes * share + 1e-9).astype(np.int64)
    return np.maximum(counts, int(share > 0))


def _global_time(dataset: Dataset, rows: TimeOrderedRows, section: Split, seed: int) -> Labels:
    """Hold out the last share of all interactions for test and the share before for validation."""
    total = len(rows.users)
    tests, valids = round(total * section.test), round(total * section.valid)
    middle = total - tests
    first = max(0, middle - valids)
    test = rows.latest[rows.latest >= middle]
    early = TimeOrderedRows(rows.frame[:middle])
    # Test pairs are held out only once; for a validation pair it is the latest interaction before the test period.
    later = pair_codes(rows.frame["user_id"], rows.frame["item_id"])
    valid = early.latest[early.latest >= first]
    valid = valid[~np.isin(later[valid], later[test])]
    _check_sizes(dataset, section, len(valid), len(test), f"{total} interactions")
    result = np.full(total, EXCLUDED, dtype=np.int8)
    result[:first] = TRAIN
    result[:first][np.isin(later[:first], later[np.concatenate([valid, test])])] = EXCLUDED
    result[valid], result[test] = VALID, TEST
    return result


def _user_disjoint(dataset: Dataset, rows: TimeOrderedRows, section: Split, seed: int) -> Labels:
    """Hold out a share of users: their last interaction is the target, and the earlier ones are history.

    A user with one interaction has an empty history, as a new user does.
    """
    able = np.flatnonzero(np.bincount(rows.users, minlength=len(rows.names)))
    order = able[np.argsort(hash64("held-out users", seed, rows.names.gather(able)), kind="stable")]
    tests, valids = round(len(order) * section.test), round(len(order) * section.valid)
    group = np.zeros(len(rows.names), dtype=np.int8)
    group[order[:tests]], group[order[tests : tests + valids]] = TEST, VALID
    last = _last_indices(rows, rows.latest)
    test, valid = (last[group[rows.users[last]] == label] for label in (TEST, VALID))
    _check_sizes(dataset, section, len(valid), len(test), f"{len(order)} users")
    return rows.labels(valid, test, np.where(group[rows.users] > 0, KNOWN, TRAIN).astype(np.int8))


def _prefix(dataset: Dataset, rows: TimeOrderedRows, section: Split, seed: int) -> Labels:
    """Use the first interactions of each user only as history, and hold out the last shares of the others.

    A language model that writes features may read the history-only rows, so the texts have not seen the interactions
    that a later model is trained on (Xi et al., RecSys 2024, split in this way).
    """
    indices, sizes, later = rows.by_user(np.arange(len(rows.users)))
    first = np.minimum(np.ceil(sizes * section.prefix - 1e-9), section.prefix_most).astype(np.int64)
    early = sizes - 1 - later < first
    labels = np.full(len(rows.users), TRAIN, dtype=np.int8)
    labels[indices[early]] = KNOWN
    late = rows.latest[labels[rows.latest] == TRAIN]
    remedy = "here; lower data.split.prefix, use another data.split.kind or more data"
    return _hold_out_last(dataset, rows, section, late, remedy, labels, f" after the first {section.prefix:.0%}")


def cold_item_labels(dataset: Dataset, rows: TimeOrderedRows, section: Split, seed: int) -> Labels:
    """Return for each row whether its item is cold for test, cold for validation, or warm (the label `TRAIN`).

    Items are chosen by a hash of the item, so an item is cold in all tables and with all filters. With ``after``,
    items that first appear at or after that time are cold for test, and only those for validation are chosen by the
    hash.

    Raises:
        DataError: If ``after`` is set and the data has no timestamps.
    """
    names, items = values_and_codes(rows.frame["item_id"])
    drawn = hash64("cold items", seed, names) / 2.0**64
    tested, shown = drawn < section.test, drawn < section.test + section.valid
    if section.since is not None:
        if not dataset.has_time:
            raise DataError.at(
                dataset.name,
                "contradiction",
                " has no timestamps, which data.split.after requires; set data.columns.time, or drop the key",
                "data.split.after",
            )
        first = np.full(len(names), np.inf)
        np.minimum.at(first, items, rows.frame["timestamp"].fill_null(-np.inf).to_numpy())
        tested, shown = first >= section.since, drawn < section.valid
    part: Labels = np.where(tested, TEST, np.where(shown, VALID, TRAIN)).astype(np.int8)[items]
    return part


def _cold_items(dataset: Dataset, rows: TimeOrderedRows, section: Split, seed: int) -> Labels:
    """Hold out whole items for test and others for validation, and remove their other interactions.

    A user's targets are the last cold item after all the user's remaining interactions, and the last warm item. Users
    are evaluated only in test or only in validation, so that no history has a cold item.
    """
    part = cold_item_labels(dataset, rows, section, seed)
    of_latest = part[rows.latest]
    warm = rows.latest[of_latest == TRAIN]
    last = _last_by_user(rows, warm)
    before = _last_by_user(rows, np.setdiff1d(warm, last, assume_unique=True))
    free, held = before >= 0, {}
    for label in (TEST, VALID):
        cold = _last_by_user(rows, rows.latest[of_latest == label])
        evaluated = free & (cold > before)
        held[label], free = np.concatenate([cold[evaluated], last[evaluated]]), free & ~evaluated
    have = f"{rows.frame['item_id'].n_unique()} items and their last interactions"
    _check_sizes(dataset, section, len(held[VALID]), len(held[TEST]), have)
    return rows.labels(held[VALID], held[TEST], np.where(part == TRAIN, TRAIN, EXCLUDED).astype(np.int8))


def _given(dataset: Dataset, rows: TimeOrderedRows, section: Split, seed: int) -> Labels:
    """Use the held-out pairs and the history users given by the source."""
    given = dataset.given
    if given is None:
        raise DataError.at(
            dataset.name,
            "contradiction",
            " has no published split, so data.split.kind=given cannot be used; choose another kind",
            "data.split.kind",
        )
    keys = pair_codes(rows.frame["user_id"], rows.frame["item_id"])

    def named(held: frozenset[tuple[str, str]]) -> NDArray[np.int64]:
        known = coded_pairs(held, rows.frame)
        return rows.latest[np.isin(keys[rows.latest], pair_codes(known["user_id"], known["item_id"]))]

    # a pair in both parts is held out for test
    valid, test = named(given.valid - given.test), named(given.test)
    if not len(valid) and not len(test):
        raise DataError.at(
            dataset.name, "too-few", ": the filter removes all held-out pairs; relax the filter", "data.filter"
        )
    history_only = rows.names.is_in(list(given.history_only)).to_numpy()
    return rows.labels(valid, test, np.where(history_only[rows.users], KNOWN, TRAIN).astype(np.int8))


def _check_sizes(dataset: Dataset, section: Split, valid: int, test: int, have: str) -> None:
    for name, share, rows in (("valid", section.valid, valid), ("test", section.test, test)):
        if share > 0 and not rows:
            raise DataError.at(
                dataset.name,
                "too-few",
                f": {have} are too few for {section.kind} with data.split.{name}={share}; "
                "raise the share or use more data",
                f"data.split.{name}",
            )


SPLIT_KINDS: Mapping[str, Callable[[Dataset, TimeOrderedRows, Split, int], Labels]] = {
    "leave_one_out": _leave_one_out,
    "last_share": _last_share,
    "last_basket": _last_basket,
    "global_time": _global_time,
    "user_disjoint": _user_disjoint,
    "prefix": _prefix,
    "cold_items": _cold_items,
    "given": _given,
}
"""Functions that label the rows, by the kind's name in recipes."""
