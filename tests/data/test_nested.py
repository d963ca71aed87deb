"""Nested columns: objects become columns, and elements of a selected list become rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import section

from llmrec.data.frames import as_arrow
from llmrec.data.read import limits
from llmrec.data.read.table import read_table
from llmrec.data.read.tables import expand_lists
from llmrec.data.sets.table import load_data
from llmrec.errors import DataError
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Columns, Filter
from tests.facts import Facts, raises

pytest.importorskip("llmrec.start", reason="the extension is not there")

from llmrec.start.columns import RequestedRoles
from llmrec.start.init import write_recipe
from llmrec.start.profile import read_sample

ITEMS = [f"A{n:02}" for n in range(30)]
ORDERS: list[dict[str, Any]] = [
    {
        "order_id": n,
        "at": f"2024-01-{1 + n % 28:02}T08:{n % 60:02}:00",
        "user": {"id": 100 + n % 11, "address": {"country": ("DE", "FR")[n % 2]}},
        "lines": [
            {
                "product": {"sku": ITEMS[(5 * n + 7 * k) % 30], "name": f"Thing {(5 * n + 7 * k) % 30}"},
                "quantity": k + 1,
            }
            for k in range(n % 4)
        ],
        "coupons": [],
    }
    for n in range(90)
]
ORDER = Columns(user="user.id", item="lines[].product.sku", time="at", title="lines[].product.name")
FLAT = [
    (str(order["user"]["id"]), line["product"]["sku"], line["product"]["name"])
    for order in ORDERS
    for line in order["lines"]
]


def write(folder: Path, rows: list[Mapping[str, Any]] | list[dict[str, Any]], ending: str) -> Path:
    path = folder / f"t.{ending}"
    if ending == "parquet":
        pq.write_table(as_arrow(list(rows), "rows"), path, row_group_size=7)
    else:
        path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


ENDINGS = pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])


@ENDINGS
def test_elements_of_a_list_are_rows(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path, ORDERS, ending)
    data = load_data(section(path, columns=ORDER, duplicates="keep_all"), seed=0)
    pairs = data.interactions.select(pl.col("user_id", "item_id").cast(pl.String))
    assert pairs.rows() == [row[:2] for row in FLAT]
    assert {item: entry.title for item, entry in data.items.items()} == {row[1]: row[2] for row in FLAT}
    assert data.provenance["rows"] == str(len(FLAT))


@ENDINGS
def test_objects_are_columns(ending: str, tmp_path: Path) -> None:
    table = read_table(write(tmp_path, ORDERS, ending))
    assert table.frame.columns[:4] == ["order_id", "at", "user.id", "user.address.country"]
    assert table.frame.height == len(ORDERS) and "lines[]" in table.lists


@ENDINGS
def test_errors_name_row_of_file(ending: str, tmp_path: Path) -> None:
    orders: list[dict[str, Any]] = json.loads(json.dumps(ORDERS))
    orders[7]["lines"][1]["product"]["sku"] = None
    path = write(tmp_path, orders, ending)
    line = 8 if ending == "jsonl" else None
    with raises(DataError, Facts("missing-value", path, 8, "lines[].product.sku", line)):
        load_data(section(path, columns=ORDER, duplicates="keep_all"), seed=0)
    again = [ORDERS[0], {**ORDERS[7], "lines": ORDERS[7]["lines"] * 2}, ORDERS[9]]
    with raises(DataError, Facts("duplicate", row=2)):
        load_data(section(write(tmp_path, again, ending), columns=ORDER), seed=0)


@pytest.mark.parametrize(("ending", "kind"), [("jsonl", str), ("parquet", str), ("jsonl", int), ("parquet", int)])
def test_lists_of_texts_and_numbers_are_rows(ending: str, kind: type, tmp_path: Path) -> None:
    baskets = [{"user_id": f"u{n % 3}", "skus": [kind(n + k) for k in range(n % 3)]} for n in range(9)]
    path = write(tmp_path, baskets, ending)
    data = load_data(section(path, columns=Columns(item="skus[]"), duplicates="keep_all"), seed=0)
    expected = [(f"u{n % 3}", str(n + k)) for n in range(9) for k in range(n % 3)]
    assert data.interactions.select(pl.col("user_id", "item_id").cast(pl.String)).rows() == expected
    # By default texts are one value, joined by commas.
    assert ("skus" in read_table(path).frame.columns) is (kind is str)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_lists_within_lists(ending: str, tmp_path: Path) -> None:
    users = [
        {"user": n, "orders": [{"day": k, "lines": [{"sku": f"i{k}"}, {"sku": f"i{k + 1}"}]} for k in range(n)]}
        for n in range(4)
    ]
    path = write(tmp_path, users, ending)
    columns = Columns(user="user", item="orders[].lines[].sku", time="orders[].day")
    data = load_data(section(path, columns=columns, duplicates="keep_all"), seed=0)
    assert data.interactions["item_id"].cast(pl.String).to_list()[-4:] == ["i1", "i2", "i2", "i3"]
    assert data.interactions["timestamp"].to_list() == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


def test_parts_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for number, part in enumerate((ORDERS[:40], ORDERS[40:])):
        write(tmp_path, part, "jsonl").rename(tmp_path / "parts" / f"{number}.jsonl")
    expected = load_data(section(write(tmp_path, ORDERS, "jsonl"), columns=ORDER, duplicates="keep_all"), seed=0)
    parts = load_data(section(tmp_path / "parts", columns=ORDER, duplicates="keep_all"), seed=0)
    assert parts.interactions.equals(expected.interactions) and parts.items == expected.items


def test_filter_by_nested_values(tmp_path: Path) -> None:
    path = write(tmp_path, ORDERS, "jsonl")
    where = Filter(where="user.address.country == 'DE' and col('lines[].quantity') > 1")
    data = load_data(section(path, columns=ORDER, duplicates="keep_all", filter=where), seed=0)
    expected = [
        (str(order["user"]["id"]), line["product"]["sku"]) for order in ORDERS[::2] for line in order["lines"][1:]
    ]
    assert data.interactions.select(pl.col("user_id", "item_id").cast(pl.String)).rows() == expected


@pytest.mark.parametrize(
    ("columns", "facts"),
    [
        ({"item": "line[].product.sku"}, Facts("missing-column", says="did you mean 'lines[].product.sku'")),
        ({"item": "lines"}, Facts("bad-value", column="lines", says="lines[].product.sku")),
        ({"user": "user"}, Facts("bad-value", column="user", says="user.id")),
        ({"user": "user.ids"}, Facts("missing-column", column="user.ids", says="did you mean 'user.id'")),
        ({"title": "lines[].product"}, Facts("bad-value", column="lines[].product", says="lines[].product.name")),
        ({"title": "gifts[].sku"}, Facts("contradiction", says=("gifts[].sku", "lines[].product.sku"))),
    ],
)
def test_wrong_paths_are_named(columns: dict[str, str], facts: Facts, tmp_path: Path) -> None:
    path = write(tmp_path, [{**order, "gifts": [{"sku": "x"}]} for order in ORDERS], "parquet")
    with raises(DataError, facts):
        load_data(section(path, columns=ORDER.model_copy(update=columns), duplicates="keep_all"), seed=0)


def test_columns_that_cannot_be_read_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deep: dict[str, Any] = {"x": 1}
    for _ in range(40):
        deep = {"in": deep}
    odd = {"by_id": {f"k{n}": 1 for n in range(300)}, "deep": deep, "vector": [0.5, 1.5], "mixed": [1, {"a": 1}]}
    rows = [
        {"user_id": n % 3, "item_id": n % 5, "user": {"name": "x", "position": [1.5, 2.5]}, **odd} for n in range(9)
    ]
    path = write(tmp_path, rows, "jsonl")
    table = read_table(path)
    assert table.frame.columns == ["user_id", "item_id", "user.name"] and not table.lists
    assert "5 columns have nested values and are excluded" in caplog.text
    with raises(DataError, Facts("bad-value", path, column="user.position", says="nested values")):
        load_data(section(path, columns=Columns(rating="user.position")), seed=0)
    # A key with both objects and texts is skipped, but using it as a column is an error.
    rows[3]["user"] = {"name": {"first": "x"}}
    assert read_table(write(tmp_path, rows, "jsonl")).frame.columns == ["user_id", "item_id"]
    rows[3]["user"] = "x"
    with raises(DataError, Facts("bad-value", row=1, column="user")):
        read_table(write(tmp_path, rows, "jsonl"))


def test_nested_values_as_texts(tmp_path: Path) -> None:
    rows = [
        {"user": {"id": user, "rate": 1.5}, "price": {"at": price}} for user, price in ((1, 2.0), (1.0, 2.5), (None, 3))
    ]
    table = read_table(write(tmp_path, rows, "jsonl"))
    assert table.frame["user.id"].to_list() == ["1", "1", ""]
    assert table.frame["price.at"].to_list() == ["2.0", "2.5", "3"]
    bad = [*rows, {"user": {"id": "a\0"}}]
    with raises(DataError, Facts("encoding", row=4, column="user", line=4)):
        read_table(write(tmp_path, bad, "jsonl"))
    with raises(DataError, Facts("duplicate", column="user.id", says="in a nested value")):
        read_table(write(tmp_path, [{"user": {"id": 1}, "user.id": 2}], "parquet"))
    with raises(DataError, Facts("duplicate", column="user.id")):
        read_table(write(tmp_path, [{"user": {"id": 1}, "user.id": 2}], "jsonl"))


def test_rejects_empty_and_long_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = write(tmp_path, [{"user_id": 1, "lines": [{"sku": "x"}]}, {"user_id": 2, "lines": []}], "jsonl")
    table = read_table(empty)
    with raises(DataError, Facts("empty", column="lines[].sku")):
        expand_lists(rows_of_first(table), ["lines[].sku"])
    # A long text would be repeated for every element of a long list.
    monkeypatch.setattr(limits, "MAX_BYTES", 1_000_000)
    path = write(tmp_path, [{"user_id": 1, "note": "x" * 10_000, "lines": [{"sku": "x"}] * 200}], "parquet")
    with raises(DataError, Facts("too-large", path, column="lines[]")):
        expand_lists(read_table(path), ["lines[].sku"])


def rows_of_first(table: Any) -> Any:
    """Return a table whose lists are all empty."""
    lists = {name: pa.chunked_array([pa.array([[], None], column.type)]) for name, column in table.lists.items()}
    return type(table)(table.name, table.frame, lists=lists)


def test_init_finds_nested_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, ORDERS, "parquet")
    result = write_recipe(path.name)
    recipe = load_recipe(result.recipe)
    assert recipe.data.columns == ORDER
    assert "each element of lines[] is a row" in result.found
    assert load_data(recipe.data, seed=0).interactions.height > 50
    # The same columns by name.
    result = write_recipe(path.name, requested=RequestedRoles(user="user.id", item="lines[].product.sku"), force=True)
    assert load_recipe(result.recipe).data.columns == ORDER
    with raises(DataError, Facts("missing-column", column="lines[].sku", says="did you mean 'lines[].product.sku'")):
        write_recipe(path.name, requested=RequestedRoles(item="lines[].sku"), force=True)


def test_table_of_items_has_the_last_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    orders = [{**order, "lines": [{"sku": each["product"]["sku"]} for each in order["lines"]]} for order in ORDERS]
    write(tmp_path, orders, "jsonl")
    listed = [{"sku": item, "about": {"name": f"The {item}", "category": f"c{n % 3}"}} for n, item in enumerate(ITEMS)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, listed)), encoding="utf-8")
    recipe = load_recipe(write_recipe("t.jsonl", items="items.jsonl").recipe)
    assert (recipe.data.columns.item, recipe.data.columns.title) == ("lines[].sku", "about.name")
    assert recipe.data.columns.fields == ("about.category",)
    items = load_data(recipe.data, seed=0).items
    assert items["A05"].title == "The A05" and items["A05"].fields == {"about.category": "c2"}


def test_part_of_a_large_file_has_lists(tmp_path: Path) -> None:
    path = write(tmp_path, ORDERS * 40, "jsonl")
    part = read_sample(path, limit=60_000, part=60_000)
    rows = part.along(["lines[].product.sku"])
    assert not rows.whole and part.first < rows.first < rows.table.frame.height
    assert rows.table.rows is not None and rows.table.rows[rows.first - 1] < part.first <= rows.table.rows[rows.first]
