"""Tables read a block at a time are the tables that are read with care; what is odd is left to that reader."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from llmrec.data.read import table as reader
from llmrec.data.read.codes import Names, coded, codes, different, in_codes_of, pairs, stacked
from llmrec.data.read.columns import Kind, Unusual
from llmrec.data.read.delimited import Delimited
from llmrec.data.read.table import read_table
from llmrec.data.read.tables import Table
from llmrec.data.read.typed import ids, numbers, one_per_item, texts, times
from llmrec.data.sets.table import load
from llmrec.errors import DataError
from llmrec.recipe.schema import DataSection
from tests.facts import Facts, raises

WANTED: dict[str, Kind] = {"user_id": "id", "item_id": "id", "rating": "number", "time": "number", "title": "id"}
ROWS = [
    (f"u{n % 7}", f"i{n * n % 11}", n % 5 + 1, 100 + n, f"Film {n * n % 11}, the", "x" * (n % 3)) for n in range(200)
]
NAMES = ("user_id", "item_id", "rating", "time", "title", "note")


def written(rows: list[tuple[object, ...]], mark: str = "\t", end: str = "\n") -> bytes:
    return end.join([mark.join(NAMES), *(mark.join(map(str, row)) for row in rows), ""]).encode()


def same(found: pl.Series, wanted: pl.Series) -> bool:
    return found.cast(pl.String).to_list() == wanted.cast(pl.String).to_list()


@pytest.mark.parametrize("block", [1, 64, 1000, 1 << 20])
def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("llmrec.data.read.text.BLOCK", block)
    path = tmp_path / "rows.tsv"
    path.write_bytes(written(ROWS))
    found, whole = read_table(path, WANTED), read_table(path)
    assert found.unread == {"note"} and list(found.frame.columns) == list(whole.frame.columns)
    assert found.sha256 == whole.sha256 and found.where(150) == whole.where(150)
    assert isinstance(found.frame["user_id"].dtype, pl.Enum) and found.frame["time"].dtype == pl.Float64
    for name in ("user_id", "item_id"):
        assert same(ids(found, name), ids(whole, name))
    for name in ("rating", "time"):
        assert numbers(found, name, name).equals(numbers(whole, name, name))
    assert one_per_item(found, ids(found, "item_id"), "title") == one_per_item(whole, ids(whole, "item_id"), "title")
    with pytest.raises(LookupError, match="note"):
        texts(found, "note")


@pytest.mark.parametrize("block", [1, 7, 64])
def test_quoted_rows_go_on_in_the_next_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    path = tmp_path / "rows.csv"
    titles = ['"One, two"', '19" screen', '"a ""quoted"" word"', '"two\nlines"', "plain", '"x\n\n,\ny"'] * 5
    lines = [f"u{number},{title},{number}" for number, title in enumerate(titles)]
    path.write_text("\n".join(["user_id,title,rating", *lines, ""]), encoding="utf-8")
    whole = read_table(path)
    monkeypatch.setattr("llmrec.data.read.text.BLOCK", block)
    for wanted in (None, {"user_id": "id", "title": "id", "rating": "number"}):
        found = read_table(path, wanted)
        assert all(same(texts(found, name), texts(whole, name)) for name in whole.frame.columns)
        assert [found.where(row) for row in range(30)] == [whole.where(row) for row in range(30)]
    assert whole.where(4).line == 7 and whole.frame["title"][5] == "x\n\n,\ny"


@pytest.mark.parametrize(
    ("ending", "pack"),
    [
        ("tsv.gz", gzip.compress),
        ("tsv.bz2", bz2.compress),
        ("tsv.xz", lzma.compress),
        ("tsv.zst", lambda raw: pa.compress(raw, codec="zstd", asbytes=True)),
        ("tsv", lambda raw: raw.replace(b"\n", b"\r\n")),
        ("tsv", lambda raw: b"\xef\xbb\xbf" + raw),
        ("csv", lambda raw: raw.replace(b", the", b"").replace(b"\t", b";")),
        ("txt", lambda raw: raw.replace(b"\t", b"::")),
        ("inter", lambda raw: raw.replace(b"user_id", b"user_id:token").replace(b"item_id", b"item_id:token")),
    ],
    ids=["gzip", "bzip2", "xz", "zstd", "carriage returns", "mark", "semicolons", "two colons", "half of RecBole"],
)
def test_plain_files_of_every_kind_are_read_a_block_at_a_time(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(pack(written(ROWS)))
    wanted = WANTED | {"user_id:token": "id", "item_id:token": "id"}
    found, whole = read_table(path, wanted), read_table(path)
    assert found.unread == {"note"} and found.sha256 == whole.sha256
    assert found.frame.columns == whole.frame.columns
    read = [name for name in whole.frame.columns if name not in found.unread and found.frame[name].dtype != pl.Float64]
    assert len(read) == 3 and all(same(found.frame[name], whole.frame[name]) for name in read)


def objects(rows: list[tuple[object, ...]]) -> bytes:
    return b"".join(json.dumps(dict(zip(NAMES, row, strict=True)) | {"tags": ["a"]}).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("block", [1, 1000, 1 << 20])
@pytest.mark.parametrize("numbered", [False, True])
def test_objects_are_read_a_block_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, numbered: bool
) -> None:
    monkeypatch.setattr("llmrec.data.read.text.BLOCK", block)
    path = tmp_path / "rows.jsonl"
    rows = [(int(str(row[0])[1:]), *row[1:]) for row in ROWS] if numbered else ROWS
    path.write_bytes(objects(rows))
    found, whole = read_table(path, WANTED), read_table(path)
    assert found.unread == {"note", "tags"} and found.frame.columns == whole.frame.columns
    assert found.sha256 == whole.sha256 and found.where(150) == whole.where(150)
    assert isinstance(found.frame["user_id"].dtype, pl.Enum) and found.frame["rating"].dtype == pl.Float64
    assert same(ids(found, "user_id"), ids(whole, "user_id")) and same(ids(found, "title"), ids(whole, "title"))
    assert numbers(found, "time", "time").equals(numbers(whole, "time", "time"))


def nested(rows: list[tuple[object, ...]]) -> bytes:
    """The user, the item and its title within objects."""
    lines = []
    for user, item, *rest, title in ([*row[:-1], row[-1]] for row in rows):
        held = dict(zip(NAMES[2:], (*rest, title), strict=True))
        lines.append(json.dumps({"user": {"id": user, "tags": ["a"]}, "at": {"item": {"sku": item}}, **held}))
    return "\n".join(lines).encode() + b"\n"


PATHS: dict[str, Kind] = {"user.id": "id", "at.item.sku": "id", "rating": "number", "time": "number"}


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_what_is_within_objects_is_read_a_block_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("llmrec.data.read.text.BLOCK", block)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(nested(ROWS))
    found, whole = read_table(path, PATHS), read_table(path)
    assert found.unread >= {"user.tags", "title"} and found.frame.columns == whole.frame.columns
    assert isinstance(found.frame["user.id"].dtype, pl.Enum)
    for name in ("user.id", "at.item.sku"):
        assert same(ids(found, name), ids(whole, name))
    assert numbers(found, "time", "time").equals(numbers(whole, "time", "time"))


Change = Callable[[bytes], bytes]


def careful(*_: object) -> None:
    raise Unusual


def _outcome(section: DataSection) -> str:
    """What reading makes of it: the table's fingerprint, or the error said."""
    try:
        return load(section, seed=0).fingerprint
    except DataError as error:
        return f"{error.kind}: {error}"


