"""The kinds of splits: which interactions each holds out.

Each takes the interactions with their place in time as ``WHEN``, 0 being the oldest, and gives four frames of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import polars as pl

from llmrec.data.dataset import Dataset
from llmrec.data.hashing import hash64
from llmrec.errors import DataError
from llmrec.recipe.schema import Split

PAIR = ["user_id", "item_id"]
WHEN = "_when"
_LEAST = 3
"""Items, or moments, of a user of whom something is held out for validation and for test."""


class Parts(NamedTuple):
    """What is learned from, held out for validation and for test, and shown as history alone."""

    train: pl.DataFrame
    valid: pl.DataFrame
    test: pl.DataFrame
    known: pl.DataFrame


def _latest(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the latest interaction of every pair, oldest first."""
    return frame.sort(WHEN).unique(subset=PAIR, keep="last", maintain_order=True)


def _without(frame: pl.DataFrame, *held: pl.DataFrame) -> pl.DataFrame:
    for rows in held:
        frame = frame.join(rows.select(PAIR), on=PAIR, how="anti")
    return frame


def _from_last() -> pl.Expr:
    return pl.col(WHEN).rank("ordinal", descending=True).over("user_id")


def _leave_one_out(dataset: Dataset, frame: pl.DataFrame, section: Split, seed: int) -> Parts:
    """Each user's last interaction is for test, the one before for validation; short users stay in training."""
    latest = _latest(frame).filter(pl.len().over("user_id") >= _LEAST)
    if latest.is_empty():
        raise DataError.at(
            dataset.name,
            "too-few",
            f": no user has {_LEAST} interactions with different items, which leave_one_out needs; "
            "use another data.split.kind or more data",
            "data.split.kind",
        )
    test, valid = latest.filter(_from_last() == 1), latest.filter(_from_last() == 2)
    return Parts(_without(frame, valid, test), valid, test, frame.clear())


def _last_share(dataset: Dataset, frame: pl.DataFrame, section: Split, seed: int) -> Parts:
    """The last share of each user's different items is for test, the share before for validation; at least 1 each.

    Shares are rounded down, and a user's first item is always training. Short users stay in training.
    """
    wanted = [share for share in (section.valid, section.test) if share > 0]
    latest = _latest(frame).with_columns(pl.len().over("user_id").alias("_items"))
    latest = latest.filter(pl.col("_items") > len(wanted))
    if latest.is_empty():
        raise DataError.at(
            dataset.name,
            "too-few",
            f": no user has {len(wanted) + 1} interactions with different items, which last_share needs "
            "here; use another data.split.kind or more data",
            "data.split.kind",
        )
    tests, valids = _part(section.test), _part(section.valid)
    tests = pl.min_horizontal(tests, pl.col("_items") - len(wanted))
    valids = pl.min_horizontal(valids, pl.col("_items") - tests - 1)
    test = latest.filter(_from_last() <= tests)
    valid = latest.filter((_from_last() > tests) & (_from_last() <= tests + valids))
    return Parts(_without(frame, valid, test), valid, test, frame.clear())


def _last_basket(dataset: Dataset, frame: pl.DataFrame, section: Split, seed: int) -> Parts:
    """What each user took at the last moment is for test, at the moment before for validation.

    Of an item that was taken again the last time counts. Users with fewer than three moments stay in training.
    """
    if not dataset.has_time:
        raise DataError.at(
            dataset.name,
            "contradiction",
            " has no times, which tell baskets apart; name data.columns.time, or use another data.split.kind",
            "data.split.kind",
        )
    moment = pl.col("timestamp").rank("dense", descending=True).over("user_id")
    latest = _latest(frame).with_columns(moment.alias("_moment"))
    latest = latest.filter(pl.col("_moment").max().over("user_id") >= _LEAST)
    if latest.is_empty():
        raise DataError.at(
            dataset.name,
            "too-few",
            f": no user has interactions at {_LEAST} moments, which last_basket needs; use another "
            "data.split.kind or more data",
            "data.split.kind",
        )
    test, valid = latest.filter(pl.col("_moment") == 1), latest.filter(pl.col("_moment") == 2)
    return Parts(_without(frame, valid, test), valid, test, frame.clear())


