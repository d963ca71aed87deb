from __future__ import annotations

import polars as pl
import pytest
from data_cases import dataset, random_rows, seeds, shuffled
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.dataset import SCHEMA, Dataset, filter_dataset, k_core
from llmrec.errors import DataError
from llmrec.recipe.schema import Filter
from llmrec.types import Item
from tests.facts import Facts, raises


@given(seeds, st.integers(1, 5), st.integers(1, 5))
def test_core_is_the_largest_subset(seed: int, user_core: int, item_core: int) -> None:
    rows = dataset(random_rows(seed)).interactions
    kept = k_core(rows, user_core=user_core, item_core=item_core)
    for column, least in (("user_id", user_core), ("item_id", item_core)):
        assert all(count >= least for count in kept.group_by(column).len()["len"])
    # One row at a time, in another order: the k-core is unique.
    left = [row[:2] for row in shuffled(rows.rows(), seed)]  # type: ignore[arg-type]
    while True:
        bad = [
            row
            for row in left
            if sum(other[0] == row[0] for other in left) < user_core
            or sum(other[1] == row[1] for other in left) < item_core
        ]
        if not bad:
            break
        left.remove(bad[0])
    assert sorted(left) == sorted(kept.select("user_id", "item_id").rows())


def test_min_rating_drops_rows_items_and_users() -> None:
    data = dataset([("a", "x", 5.0, 1.0), ("a", "y", 4.0, 2.0), ("b", "z", 1.0, 3.0)])
    data = Dataset(**{**data.__dict__, "users": {"a": {"age": "9"}, "b": {}}})
    kept = filter_dataset(data, Filter(min_rating=4))
    assert kept.interactions["item_id"].to_list() == ["x", "y"]
    assert list(kept.items) == ["x", "y"] and list(kept.users) == ["a"]


def test_no_filter_changes_nothing() -> None:
    data = dataset(random_rows(1))
    assert filter_dataset(data, Filter()) is data


def test_empty_result_names_the_keys() -> None:
    with raises(DataError, Facts("too-few", column="data.filter", says=("min_rating=5", "user_core=9"))):
        filter_dataset(dataset([("a", "x", 5.0, 1.0), ("a", "y", 4.0, 2.0)]), Filter(min_rating=5, user_core=9))


def test_min_rating_without_ratings() -> None:
    rows = pl.DataFrame({"user_id": ["a"], "item_id": ["x"]})
    data = Dataset(name="clicks", noun="things", interactions=rows, items={"x": Item(item_id="x", title="X")})
    with raises(DataError, Facts("contradiction", "clicks", column="data.filter.min_rating")):
        filter_dataset(data, Filter(min_rating=3))


def test_dataset_conforms_columns() -> None:
    rows = pl.DataFrame({"item_id": ["x"], "user_id": ["a"], "rating": [3], "extra": [0]})
    data = Dataset(name="d", noun="things", interactions=rows, items={"x": Item(item_id="x", title="X")})
    assert list(data.interactions.schema) == list(SCHEMA)
    coded = pl.Enum(["a"]), pl.Enum(["x"])
    assert list(data.interactions.schema.values()) == [*coded, pl.Float64(), pl.Float64(), pl.Null()]
    assert not data.has_time and not data.made


def test_interactions_need_known_items() -> None:
    rows = pl.DataFrame({"user_id": ["a", "a"], "item_id": ["x", "y"]})
    with raises(DataError, Facts("unknown-name", "d", column="item_id", says="'y'")):
        Dataset(name="d", noun="things", interactions=rows, items={"x": Item(item_id="x", title="X")})


@pytest.mark.parametrize(
    ("frame", "facts"),
    [
        ({"user_id": ["a"]}, Facts("missing-column", column="item_id")),
        ({"user_id": ["a", None], "item_id": ["x", "x"]}, Facts("missing-value", column="user_id")),
        ({"user_id": ["a"], "item_id": ["x"], "rating": ["good"]}, Facts("bad-value")),
    ],
)
def test_malformed_columns(frame: dict[str, list[object]], facts: Facts) -> None:
    with raises(DataError, facts):
        Dataset(name="d", noun="things", interactions=pl.DataFrame(frame), items={"x": Item(item_id="x", title="X")})


def test_fingerprint_depends_on_interactions_titles_and_users() -> None:
    first, *rest = [("a", "x", 5.0, 1.0), ("b", "y", 4.0, 2.0), ("b", "x", 1.0, 3.0)]
    others = [("a", "x", 2.0, 1.0)], [("a", "x", 5.0, 99.0)], [], [("other", "x", 5.0, 1.0)], [first]
    assert len({dataset([*other, *rest]).fingerprint for other in others}) == 5
    rows = pl.DataFrame({"user_id": ["ab"], "item_id": ["c"]})

    def make(user: str = "ab", item: str = "c", title: str = "T", **keys: object) -> str:
        frame = rows.with_columns(user_id=pl.lit(user), item_id=pl.lit(item))
        items = {item: Item(item_id=item, title=title)}
        return Dataset(name="d", noun="n", interactions=frame, items=items, **keys).fingerprint  # type: ignore[arg-type]

    seen = {make(), make("a", "bc"), make(title="U"), make(users={"ab": {"age": "1"}}), make(rating_scale=(1.0, 5.0))}
    assert len(seen) == 5
    assert make(provenance={"path": "elsewhere"}) == make()