ODD_OBJECTS: list[Change] = [
    lambda raw: raw.replace(b'"u3"', b"3", 1),
    lambda raw: raw.replace(b'"u3"', b"null", 1),
    lambda raw: raw.replace(b'"u3"', b'["u3"]', 1),
    lambda raw: raw.replace(b'"u3"', b'{"id": 3}', 1),
    lambda raw: raw.replace(b'"u3"', b'"u\xff"', 1),
    lambda raw: raw.replace(b'"user_id": "u3", ', b"", 1),
    lambda raw: raw.replace(b'{"user_id": "u3"', b'{"user_id": "u3", "user_id": "u4"', 1),
    lambda raw: raw.replace(b'{"user_id": "u3"', b'\n{"user_id": "u3"', 1),
    lambda raw: raw.replace(b'{"user_id": "u3"', b'{"time": 1}{"user_id": "u3"', 1),
    lambda raw: raw.replace(b'"rating": 2', b'"rating": "2"', 1),
    lambda raw: raw.replace(b'"rating": 2', b'"rating": NaN', 1),
    lambda raw: raw.replace(b'"rating": 2', b'"rating": true', 1),
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
    lambda raw: raw.replace(b'{"id": "u3"', b'{"id": 3', 1),
    lambda raw: raw.replace(b'{"id": "u3"', b'{"id": {"x": "u3"}', 1),
    lambda raw: raw.replace(b'{"id": "u3"', b'{"id": "u3", "id": "u4"', 1),
    lambda raw: raw.replace(b'{"id": "u3", "tags": ["a"]}', b'"u3"', 1),
    lambda raw: raw.replace(b'{"id": "u3", "tags": ["a"]}', b"null", 1),
    lambda raw: raw.replace(b'"user": {', b'"user.id": "x", "user": {', 1),
    lambda raw: raw.replace(b'{"id": "u0"', b'{"ID": "u0"'),
]


