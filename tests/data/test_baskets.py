"""Baskets: interactions with the same timestamp are reported, and can be held out together."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

import llmrec
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.data.stats import basket_warning, statistics, tied_history_share
from llmrec.errors import DataError
from llmrec.recipe.schema import Split
from llmrec.types import Item
from tests.facts import Facts, raises

pytest.importorskip("llmrec.start", reason="the extension is not there")

from llmrec.start import init as start

USERS, MOMENTS, EACH = 12, 4, 3


def bought(*, at_once: bool = True, time: bool = True) -> pl.DataFrame:
    """Return baskets of three items at four times per user, or the same items one after the other."""
    rows = [
        {
            "user_id": f"u{user:02d}",
            "item_id": f"i{(user * 5 + moment * EACH + step) % 30:02d}",
            "timestamp": float(moment * 100 + (0 if at_once else step)),
        }
        for user in range(USERS)
        for moment in range(MOMENTS)
        for step in range(EACH)
    ]
    frame = pl.DataFrame(rows)
    return frame if time else frame.drop("timestamp")


def cut(kind: str, frame: pl.DataFrame) -> SplitDataset:
    items = {name: Item(item_id=name, title=name) for name in frame["item_id"].unique()}
    dataset = Dataset(name="shop", noun="items", interactions=frame, items=items)
    return split_dataset(dataset, Split(kind=kind), seed=0)  # type: ignore[arg-type]


def test_leave_one_out_splits_baskets_and_reports_it() -> None:
    data = cut("leave_one_out", bought())
    # One item of the last basket is for test and one for validation; both have the third in their history.
    assert tied_history_share(data) == 1.0 == statistics(data)["tied_with_history"]
    assert "100% of the held-out interactions of shop" in basket_warning(data) and "last_basket" in basket_warning(data)


def test_single_events_are_no_baskets() -> None:
    data = cut("leave_one_out", bought(at_once=False))
    assert tied_history_share(data) == 0.0 and basket_warning(data) == ""
    untimed = cut("leave_one_out", bought(time=False))
    assert tied_history_share(untimed) is None and basket_warning(untimed) == ""


def test_baskets_are_held_out() -> None:
    data = cut("last_basket", bought())
    assert (data.test.height, data.valid.height) == (USERS * EACH, USERS * EACH)
    assert set(data.test["timestamp"]) == {300.0} and set(data.valid["timestamp"]) == {200.0}
    assert set(data.train["timestamp"]) == {0.0, 100.0}
    assert tied_history_share(data) == 0.0 and basket_warning(data) == ""


def test_users_with_few_baskets_stay_in_training() -> None:
    rows = [("a", "x", 1.0), ("a", "y", 2.0), ("b", "x", 1.0), ("b", "y", 2.0), ("b", "x", 3.0), ("b", "z", 0.0)]
    rows += [("c", "x", 1.0), ("c", "y", 2.0), ("c", "z", 3.0)]
    data = cut("last_basket", pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"))
    held = {part: set(getattr(data, part).select("user_id", "item_id").rows()) for part in ("test", "valid", "train")}
    assert held["test"] == {("b", "x"), ("c", "z")} and held["valid"] == {("b", "y"), ("c", "y")}
    assert held["train"] == {("a", "x"), ("a", "y"), ("b", "z"), ("c", "x")}


@pytest.mark.parametrize(
    ("frame", "facts"),
    [
        (bought(time=False), Facts("contradiction", column="data.split.kind", says="data.columns.time")),
        (
            bought().filter(pl.col("timestamp") < 200),
            Facts("too-few", column="data.split.kind", says="3 different times"),
        ),
    ],
)
def test_data_without_baskets(frame: pl.DataFrame, facts: Facts) -> None:
    with raises(DataError, facts):
        cut("last_basket", frame)


def test_init_and_check_mention_baskets(tmp_path: Path) -> None:
    bought().write_csv(tmp_path / "shop.csv")
    result = start.write_recipe(str(tmp_path / "shop.csv"), out=tmp_path / "shop.yaml", name="shop", backend="hf")
    assert "last_basket" in result.found
    recipe = {
        "name": "shop",
        "data": {"source": "table", "columns": {"time": "timestamp"}},
        "tasks": {"sequential": {}},
        "eval": {"arms": ["zero-shot"], "backend": "fake", "scorer": "fake", "candidates": {"count": 5}},
    }
    (warning,) = llmrec.check(recipe, data=bought()).warnings
    assert "last_basket" in warning
    recipe["data"] = {"source": "table", "columns": {"time": "timestamp"}, "split": {"kind": "last_basket"}}
    assert not llmrec.check(recipe, data=bought()).warnings
