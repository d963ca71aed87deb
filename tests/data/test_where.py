"""Filter expressions: syntax, selected rows, and positions of errors."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.read.tables import Table
from llmrec.data.read.where import filter_rows
from llmrec.data.sets.table import load_data
from llmrec.errors import DataError, LlmrecError, RecipeError
from llmrec.recipe.schema import DataSection, Filter
from tests.facts import Facts, raises

TEXTS = pl.DataFrame(
    {
        "event": ["view", "purchase", "purchase", " ", "cart", "view"],
        "quantity": ["1", "2", " 0 ", "", "-3", "1e2"],
        "Event Type": ["a", "b", "b", "a", "", "c"],
        "seen": ["true", "True", "false", "", "FALSE", "true"],
    }
)
TYPED = pl.DataFrame(
    {
        "stars": [1, 2, 3, None, 5],
        "verified": [True, False, None, True, True],
        "when": [datetime(2024, month, 1) for month in (1, 2, 3, 4, 5)],
    }
)


def rows(frame: pl.DataFrame, where: str) -> list[int]:
    table = filter_rows(Table("t.csv", frame.with_row_index("n")), where)
    return table.frame["n"].to_list()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("event != 'purchase'", [0, 4, 5]),
        ("event == 'purchase' and quantity > 0", [1]),
        ("event in ['view', 'cart'] and not quantity < 0", [0, 5]),
        ("0 < quantity <= 2", [0, 1]),
        ("2 >= quantity", [0, 1, 2, 4]),
        ("quantity == -3 or event is None", [3, 4]),
        ("quantity is not None and event is not None", [0, 1, 2, 4, 5]),
        ("col('Event Type') == 'b'", [1, 2]),
        ("event == col('Event Type') or quantity == 100", [5]),
        ("not (event == 'view' or event == 'cart' or event is None)", [1, 2]),
    ],
)
def test_filters_texts(where: str, expected: list[int]) -> None:
    assert rows(TEXTS, where) == expected


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("stars >= 3", [2, 4]),
        ("verified == True and stars != 1", [4]),
        ("when >= '2024-03-01'", [2, 3, 4]),
        ("when < '2024-02-01T00:00:00+00:00'", [0]),
    ],
)
def test_filters_typed_columns(where: str, expected: list[int]) -> None:
    assert rows(TYPED, where) == expected


@pytest.mark.parametrize(
    ("frame", "where", "expected"),
    [
        ({"q": ["10", " 9", ""], "r": ["9", "10", "1"]}, "q > r", [0]),
        ({"q": [10.0, 9.5], "r": [10, 9]}, "q == r", [0]),
        ({"q": ["10", "b"], "r": ["9", "a"]}, "q > r", [1]),
        ({"q": [1.0, float("nan"), 9.0]}, "q != 1", [2]),
        # Float IDs, due to missing values.
        ({"q": [0.0, float("nan"), 9.0]}, "q in ['0', '7']", [0]),
        ({"q": [0.0, 1.0, 9.0]}, "q != '0'", [1, 2]),
        ({"tags": [["a", "b"], ["a"], []]}, "tags == 'a, b'", [0]),
        ({"tags": [["a", "b"], ["a"], []]}, "tags is None", [2]),
        ({"one": [datetime(2024, 1, 2)] * 2, "two": [datetime(2024, 1, 1), datetime(2024, 1, 3)]}, "one > two", [0]),
    ],
)
def test_compares_columns(frame: dict[str, list[object]], where: str, expected: list[int]) -> None:
    assert rows(pl.DataFrame(frame), where) == expected


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("stars > when", "different types"),
        ("stars > 1" + "0" * 400, "too large"),
        ("stars > " + "-" * 3000 + "1", "characters"),
        ("stars > " + "-" * 1900 + "1", "not an expression"),
        ("stars not in [1, None]", "contains None"),
    ],
)
def test_rejects_wrong_types(where: str, says: str) -> None:
    with raises(RecipeError, Facts("syntax", column="data.filter.where", says=says)):
        rows(TYPED, where)


def test_rejects_nan_in_texts() -> None:
    frame = pl.DataFrame({"q": ["1", "nan", "2"]})
    with raises(DataError, Facts("bad-value", row=2, column="q")):
        rows(frame, "q > 0")


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("event", "is not a condition"),
        ("__import__('os').system('true') == 0", "is a call"),
        ("'a' == 'a'", "not a column"),
        ("event == None", "is None"),
        ("event is 'view'", "only None"),
        ("event in 'view'", "require a list"),
        ("quantity + 1 > 2", "not a column"),
        ("event == b'view'", "not a value"),
        ("not " * 60 + "event == 'a'", "too deep"),
        ("event == '" + "a" * 2000 + "'", "characters"),
        ("col(quantity) == 'a'", "not a value"),
    ],
)
def test_rejects_other_expressions(where: str, says: str) -> None:
    with raises(RecipeError, Facts("syntax", column="data.filter.where", says=says)):
        rows(TEXTS, where)


def test_errors_name_column_and_row() -> None:
    with raises(DataError, Facts("missing-column", "t.csv", column="evnt", says="did you mean 'event'")):
        rows(TEXTS, "evnt == 'view'")
    bad = TEXTS.with_columns(pl.Series("quantity", ["1", "2", "two", "", "1", "1"]))
    with raises(DataError, Facts("bad-value", "t.csv", row=3, column="quantity", says="quotes")):
        rows(bad, "quantity > 1")
    assert rows(bad, "quantity == 'two'") == [2]
    with raises(DataError, Facts("empty", "t.csv", column="data.filter.where", says="no row of 6")):
        rows(TEXTS, "event == 'buy'")
    with raises(RecipeError, Facts("syntax", says="2024-05-31")):
        rows(TYPED, "when > 'May'")


@given(st.text(max_size=40))
def test_any_text_filters_or_is_an_error(where: str) -> None:
    try:
        result = rows(TEXTS, where)
    except LlmrecError as error:
        assert "\n" not in str(error)
    else:
        assert result == sorted(set(result)) and result


def test_errors_count_rows_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_text(
        "user_id,item_id,rating,event\nu1,i1,5,buy\nu1,i2,4,view\n\nu2,i1,x,buy\nu2,i2,3,buy\n", encoding="utf-8"
    )

    def section(where: str) -> DataSection:
        values = {"source": "table", "path": str(path), "columns": {"rating": "rating"}, "filter": {"where": where}}
        return DataSection.model_validate(values)

    with raises(DataError, Facts("bad-value", path, row=3, line=5, column="rating")):
        load_data(section("event == 'buy'"), seed=0)
    data = load_data(section("event == 'buy' and rating != 'x'"), seed=0)
    assert data.interactions.select("user_id", "item_id").rows() == [("u1", "i1"), ("u2", "i2")]
    assert data.provenance["where"] == "event == 'buy' and rating != 'x'" and data.provenance["rows"] == "2"


def test_filters_every_part_of_a_split(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / f"{part}.csv").write_text(
            "user_id,item_id,event\n" + "".join(f"u{n},{part[1]}{n},{'buy' if n % 2 else 'view'}\n" for n in range(6)),
            encoding="utf-8",
        )
    section = DataSection.model_validate(
        {
            "source": "table",
            "files": {part: str(tmp_path / f"{part}.csv") for part in ("train", "test")},
            "split": {"kind": "given"},
            "filter": {"where": "event == 'buy'"},
        }
    )
    data = load_data(section, seed=0)
    assert data.given is not None and data.given.test == {(f"u{n}", f"e{n}") for n in (1, 3, 5)}
    assert len(data.interactions) == 6


def test_filter_requires_source_table() -> None:
    with pytest.raises(ValueError, match=r"data\.filter\.where"):
        DataSection(source="movielens-100k", filter=Filter(where="rating > 3"))
