"""Spreadsheets and databases: the same rows as from a CSV file, read-only."""

from __future__ import annotations

import logging
import re
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from llmrec.data.dataset import Dataset
from llmrec.data.read.sheets import list_sheets
from llmrec.data.sets.table import load_data
from llmrec.errors import LlmrecError, RecipeError
from llmrec.recipe.load import as_recipe
from llmrec.recipe.schema import DataSection
from tests.facts import Facts, raises
from tests.workbook import workbook

ROWS = [(f"u{n % 6}", f"i{n % 5}", 1.0 + n % 5, 1_000 + n, f"Film {n % 5} & Co.") for n in range(30)]
NAMES = ("user_id", "item_id", "rating", "timestamp", "title")
QUERY = "SELECT user_id, item_id, rating, timestamp, title FROM events ORDER BY timestamp"
CREATE = "CREATE TABLE events (user_id TEXT, item_id TEXT, rating DOUBLE PRECISION, timestamp BIGINT, title TEXT)"


def loaded(path: object, **keys: Any) -> Dataset:
    return load_data(DataSection(source="table", path=str(path), duplicates="keep_last", **keys), seed=0)


@pytest.fixture
def expected(tmp_path: Path) -> str:
    pl.DataFrame(ROWS, schema=list(NAMES), orient="row").write_csv(tmp_path / "rows.csv")
    return loaded(tmp_path / "rows.csv").fingerprint


def test_spreadsheet(tmp_path: Path, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("fastexcel")
    blank: list[tuple[object, ...]] = [("", "", "", "", "")] * 3
    book = workbook(tmp_path / "shop.xlsx", {"Orders": [NAMES, *ROWS, *blank], "Notes": [("note",), ("made by hand",)]})
    with caplog.at_level(logging.WARNING):
        data = loaded(book)
    assert data.fingerprint == expected and data.name == "shop"
    assert any("the first sheet, Orders" in record.message for record in caplog.records)
    with raises(LlmrecError, Facts("unknown-name", "shop.xlsx", says=("'Ordres'", "Orders, Notes"))):
        loaded(f"{book}#Ordres")
    with raises(LlmrecError, Facts("missing-column", "shop.xlsx#Notes", column="user_id")):
        loaded(f"{book}#Notes")


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda rows: [*rows[:4], ("u9", "", 3, 9, "x"), *rows[4:]], Facts("missing-value", row=4, column="item_id")),
        (lambda rows: [*rows, (0,) * 2001], Facts("too-large", "shop.xlsx", line=1)),
    ],
    ids=["no item", "too many columns"],
)
def test_malformed_spreadsheets(tmp_path: Path, change: Callable[[Any], Any], facts: Facts) -> None:
    pytest.importorskip("fastexcel")
    with raises(LlmrecError, facts):
        loaded(workbook(tmp_path / "shop.xlsx", {"Orders": change([NAMES, *ROWS])}))


def test_damaged_spreadsheet_and_bomb(tmp_path: Path) -> None:
    pytest.importorskip("fastexcel")
    (tmp_path / "old.xls").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"x" * 5000)
    with raises(LlmrecError, Facts("damaged", "old.xls")):
        loaded(tmp_path / "old.xls")
    with zipfile.ZipFile(tmp_path / "bomb.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", b" " * 40_000_000)
    with raises(LlmrecError, Facts("too-large", "bomb.xlsx")):
        loaded(tmp_path / "bomb.xlsx")