def _part(share: float) -> pl.Expr:
    """Return how many of a user's ``_items`` a share is: rounded down, and at least 1 of a share above 0."""
    # A tenth of 30 is 3 whichever side of it the product falls in binary.
    whole = (pl.col("_items") * share + 1e-9).floor().cast(pl.Int64)
    return pl.max_horizontal(whole, pl.lit(1 if share > 0 else 0, pl.Int64))


def _global_time(dataset: Dataset, frame: pl.DataFrame, section: Split, seed: int) -> Parts:
    """The last share of all interactions is for test, the share before for validation; cold ones are kept."""
    total = frame.height
    tests, valids = round(total * section.test), round(total * section.valid)
    middle = total - tests
    test = _latest(frame[middle:])
    valid = _latest(_without(frame[max(0, middle - valids) : middle], test))
    _need(dataset, section, valid, test, f"{total} interactions")
    return Parts(_without(frame[: max(0, middle - valids)], valid, test), valid, test, frame.clear())


def _user_disjoint(dataset: Dataset, frame: pl.DataFrame, section: Split, seed: int) -> Parts:
    """A share of users is held out entirely: their last interaction is asked for, the earlier ones are history.

    The history of a user with one interaction is empty, as that of a new user is.
    """
    latest = _latest(frame)
    able = latest["user_id"].unique().sort()
    order = [able[int(place)] for place in np.argsort(hash64("held-out users", seed, able.to_list()), kind="stable")]
    tests, valids = round(len(order) * section.test), round(len(order) * section.valid)
    groups = {"test": order[:tests], "valid": order[tests : tests + valids]}
    last = latest.filter(_from_last() == 1)
    test, valid = (last.join(_users_frame(groups[name]), on="user_id", how="semi") for name in ("test", "valid"))
    _need(dataset, section, valid, test, f"{len(order)} users")
    away = _users_frame(order[: tests + valids])
    known = _without(frame.join(away, on="user_id", how="semi"), valid, test)
    return Parts(frame.join(away, on="user_id", how="anti"), valid, test, known)


def _given(dataset: Dataset, frame: pl.DataFrame, section: Split, seed: int) -> Parts:
    """The source says which pairs are held out, and whose other events are history only."""
    given = dataset.given
    if given is None:
        raise DataError.at(
            dataset.name,
            "contradiction",
            " has no split of its own, so data.split.kind=given cannot be used; choose another kind",
            "data.split.kind",
        )
    latest = _latest(frame)
    # A pair that is in both parts is for test alone.
    valid, test = (
        latest.join(_pairs_frame(pairs), on=PAIR, how="semi") for pairs in (given.valid - given.test, given.test)
    )
    if valid.is_empty() and test.is_empty():
        raise DataError.at(
            dataset.name, "too-few", ": no held-out pair of its split is left; relax data.filter", "data.filter"
        )
    rest = _without(frame, valid, test)
    away = _users_frame(sorted(given.history_only))
    return Parts(rest.join(away, on="user_id", how="anti"), valid, test, rest.join(away, on="user_id", how="semi"))


def _pairs_frame(pairs: frozenset[tuple[str, str]]) -> pl.DataFrame:
    return pl.DataFrame(sorted(pairs), schema=dict.fromkeys(PAIR, pl.String), orient="row")


def _users_frame(users: list[str]) -> pl.DataFrame:
    return pl.DataFrame({"user_id": users}, schema={"user_id": pl.String})


def _need(dataset: Dataset, section: Split, valid: pl.DataFrame, test: pl.DataFrame, have: str) -> None:
    for name, share, rows in (("valid", section.valid, valid), ("test", section.test, test)):
        if share > 0 and rows.is_empty():
            raise DataError.at(
                dataset.name,
                "too-few",
                f": {have} are too few for {section.kind} with data.split.{name}={share}; "
                "raise the share or use more data",
                f"data.split.{name}",
            )


KINDS: Mapping[str, Callable[[Dataset, pl.DataFrame, Split, int], Parts]] = {
    "leave_one_out": _leave_one_out,
    "last_share": _last_share,
    "last_basket": _last_basket,
    "global_time": _global_time,
    "user_disjoint": _user_disjoint,
    "given": _given,
}
"""What holds out, by the name that recipes use."""
