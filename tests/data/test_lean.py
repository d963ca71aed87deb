"""Reading tables in blocks gives the same result as the careful reader."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from llmrec.data.read import table as reader
from llmrec.data.read.codes import (
    SortedNames,
    coded_pairs,
    concatenate_coded,
    encode_ids,
    pair_codes,
    values_and_codes,
)
from llmrec.data.read.columns import ColumnKind, NeedsExactReader
from llmrec.data.read.delimited import DelimitedReader
from llmrec.data.read.table import read_table
from llmrec.data.read.typed import id_column, most_frequent_texts, number_column, text_column
from llmrec.data.sets.table import load_data
from llmrec.errors import DataError
from llmrec.recipe.schema import DataSection
from tests.facts import Facts, raises

KINDS: dict[str, ColumnKind] = {"user_id": "id", "item_id": "id", "rating": "number", "time": "number", "title": "id"}
ROWS = [
    (f"u{n % 7}", f"i{n * n % 11}", n % 5 + 1, 100 + n, f"Film {n * n % 11}, the", "x" * (n % 3)) for n in range(120)
]
NAMES = ("user_id", "item_id", "rating", "time", "title", "note")


def written(rows: list[tuple[object, ...]], mark: str = "\t", end: str = "\n") -> bytes:
    return end.join([mark.join(NAMES), *(mark.join(map(str, row)) for row in rows), ""]).encode()


def same(one: pl.Series, other: pl.Series) -> bool:
    return one.cast(pl.String).to_list() == other.cast(pl.String).to_list()


@pytest.mark.parametrize("block", [1, 1000])
def test_block_size_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("llmrec.data.read.text.BLOCK", block)
    path = tmp_path / "rows.tsv"
    path.write_bytes(written(ROWS))
    table, expected = read_table(path, KINDS), read_table(path)
    assert table.unread == {"note"} and list(table.frame.columns) == list(expected.frame.columns)
    assert table.sha256 == expected.sha256 and table.where(100) == expected.where(100)
    assert isinstance(table.frame["user_id"].dtype, pl.Enum) and table.frame["time"].dtype == pl.Float64
    for name in ("user_id", "item_id"):
        assert same(id_column(table, name), id_column(expected, name))
    for name in ("rating", "time"):
        assert number_column(table, name, name).equals(number_column(expected, name, name))
    assert most_frequent_texts(table, id_column(table, "item_id"), "title") == most_frequent_texts(
        expected, id_column(expected, "item_id"), "title"
    )
    with pytest.raises(LookupError, match="note"):
        text_column(table, "note")


@pytest.mark.parametrize("block", [1, 64])
def test_quoted_rows_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    path = tmp_path / "rows.csv"
    titles = ['"One, two"', '19" screen', '"a ""quoted"" word"', '"two\nlines"', "plain", '"x\n\n,\ny"'] * 5
    lines = [f"u{number},{title},{number}" for number, title in enumerate(titles)]
    path.write_text("\n".join(["user_id,title,rating", *lines, ""]), encoding="utf-8")
    expected = read_table(path)
    monkeypatch.setattr("llmrec.data.read.text.BLOCK", block)
    for columns in (None, {"user_id": "id", "title": "id", "rating": "number"}):
        table = read_table(path, columns)
        assert all(same(text_column(table, name), text_column(expected, name)) for name in expected.frame.columns)
        assert [table.where(row) for row in range(30)] == [expected.where(row) for row in range(30)]
    assert expected.where(4).line == 7 and expected.frame["title"][5] == "x\n\n,\ny"


@pytest.mark.parametrize(
    ("ending", "pack"),
    [
        ("tsv.gz", gzip.compress),
        ("tsv.zst", lambda raw: pa.compress(raw, codec="zstd", asbytes=True)),
        ("tsv", lambda raw: raw.replace(b"\n", b"\r\n")),
        ("tsv", lambda raw: b"\xef\xbb\xbf" + raw),
        ("csv", lambda raw: raw.replace(b", the", b"").replace(b"\t", b";")),
        ("txt", lambda raw: raw.replace(b"\t", b"::")),
        ("inter", lambda raw: raw.replace(b"user_id", b"user_id:token").replace(b"item_id", b"item_id:token")),
    ],
    ids=["gzip", "zstd", "carriage returns", "mark", "semicolons", "two colons", "half of RecBole"],
)
def test_kinds_of_files_in_blocks(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(pack(written(ROWS)))
    columns = KINDS | {"user_id:token": "id", "item_id:token": "id"}
    table, expected = read_table(path, columns), read_table(path)
    assert table.unread == {"note"} and table.sha256 == expected.sha256
    assert table.frame.columns == expected.frame.columns
    read = [
        name for name in expected.frame.columns if name not in table.unread and table.frame[name].dtype != pl.Float64
    ]
    assert len(read) == 3 and all(same(table.frame[name], expected.frame[name]) for name in read)


def objects(rows: list[tuple[object, ...]]) -> bytes:
    return b"".join(json.dumps(dict(zip(NAMES, row, strict=True)) | {"tags": ["a"]}).encode() + b"\n" for row in rows)


@pytest.mark.parametrize(("block", "numbered"), [(1, False), (1000, True)])
def test_objects_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, numbered: bool) -> None:
    monkeypatch.setattr("llmrec.data.read.text.BLOCK", block)
    path = tmp_path / "rows.jsonl"
    rows = [(int(str(row[0])[1:]), *row[1:]) for row in ROWS] if numbered else ROWS
    path.write_bytes(objects(rows))
    table, expected = read_table(path, KINDS), read_table(path)
    assert table.unread == {"note", "tags"} and table.frame.columns == expected.frame.columns
    assert table.sha256 == expected.sha256 and table.where(100) == expected.where(100)
    assert isinstance(table.frame["user_id"].dtype, pl.Enum) and table.frame["rating"].dtype == pl.Float64
    assert same(id_column(table, "user_id"), id_column(expected, "user_id")) and same(
        id_column(table, "title"), id_column(expected, "title")
    )
    assert number_column(table, "time", "time").equals(number_column(expected, "time", "time"))


def nested(rows: list[tuple[object, ...]]) -> bytes:
    """Return JSON Lines with the user and the item in nested objects."""
    lines = []
    for user, item, *rest in rows:
        values = dict(zip(NAMES[2:], rest, strict=True))
        lines.append(json.dumps({"user": {"id": user, "tags": ["a"]}, "at": {"item": {"sku": item}}, **values}))
    return "\n".join(lines).encode() + b"\n"


PATHS: dict[str, ColumnKind] = {"user.id": "id", "at.item.sku": "id", "rating": "number", "time": "number"}


def test_nested_values_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.data.read.text.BLOCK", 1)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(nested(ROWS))
    table, expected = read_table(path, PATHS), read_table(path)
    assert table.unread >= {"user.tags", "title"} and table.frame.columns == expected.frame.columns
    assert isinstance(table.frame["user.id"].dtype, pl.Enum)
    for name in ("user.id", "at.item.sku"):
        assert same(id_column(table, name), id_column(expected, name))
    assert number_column(table, "time", "time").equals(number_column(expected, "time", "time"))


Change = Callable[[bytes], bytes]


def careful(*_: object) -> None:
    raise NeedsExactReader


def _outcome(section: DataSection) -> str:
    """Return the fingerprint of the table or the error."""
    try:
        return load_data(section, seed=0).fingerprint
    except DataError as error:
        return f"{error.kind}: {error}"


ODD_OBJECTS: list[Change] = [
    lambda raw: raw.replace(b'"u3"', b"3", 1),
    lambda raw: raw.replace(b'"u3"', b'["u3"]', 1),
    lambda raw: raw.replace(b'"u3"', b'{"id": 3}', 1),
    lambda raw: raw.replace(b'"u3"', b'"u\xff"', 1),
    lambda raw: raw.replace(b'"user_id": "u3", ', b"", 1),
    lambda raw: raw.replace(b'{"user_id": "u3"', b'{"user_id": "u3", "user_id": "u4"', 1),
    lambda raw: raw.replace(b'{"user_id": "u3"', b'{"time": 1}{"user_id": "u3"', 1),
    lambda raw: raw.replace(b'"rating": 2', b'"rating": "2"', 1),
    lambda raw: raw.replace(b'"rating": 2', b'"rating": NaN', 1),
    lambda raw: raw.replace(b'"time": 101', b'"time": "2024-05-31"', 1),
    lambda raw: raw.replace(b"\n", b"\r\n"),
    lambda raw: b"\xef\xbb\xbf" + raw,
    lambda raw: raw.decode().encode("utf-16"),
    lambda raw: raw.replace(b'"title"', b'"name"', 1),
    lambda raw: raw.replace(b'"note"', '"título"'.encode()).replace('"título"'.encode(), b'"note"', 1),
]
ODD_WITHIN: list[Change] = [
    lambda raw: raw,
    lambda raw: raw.replace(b'{"id": "u3"', b'{"ID": "u3"', 1),
    lambda raw: raw.replace(b'{"id": "u3"', b'{"id": {"x": "u3"}', 1),
    lambda raw: raw.replace(b'{"id": "u3"', b'{"id": "u3", "id": "u4"', 1),
    lambda raw: raw.replace(b'{"id": "u3", "tags": ["a"]}', b'"u3"', 1),
    lambda raw: raw.replace(b'"user": {', b'"user.id": "x", "user": {', 1),
    lambda raw: raw.replace(b'{"id": "u0"', b'{"ID": "u0"'),
]


@pytest.mark.parametrize(
    ("make", "change"), [*((objects, change) for change in ODD_OBJECTS), *((nested, change) for change in ODD_WITHIN)]
)
def test_unusual_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[list[tuple[object, ...]]], bytes], change: Change
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(change(make(ROWS)))
    columns: dict[str, object] = {"time": "time"}
    if make is nested:
        columns |= {"user": "user.id", "item": "at.item.sku"}
    if "título".encode() in path.read_bytes():
        columns["fields"] = ["título"]
    values = {"source": "table", "path": str(path), "columns": columns, "duplicates": "keep_last"}
    section = DataSection.model_validate(values)
    outcome = _outcome(section)
    monkeypatch.setattr("llmrec.data.read.objects._read_in_blocks", careful)
    assert outcome == _outcome(section)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.replace(b"u3\t", b'"u3"\t', 1),
        lambda raw: raw.replace(b"\nu3", b"\n\nu3", 1),
        lambda raw: raw.replace(b"\tFilm 1,", b"\tF\xefilm 1,"),
        lambda raw: b"# made by hand\n" + raw,
        lambda raw: raw.replace(b"\t101\t", b"\tnever\t"),
        lambda raw: raw + raw[: raw.find(b"\n") + 1],
        lambda raw: raw.replace(b"\t101\t", b"\t101\t\t"),
        lambda raw: raw.replace(b"\nu3\t", b"\n\t", 1),
    ],
    ids=["quotes", "blank line", "Windows-1252", "preamble", "no number", "header twice", "ragged", "no user"],
)
def test_unusual_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes(change(written(ROWS)))
    section = DataSection(source="table", path=str(path), columns={"time": "time"}, duplicates="keep_last")
    outcome = _outcome(section)
    monkeypatch.setattr(DelimitedReader, "_fast", lambda *_: None)
    assert outcome == _outcome(section)


def test_rejects_tables_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes(written(ROWS))
    monkeypatch.setattr(reader, "_ROW_BYTES", 2**40)
    with raises(DataError, Facts("too-large", "rows.tsv", column="data.path", says="GiB are free")):
        read_table(path, KINDS)


def test_files_of_a_folder_share_codes(tmp_path: Path) -> None:
    for part in range(3):
        rows = ROWS[part * 40 : part * 40 + 40]
        (tmp_path / f"part-{part}.tsv").write_bytes(written(rows))
    table, expected = read_table(tmp_path, KINDS), read_table(tmp_path)
    assert isinstance(table.frame["item_id"].dtype, pl.Enum) and same(table.frame["item_id"], expected.frame["item_id"])
    assert table.where(100) == expected.where(100)


@pytest.mark.parametrize("kind", [pl.Categorical, pl.Int64])
def test_parquet_by_columns(tmp_path: Path, kind: type[pl.DataType]) -> None:
    frame = pl.DataFrame(ROWS, schema=list(NAMES), orient="row")
    frame = frame.with_columns(pl.col("user_id").str.strip_prefix("u").cast(kind), nested=pl.struct("note"))
    frame.write_parquet(tmp_path / "rows.parquet", row_group_size=37)
    table, expected = read_table(tmp_path / "rows.parquet", KINDS), read_table(tmp_path / "rows.parquet")
    assert table.unread == {"note"} and table.sha256 == expected.sha256 and table.unusable == expected.unusable
    assert same(id_column(table, "user_id"), id_column(expected, "user_id")) and same(
        id_column(table, "title"), id_column(expected, "title")
    )
    assert number_column(table, "time", "time").equals(number_column(expected, "time", "time"))


def test_codes_are_positions_of_sorted_values() -> None:
    series = pl.Series("a", ["b", "ä", "b", "", "a"])
    values, numbers = values_and_codes(series)
    assert values.to_list() == sorted(set(series)) and [values[int(n)] for n in numbers] == series.to_list()
    assert encode_ids(encode_ids(series)).equals(encode_ids(series)) and not len(
        values_and_codes(pl.Series("a", [], pl.String))[1]
    )
    names = SortedNames(values)
    assert [names.code(name) for name in (*values, "zz", "0")] == [0, 1, 2, 3, None, None]
    both = concatenate_coded("a", [encode_ids(series), encode_ids(pl.Series("a", ["c", "b"]))])
    assert both.to_list() == [*series, "c", "b"] and values_and_codes(both)[0].to_list() == ["", "a", "b", "c", "ä"]


def test_pairs_of_codes() -> None:
    users, items = pl.Series(["a", "a", "b", "a"]), pl.Series(["x", "y", "x", "x"])
    numbers = pair_codes(users, items)
    assert numbers[0] == numbers[3] and len(np.unique(numbers)) == 3
    frame = pl.DataFrame({"user_id": encode_ids(users), "item_id": encode_ids(items)})
    other = coded_pairs([("b", "x"), ("c", "x")], frame)
    assert pair_codes(other["user_id"], other["item_id"]).tolist() == [numbers[2]]
