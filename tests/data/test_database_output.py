"""Output tables in databases: written in one transaction, replaced only with --restart."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from llmrec.data.database_output import Database
from llmrec.data.read.databases import read_query
from llmrec.errors import DataError, LlmrecError
from tests.facts import Facts, raises

ROWS = pa.table({"user_id": ["a", "b", None], "rank": [1, 2, None], "score": [0.5, -1.0, None]})
OTHER = ROWS.rename_columns(["who", "rank", "score"])


@pytest.fixture(params=["sqlite", "duckdb", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres"))
    pytest.importorskip("sqlite3" if request.param == "sqlite" else "duckdb")
    return f"{request.param}:///{tmp_path}/shop.{request.param}"


def opened(address: str | Path) -> Database:
    database = Database.of(str(address), "--to")
    assert database is not None
    return database


def rows(address: str, name: str) -> list[tuple[object, ...]]:
    return pl.DataFrame(read_query(address, f"SELECT * FROM {name}").frame).rows()


def test_tables_are_replaced_only_on_request(address: str) -> None:
    database = opened(address)
    expected = list(zip(*ROWS.to_pydict().values(), strict=True))
    database.check("lists", ROWS.schema, replace=False)
    database.write("lists", ROWS, index=("user_id", "rank"), replace=False)
    assert rows(address, "lists") == expected
    # Other tables stay.
    database.write("more", ROWS, index=("user_id",), replace=False)
    exists = Facts("exists", column="--to", says="--restart")
    with raises(DataError, exists):
        database.check("lists", ROWS.schema, replace=False)
    with raises(DataError, exists):
        database.write("lists", ROWS.slice(1), index=("user_id",), replace=False)
    assert rows(address, "lists") == expected
    database.write("lists", ROWS.slice(1), index=("user_id", "rank"), replace=True)
    assert rows(address, "lists") == expected[1:] and rows(address, "more") == expected
    for replace in (True, False):
        with raises(DataError, Facts("exists", column="--to", says="another table 'lists'")):
            database.write("lists", OTHER, index=("who",), replace=replace)
    assert rows(address, "lists") == expected[1:]


def test_failed_write_changes_nothing(address: str) -> None:
    database = opened(address)
    database.write("kept", ROWS, index=("user_id",), replace=False)
    with raises(LlmrecError, Facts("failed", column="--to", says="nothing in it was changed")):
        database.write("kept", ROWS, index=("no_such_column",), replace=True)
    assert len(rows(address, "kept")) == 3


def test_table_with_capitals_is_not_replaced(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    address = f"duckdb:///{tmp_path}/shop.duckdb"
    with closing(duckdb.connect(f"{tmp_path}/shop.duckdb")) as other:
        other.execute('CREATE TABLE "Lists" (precious INTEGER); INSERT INTO "Lists" VALUES (7)')
    database = opened(address)
    for replace in (False, True):
        with raises(DataError, Facts("exists", column="--to", says="another table 'lists'")):
            database.write("lists", ROWS, index=("user_id",), replace=replace)
    assert rows(address, '"Lists"') == [(7,)]


def test_table_of_another_schema_is_not_dropped(postgres: str) -> None:
    dbapi = pytest.importorskip("adbc_driver_postgresql.dbapi")
    with closing(dbapi.connect(postgres)) as other:
        for line in (
            "CREATE SCHEMA app",
            "CREATE SCHEMA shared",
            "CREATE TABLE shared.offers (precious BIGINT)",
            "INSERT INTO shared.offers VALUES (7)",
        ):
            other.cursor().execute(line)
        other.commit()
    joined = f"{postgres}{'&' if '?' in postgres else '?'}options=-csearch_path%3Dapp%2Cshared"
    database = opened(joined)
    database.write("offers", ROWS, index=("user_id",), replace=False)
    assert len(rows(postgres, "app.offers")) == 3 and rows(postgres, "shared.offers") == [(7,)]


def test_missing_folder_is_found_at_once(tmp_path: Path) -> None:
    database = opened(f"{tmp_path}/missing/lists.db")
    with raises(DataError, Facts("failed", column="--to", says="there is no folder")):
        database.check("lists", ROWS.schema, replace=False)


def test_recognises_databases(tmp_path: Path) -> None:
    for name in ("lists.db", "lists.sqlite", "lists.sqlite3"):
        database = opened(tmp_path / name)
        assert (database.kind, database.file) == ("sqlite", tmp_path / name)
    for name in ("lists.csv", "mysql://host/shop", "sqlite://lists.db", "sqlite:///", "https://example.org/lists.db"):
        assert Database.of(name, "--to") is None


def test_rejects_files_of_other_programs_and_hides_passwords(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as file:
        file.execute("PRAGMA application_id = 7")
    database = opened(other)
    with raises(DataError, Facts("exists", column="--to", says="another program")):
        database.check("lists", ROWS.schema, replace=True)
    other.write_text("no database, but a text that is long enough to be read as the header of a page of one" * 9)
    with raises(LlmrecError, Facts("failed", column="--to")):
        database.check("lists", ROWS.schema, replace=False)
    pytest.importorskip("adbc_driver_postgresql.dbapi")
    away = opened("postgresql://me:secret@127.0.0.1:1/shop")
    with pytest.raises(LlmrecError) as caught:
        away.check("lists", ROWS.schema, replace=False)
    assert "secret" not in str(caught.value) and "postgresql://127.0.0.1/shop" in str(caught.value)
    # Passwords that libpq repeats in its messages, or that urllib rejects.
    for address in ("me:se%zzcret@127.0.0.1:1/db", "127.0.0.1:1/db?user=me&password=se%zzcret", "me:se[zzcret@h:1/db"):
        odd = opened(f"postgresql://{address}")
        with pytest.raises(LlmrecError) as caught:
            odd.check("lists", ROWS.schema, replace=False)
        assert "zzcret" not in str(caught.value)
    assert Database.of("https://me:x@[h/l.csv", "--to") is None