@pytest.mark.parametrize("reference", ["XFD1048576", "A99999999999"])
def test_rejects_cell_far_outside_the_table(tmp_path: Path, reference: str) -> None:
    """The library allocates all cells up to this one, and aborts the process if that fails."""
    pytest.importorskip("fastexcel")
    book = workbook(tmp_path / "shop.xlsx", {"Orders": [NAMES, *ROWS]})
    with zipfile.ZipFile(book) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    row = re.sub("[A-Z]", "", reference)
    far = f'<row r="{row}"><c r="{reference}"><v>1</v></c></row></sheetData>'.encode()
    parts["xl/sheet1.xml"] = parts["xl/sheet1.xml"].replace(b"</sheetData>", far)
    with zipfile.ZipFile(book, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with raises(LlmrecError, Facts("too-large", "shop.xlsx", says="a cell is far outside the table")):
        loaded(book)
    assert list_sheets(book) == [f"{book}#Orders"]


def test_large_numbers_of_spreadsheets_are_no_ids(tmp_path: Path) -> None:
    pytest.importorskip("fastexcel")
    large = 9_007_199_254_740_993
    as_numbers = workbook(
        tmp_path / "n.xlsx", {"A": [NAMES, *((large + n % 6, *row[1:]) for n, row in enumerate(ROWS))]}
    )
    with raises(LlmrecError, Facts("bad-value", "n.xlsx", row=1, column="user_id")):
        loaded(as_numbers)
    as_texts = workbook(
        tmp_path / "t.xlsx", {"A": [NAMES, *((str(large + n % 6), *row[1:]) for n, row in enumerate(ROWS))]}
    )
    assert set(loaded(as_texts).interactions["user_id"]) == {str(large + n) for n in range(6)}
    # Other columns may contain such numbers.
    further = [(*NAMES, "code"), *((*row, 10.0**20) for row in ROWS), ("", "", "", "", "", "")]
    assert len(loaded(workbook(tmp_path / "f.xlsx", {"A": further})).interactions) == len(ROWS)


def in_sqlite(folder: Path) -> str:
    with closing(sqlite3.connect(folder / "shop.db")) as connection:
        connection.execute(CREATE)
        connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", ROWS)
        connection.commit()
    return f"sqlite:///{folder / 'shop.db'}"


def in_duckdb(folder: Path) -> str:
    duckdb = pytest.importorskip("duckdb")
    with closing(duckdb.connect(str(folder / "shop.duckdb"))) as connection:
        connection.execute(CREATE)
        connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", ROWS)
    return f"duckdb:///{folder / 'shop.duckdb'}"


@pytest.fixture(scope="module")
def server(postgres: str) -> str:
    """Return the URL of a server with a table of interactions."""
    dbapi = pytest.importorskip("adbc_driver_postgresql.dbapi")
    with dbapi.connect(postgres) as connection, connection.cursor() as cursor:
        cursor.execute(CREATE)
        for row in ROWS:
            cursor.execute("INSERT INTO events VALUES ($1, $2, $3, $4, $5)", row)
        connection.commit()
    return postgres


@pytest.mark.parametrize("make", [in_sqlite, in_duckdb])
def test_query_of_a_database_file(tmp_path: Path, expected: str, make: Callable[[Path], str]) -> None:
    url = make(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    data = loaded(url, query=QUERY)
    assert data.fingerprint == expected and data.name == "shop" and len(data.provenance["sha256"]) == 64
    kept = loaded(url, query=QUERY, filter={"where": "rating >= 2"})
    assert kept.interactions["rating"].min() == 2.0
    for writes in ("DELETE FROM events", "DROP TABLE events", "CREATE TABLE more (n INTEGER)"):
        with raises(LlmrecError, Facts("unreadable", column="data.query")):
            loaded(url, query=writes)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_query_of_a_database_server(server: str, expected: str) -> None:
    assert loaded(server, query=QUERY).fingerprint == expected
    for writes in ("DELETE FROM events", "DELETE FROM events RETURNING *", "CREATE TABLE more (n INTEGER)"):
        with raises(LlmrecError, Facts("unreadable", column="data.query", says="read-only")):
            loaded(server, query=writes)
    assert loaded(server, query=QUERY).interactions.height == len(ROWS)


def test_duckdb_reads_no_other_file(tmp_path: Path, expected: str) -> None:
    url = in_duckdb(tmp_path)
    with raises(LlmrecError, Facts("unreadable", column="data.query")):
        loaded(url, query=f"SELECT * FROM read_csv('{tmp_path / 'rows.csv'}')")


@pytest.mark.parametrize(
    ("path", "query", "facts"),
    [
        ("sqlite:///gone.db", QUERY, Facts("missing-file", "gone.db")),
        ("sqlite:///shop.db", None, Facts("missing-key", column="data.query")),
        ("rows.csv", QUERY, Facts("contradiction", column="data.query")),
        ("postgresql://me:secret@host/shop", QUERY, Facts("unsafe", column="data.path", says="PGPASSWORD")),
        ("postgresql://me@host/shop?password=secret", QUERY, Facts("unsafe", column="data.path")),
        ("sqlite:///shop.db", "SELECT * FROM order", Facts("unreadable", column="data.query")),
        ("sqlite:///shop.db", "SELECT * FROM events WHERE 1 = 0", Facts("empty")),
    ],
    ids=["no file", "no query", "not a database", "a password", "another password", "no SQL", "no rows"],
)
def test_errors_hide_passwords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: str, path: str, query: str | None, facts: Facts
) -> None:
    monkeypatch.chdir(tmp_path)
    in_sqlite(tmp_path)
    with raises(LlmrecError, facts) as caught:
        loaded(path, query=query)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_query_requires_source_table() -> None:
    with pytest.raises(RecipeError, match=r"data\.query"):
        as_recipe({"name": "x", "data": {"source": "movielens-100k", "query": QUERY}, "tasks": {"sequential": {}}})