@pytest.mark.parametrize(
    ("make", "change"), [*((objects, change) for change in ODD_OBJECTS), *((nested, change) for change in ODD_WITHIN)]
)
def test_odd_objects_are_what_they_are_to_the_careful_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[list[tuple[object, ...]]], bytes], change: Change
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(change(make(ROWS)))
    columns: dict[str, object] = {"time": "time"}
    if make is nested:
        columns |= {"user": "user.id", "item": "at.item.sku"}
    if "título".encode() in path.read_bytes():
        columns["fields"] = ["título"]
    section = DataSection.model_validate(
        {"source": "table", "path": str(path), "columns": columns, "duplicates": "keep_last"}
    )
    found = _outcome(section)
    monkeypatch.setattr("llmrec.data.read.objects._gathered", careful)
    assert found == _outcome(section)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.replace(b"u3\t", b'"u3"\t', 1),
        lambda raw: raw.replace(b"\nu3", b"\n\nu3", 1),
        lambda raw: raw.replace(b"\tFilm 1,", b"\tF\xefilm 1,"),
        lambda raw: b"# made by hand\n" + raw,
        lambda raw: raw.replace(b"\t101\t", b"\tnever\t"),
        lambda raw: raw.replace(b"\t2\t101\t", b"\tnan\t101\t"),
        lambda raw: raw + raw[: raw.find(b"\n") + 1],
        lambda raw: raw.replace(b"\t101\t", b"\t101\t\t"),
        lambda raw: raw.replace(b"\nu3\t", b"\n\t", 1),
    ],
    ids=["quotes", "blank line", "Windows-1252", "preamble", "no number", "NaN", "header twice", "ragged", "no user"],
)
def test_odd_files_are_what_they_are_to_the_careful_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes(change(written(ROWS)))
    section = DataSection(source="table", path=str(path), columns={"time": "time"}, duplicates="keep_last")
    found = _outcome(section)
    monkeypatch.setattr(Delimited, "_fast", lambda *_: None)
    assert found == _outcome(section)


def test_what_will_not_fit_the_memory_is_said_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes(written(ROWS))
    monkeypatch.setattr(reader, "_ROW", 2**40)
    with raises(DataError, Facts("too-large", "rows.tsv", column="data.path", says="GiB are free")):
        read_table(path, WANTED)


