from __future__ import annotations

import json

import polars as pl
import pytest
from data_cases import Row, dataset, random_rows

from llmrec.data.dataset import Dataset
from llmrec.data.hashing import hash64, hash_one
from llmrec.data.split import split
from llmrec.data.stats import statistics, tied_last_share, wide_cutoffs
from llmrec.recipe.schema import Split
from llmrec.types import Item

ROWS: list[Row] = [
    ("a", "x", 5.0, 1.0),
    ("a", "y", 4.5, 2.0),
    ("a", "z", 4.5, 2.0),
    ("a", "w", 1.0, 0.0),
    ("b", "x", 5.0, 3.0),
    ("c", "x", 5.0, 1.0),
    ("c", "y", 5.0, 2.0),
]


def test_figures_by_hand() -> None:
    figures = statistics(split(dataset(ROWS), Split(), seed=0))
    assert (figures["users"], figures["items"], figures["interactions"]) == (3, 4, 7)
    assert figures["density"] == pytest.approx(7 / 12)
    assert figures["ratings"] == {"1": 1, "4.5": 2, "5": 4}
    assert figures["interactions_per_user"] == {"min": 1, "q25": 1.5, "median": 2, "q75": 3, "max": 4, "mean": 7 / 3}
    assert figures["tied_last_share"] == pytest.approx(1 / 3)
    assert (figures["train"], figures["valid"], figures["test"], figures["history_only"]) == (5, 1, 1, 0)
    assert figures["shared_titles"] == 0 and figures["with_text"] == 0
    # y or z is held out last, and the other before it: y is also known from user c, z is not.
    assert (figures["cold_items_test"], figures["cold_items_valid"]) in [(1, 0), (0, 1)]
    assert figures["cold_users_test"] == 0


def test_figures_can_be_written() -> None:
    for kind in ("leave_one_out", "global_time", "user_disjoint"):
        data = split(dataset(random_rows(1, users=30)), Split(kind=kind), seed=0)  # type: ignore[arg-type]
        assert json.loads(json.dumps(statistics(data)))["split"] == kind


def test_without_ratings_and_times() -> None:
    frame = pl.DataFrame({"user_id": ["a"] * 3, "item_id": ["x", "y", "z"], "text": ["t", None, None]})
    items = {item: Item(item_id=item, title="Same") for item in "xyz"}
    figures = statistics(split(Dataset(name="d", noun="n", interactions=frame, items=items), Split(), seed=0))
    assert figures["tied_last_share"] is None and figures["ratings"] == {} and figures["rating_scale"] is None
    assert (figures["with_text"], figures["shared_titles"]) == (1, 3)


def test_only_the_last_moment_counts_as_tied() -> None:
    rows = [("a", "x", 1.0, 1.0), ("a", "y", 1.0, 1.0), ("a", "z", 1.0, 2.0)]
    assert tied_last_share(dataset(rows).interactions) == 0.0


def test_hashes_are_pinned_and_tell_parts_apart() -> None:
    assert hash_one("tie", 0, "u1", "i1") == 9710115311842113335
    assert hash64("tie", 0, ["u1", "ab"], ["i1", "c"]).tolist()[0] == hash_one("tie", 0, "u1", "i1")
    seen = {hash_one("tie", 0, "ab", "c"), hash_one("tie", 0, "a", "bc"), hash_one("tie", 1, "ab", "c")}
    assert len(seen | {hash_one("other", 0, "ab", "c")}) == 4


def test_cut_offs_beyond_what_is_ranked_are_named() -> None:
    assert "20 items are ranked" in wide_cutoffs((50, 1, 20), 20) and "HR@20 is always 1" in wide_cutoffs(
        (50, 1, 20), 20
    )
    assert wide_cutoffs((1, 10), 20) == ""
