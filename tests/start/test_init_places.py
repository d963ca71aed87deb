"""`llmrec init` on sheets of a spreadsheet and on databases."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import polars as pl
import pytest

from llmrec.data.sets.table import load_data
from llmrec.errors import DataError
from llmrec.recipe.load import load_recipe
from llmrec.start.init import write_recipe
from tests.facts import Facts, raises
from tests.shop import database
from tests.workbook import workbook


def rows_of(name: str) -> list[tuple[object, ...]]:
    frame = pl.read_csv(name, infer_schema=False).fill_null("")
    return [tuple(frame.columns), *frame.rows()]


@pytest.fixture
def book(folder: Path) -> Path:
    pytest.importorskip("fastexcel")
    sheets = {
        "Notes": [("Notes",), ("exported",)],
        "Clicks 2024": rows_of("clicks.csv"),
        "Items": rows_of("products.csv"),
    }
    return workbook(folder / "book.xlsx", sheets)


def test_sheet_after_a_hash(book: Path) -> None:
    recipe = load_recipe(write_recipe("book.xlsx#Clicks 2024", items=f"{book}#Items", backend="hf").recipe)
    assert recipe.data.path == "book.xlsx#Clicks 2024" and recipe.data.items == f"{book}#Items"
    write_recipe("clicks.csv", items="products.csv", backend="hf")
    plain = load_recipe("clicks.yaml")
    assert recipe.data.columns == plain.data.columns
    assert load_data(recipe.data, seed=0).fingerprint == load_data(plain.data, seed=0).fingerprint


def test_suggests_a_sheet_of_items(book: Path) -> None:
    assert "set --items 'book.xlsx#Items'" in write_recipe("book.xlsx#Clicks 2024", backend="hf").found


def test_wrong_sheet_or_file(book: Path, caplog: pytest.LogCaptureFixture) -> None:
    with raises(DataError, Facts("unknown-name", "book.xlsx", says="'Clicks 2024'")):
        write_recipe("book.xlsx#Clicks 2023")
    with raises(DataError, Facts("missing-file", says="did you mean 'book.xlsx'")):
        write_recipe("bok.xlsx#Items")
    with raises(DataError, Facts("missing-column", "book.xlsx#Notes")):
        write_recipe("book.xlsx")
    assert "choose another with book.xlsx#SHEET: Clicks 2024, Items" in caplog.text
    with raises(DataError, Facts("exists", says="never overwritten")):
        write_recipe("book.xlsx#Clicks 2024", mend=book, force=True)


def people(events: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    users = sorted({str(row[0]) for row in events[1:]})
    return [("id", "email", "city"), *((number, f"{user}@example.org", "Ulm") for number, user in enumerate(users))]


def suggestion(message: str) -> str:
    (result,) = re.findall(r"--query ('[^']*')", message)
    return shlex.split(result)[0]


def test_suggested_query_joins_titles(folder: Path) -> None:
    events = rows_of("clicks.csv")
    url = database(folder / "shop.db", customers=people(events), events=events, products=rows_of("products.csv"))
    with pytest.raises(DataError) as error:
        write_recipe(url)
    query = suggestion(str(error.value))
    write_recipe(url, query=query, backend="hf")
    write_recipe("clicks.csv", items="products.csv", backend="hf")
    result, plain = load_recipe("shop.yaml"), load_recipe("clicks.yaml")
    assert result.data.columns.title == "name"
    assert load_data(result.data, seed=0).fingerprint == load_data(plain.data, seed=0).fingerprint
    # A path to the database file, or the database as the table of items, gives the same suggestion.
    for table, items in (("shop.db", None), (url, url)):
        with raises(DataError, Facts("wrong-format", says=query)):
            write_recipe(table, items=items, force=True)
    with raises(DataError, Facts("wrong-format", says=f"write it as sqlite:///{folder / 'shop.db'}")):
        write_recipe(str(folder / "shop.db"), force=True)


def test_suggested_query_joins_orders_and_lines(folder: Path) -> None:
    events = rows_of("clicks.csv")
    orders = [("order_id", "customer_id", "ts"), *((n, row[0], row[2]) for n, row in enumerate(events[1:]))]
    lines = [("order_id", "sku", "qty"), *((n, row[1], 1) for n, row in enumerate(events[1:]))]
    url = database(folder / "shop.db", customers=people(events), order_lines=lines, orders=orders)
    with pytest.raises(DataError) as error:
        write_recipe(url)
    query = suggestion(str(error.value))
    assert "JOIN orders USING (order_id)" in query
    write_recipe(url, query=query, backend="hf")
    columns = load_recipe("shop.yaml").data.columns
    assert (columns.user, columns.item, columns.time) == ("customer_id", "sku", "ts")


def test_database_file_in_a_recipe(folder: Path) -> None:
    database(folder / "shop.db", events=rows_of("clicks.csv"))
    Path("r.yaml").write_text(
        "name: r\ndata: {source: table, path: shop.db}\ntasks: {sequential: {}}\n", encoding="utf-8"
    )
    with raises(DataError, Facts("wrong-format", says="data.path=sqlite:///shop.db")):
        load_data(load_recipe("r.yaml").data, seed=0)