def test_folders_of_files_share_their_codes(tmp_path: Path) -> None:
    for part in range(3):
        rows = ROWS[part * 60 : part * 60 + 60]
        (tmp_path / f"part-{part}.tsv").write_bytes(written(rows))
    found, whole = read_table(tmp_path, WANTED), read_table(tmp_path)
    assert isinstance(found.frame["item_id"].dtype, pl.Enum) and same(found.frame["item_id"], whole.frame["item_id"])
    assert found.where(100) == whole.where(100)


@pytest.mark.parametrize("kind", [pl.String, pl.Categorical, pl.Int64])
def test_parquet_is_read_by_columns(tmp_path: Path, kind: type[pl.DataType]) -> None:
    frame = pl.DataFrame(ROWS, schema=list(NAMES), orient="row")
    frame = frame.with_columns(pl.col("user_id").str.strip_prefix("u").cast(kind), nested=pl.struct("note"))
    frame.write_parquet(tmp_path / "rows.parquet", row_group_size=37)
    found, whole = read_table(tmp_path / "rows.parquet", WANTED), read_table(tmp_path / "rows.parquet")
    assert found.unread == {"note"} and found.sha256 == whole.sha256 and found.unusable == whole.unusable
    assert same(ids(found, "user_id"), ids(whole, "user_id")) and same(ids(found, "title"), ids(whole, "title"))
    assert numbers(found, "time", "time").equals(numbers(whole, "time", "time"))


# --------------------------------------------------------------------------- codes


def test_codes_are_places_in_the_sorted_values() -> None:
    given = pl.Series("a", ["b", "ä", "b", "", "a"])
    values, found = codes(given)
    assert values.to_list() == sorted(set(given)) and [values[int(n)] for n in found] == given.to_list()
    assert coded(coded(given)).equals(coded(given)) and not len(codes(pl.Series("a", [], pl.String))[1])
    names = Names(values)
    assert [names.code(name) for name in (*values, "zz", "0")] == [0, 1, 2, 3, None, None]
    both = stacked("a", [coded(given), coded(pl.Series("a", ["c", "b"]))])
    assert both.to_list() == [*given, "c", "b"] and codes(both)[0].to_list() == ["", "a", "b", "c", "ä"]


def test_pairs_are_equal_where_both_ids_are() -> None:
    users, items = pl.Series(["a", "a", "b", "a"]), pl.Series(["x", "y", "x", "x"])
    found = pairs(users, items)
    assert found[0] == found[3] and len(np.unique(found)) == 3
    assert different(found) == different(found[:3]) == 3
    frame = pl.DataFrame({"user_id": coded(users), "item_id": coded(items)})
    other = in_codes_of(pl.DataFrame({"user_id": ["b", "c"], "item_id": ["x", "x"]}), frame)
    assert pairs(other["user_id"], other["item_id"]).tolist() == [found[2]]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2024-05-31", 1717113600.0),
        ("2024-05-31T08:15:00Z", 1717143300.0),
        (" 2024-05-31 08:15:00 ", 1717143300.0),
        ("2024-05-31T08:15", 1717143300.0),
        ("1999-12-31 23:59:59.999999", 946684799.999999),
        ("2024-05-31T08:15:00+02:00", 1717136100.0),
        ("20240531", 1717113600.0),
        ("0001-01-01", -62135596800.0),
        ("2024-05-31Z", None),
        ("0000-01-01", None),
        ("2024-02-30", None),
        ("2024-05-31 08:15:60", None),
        ("31.05.2024", 1717113600.0),
        ("31.05.", None),
        ("", None),
    ],
)
def test_dates_are_what_the_standard_library_takes_them_for(text: str, seconds: float | None) -> None:
    table = Table("t", pl.DataFrame({"time": ["2024-01-01", text]}))
    if seconds is not None:
        assert times(table, "time").to_list() == [1704067200.0, seconds]
        return
    with pytest.raises(DataError) as caught:
        times(table, "time")
    assert caught.value.row == 2
