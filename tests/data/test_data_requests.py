"""Requests, files of requests, and files of ranked lists."""

from __future__ import annotations

import csv
import gzip
import json
import math
import resource
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data import ranked
from llmrec.data.assemble import digest_items, read_items
from llmrec.data.ranked import RankingRecord, read_part, write_part, write_records
from llmrec.data.read.files import read_bytes
from llmrec.data.request_file import RequestRow, open_requests
from llmrec.data.requests import RankRequest, parse_request, request_identity
from llmrec.errors import DataError
from llmrec.types import Item
from tests.facts import Facts, raises

ITEMS = {
    "1": Item(item_id="1", title="Toy Story (1995)", fields={"genres": "Animation"}),
    "2": Item(item_id="2", title="Heat (1995)", fields={"genres": "Crime"}),
    "3": Item(item_id="3", title=" "),
}


def read(record: dict[str, Any], items: Any = ITEMS) -> RankRequest:
    return parse_request(record, 7, items)


# --------------------------------------------------------------------------- one request


def test_ids_and_titles() -> None:
    request = read({"id": "r", "user_id": 5, "history": ["1"], "candidates": [2, {"title": "Alien", "year": 1979}]})
    assert (request.id, request.user_id, request.notes) == ("r", "5", ())
    assert request.history[0].item == ITEMS["1"]
    assert request.candidates == (ITEMS["2"], Item(item_id="Alien", title="Alien", fields={"year": "1979"}))


def test_title_of_request_replaces_catalogue_title() -> None:
    (item,) = read({"candidates": [{"item_id": "1", "title": "Une histoire de jouets", "country": "US"}]}).candidates
    assert item == Item(item_id="1", title="Une histoire de jouets", fields={"genres": "Animation", "country": "US"})
    assert read({"candidates": ["1"]}).candidates[0].title == "Toy Story (1995)"


def test_texts_are_titles_without_catalogue() -> None:
    request = read({"candidates": ["Heat", "  Heat\n", 1984, "Jaws"], "history": ["Alien"]}, None)
    assert [(item.item_id, item.title) for item in request.candidates] == [
        ("Heat", "Heat"),
        ("1984", "1984"),
        ("Jaws", "Jaws"),
    ]
    assert request.notes == ("candidates: repeated items are ranked once: 'Heat'",)


def test_unknown_items() -> None:
    parts = ("'99', '3'", '{"item_id": "99", "title": ...}', "--items")
    with raises(DataError, Facts("unknown-name", column="candidates", says=parts)):
        read({"candidates": ["1", "99", {"item_id": "3"}]})
    with raises(DataError, Facts("unknown-name", column="candidates", says="no catalogue")):
        read({"candidates": [{"item_id": "1"}]}, None)
    request = read({"history": ["99", "1", "3"], "candidates": ["1"]})
    assert [past.item.item_id for past in request.history] == ["1"]
    assert request.notes == ("history: ignored unknown items without a title: '99', '3'",)


MALFORMED: list[tuple[dict[str, Any], Facts]] = [
    ({}, Facts("missing-key", column="candidates")),
    ({"candidate": ["1"]}, Facts("missing-key", column="candidates", says="did you mean 'candidate'")),
    ({"candidates": []}, Facts("empty", column="candidates")),
    ({"candidates": "1"}, Facts("bad-value", column="candidates")),
    ({"candidates": [None]}, Facts("missing-value", column="candidates, entry 1")),
    ({"candidates": [math.nan]}, Facts("missing-value", column="candidates, entry 1")),
    ({"candidates": [math.inf]}, Facts("bad-value", column="candidates, entry 1")),
    ({"candidates": [["1"]]}, Facts("bad-value", column="candidates, entry 1")),
    ({"candidates": [{"title": 3}]}, Facts("bad-value", column="candidates, entry 1: title")),
    ({"candidates": [{"title": " \u200b"}]}, Facts("missing-value", column="candidates, entry 1")),
    ({"candidates": [{"title": "x", "deep": {"a": 1}}]}, Facts("bad-value", column="candidates, entry 1: deep")),
    ({"candidates": ["1\x07"]}, Facts("bad-value", column="candidates, entry 1")),
    ({"candidates": [{"title": "a\ud800"}]}, Facts("encoding", column="candidates, entry 1: title")),
    ({"candidates": [{"item_id": "1", "a\ud800": "b"}]}, Facts("encoding", column="candidates, entry 1: a key")),
    ({"candidates": ["x" * 1001]}, Facts("too-large", column="candidates, entry 1", says="1000")),
    ({"candidates": ["1"], "id": "a\nb"}, Facts("bad-value", column="id")),
    ({"candidates": ["1"], "user_id": {}}, Facts("bad-value", column="user_id")),
    ({"candidates": ["1"], "profile": 5}, Facts("bad-value", column="profile")),
    ({"candidates": ["1"], "history": "1"}, Facts("bad-value", column="history")),
    *(
        (
            {"candidates": ["1"], "history": [{"item_id": "1", name: value}]},
            Facts("bad-value", column=f"history, entry 1: {name}"),
        )
        for name, value in (
            ("rating", "much"),
            ("rating", math.nan),
            ("rating", True),
            ("timestamp", "soon"),
            ("text", 4),
        )
    ),
]


@pytest.mark.parametrize(("record", "facts"), MALFORMED)
def test_malformed_request(record: dict[str, Any], facts: Facts) -> None:
    with raises(DataError, facts):
        read(record)


def test_notes_list_changes() -> None:
    long = "very " * 100 + "long"
    request = read(
        {
            "histroy": ["1"],
            "session": 4,
            "candidates": ["1", "1", {"item_id": "2", "title": "Other"}, "2", {"title": long}],
            "profile": "word " * 100,
        }
    )
    assert request.notes == (
        "'histroy' was ignored (did you mean 'history'?)",
        "candidates: repeated items are ranked once: '1'",
        "candidates: an item is repeated with another text; only the first is ranked: '2'",
        f"cut to 300 characters, the title of: '{request.candidates[2].item_id[:59]}…'",
        "no history",
        "profile: cut to 300 characters",
    )
    assert len(request.candidates[2].title) <= 300 and len(request.profile) <= 300


def test_timestamps() -> None:
    past = [{"item_id": "1", "timestamp": "2024-05-31"}, {"item_id": "2", "timestamp": 1.0, "rating": "4"}]
    request = read({"history": past, "candidates": ["1"]})
    assert [event.timestamp for event in request.history] == [1717113600.0, 1.0]
    assert request.history[1].rating == 4.0
    assert request.notes == ("history: the timestamps are not in ascending order; the given order was used",)
    assert read({"history": past[::-1], "candidates": ["1"]}).notes == ()


def test_row_number_replaces_missing_id() -> None:
    for blank in ({}, {"id": None}, {"id": " "}, {"id": float("nan")}):
        assert read({"candidates": ["1"], **blank}).id == "7"
        assert request_identity(blank, 7) == ("7", None)
    assert request_identity({"id": 3.0, "user_id": "u"}, 7) == ("3", "u")
    assert request_identity({"id": "\x01", "user_id": "u"}, 7) == (None, "u")
    assert request_identity(None, 7) == (None, None)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["1", "2", "3"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["item_id", "title", "rating", "timestamp", "text", "x"]), inner, max_size=4)
    ),
    max_leaves=6,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("id", "user_id", "history", "candidates", "profile"), values)))
def test_any_json_object_is_a_request_or_an_error(record: dict[str, Any]) -> None:
    for items in (ITEMS, None):
        try:
            request = parse_request(record, 1, items)
        except DataError as error:
            assert "\n" not in str(error)
            continue
        ids = [item.item_id for item in request.candidates]
        assert ids and len(set(ids)) == len(ids)
        assert all(item.title for item in request.candidates)
        json.dumps([request.id, request.user_id, ids, request.notes], ensure_ascii=False).encode()


# --------------------------------------------------------------------------- tables of items


def test_table_of_items(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id,title,genres\n1,Heat,Crime\n2,,\n", encoding="utf-8")
    items = read_items(path)
    assert items["1"] == Item(item_id="1", title="Heat", fields={"genres": "Crime"})
    assert items["2"].title == ""
    assert digest_items(items) == digest_items(dict(reversed(items.items())))
    assert digest_items(items) != digest_items({**items, "2": Item(item_id="2", title="x")})
    with raises(DataError, Facts("missing-file", "gone.csv", says="--items")):
        read_items(tmp_path / "gone.csv")
    for table, facts in (
        ("movie,title\n1,a\n", Facts("missing-column", path, column="item_id")),
        ("item_id,title\n1,a\n1,b\n", Facts("duplicate", path, 2, "item_id")),
    ):
        path.write_text(table, encoding="utf-8")
        with raises(DataError, facts):
            read_items(path)


# --------------------------------------------------------------------------- files


def rows_of(path: Path) -> list[RequestRow]:
    requests = open_requests(path)
    rows = list(requests)
    assert len(rows) == requests.rows
    return rows


def test_malformed_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.data.read.text.MAX_LINE_BYTES", 200)
    lines = [
        b'\xef\xbb\xbf{"candidates": ["1"]}',
        b"",
        b"{",
        b"[1]",
        b'{"candidates": ["\xff"]}',
        b'{"x": "' + b"y" * 900 + b'"}',
        b"[" * 150,
        b'{"candidates": ["2"]}\r',
        b"  ",
        b'{"candidates": ["3"]}',
    ]
    for path in (tmp_path / "r.jsonl", tmp_path / "r.ndjson.gz"):
        data = b"\n".join(lines)
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        rows = rows_of(path)
        assert open_requests(path).blank == 2
        assert [row.line for row in rows] == [1, 3, 4, 5, 6, 7, 8, 10]
        assert [row.record is None for row in rows] == [False, True, True, True, True, True, False, False]
        reasons = ["JSON", "object", "0xff", "longer", "JSON"]
        assert all(part in row.error for part, row in zip(reasons, rows[1:6], strict=True))
        assert rows[0].record == {"candidates": ["1"]}


def test_cells_are_json_lists_or_ids_between_bars(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    table = [
        ["id", "history", "candidates"],
        ["a", "", "1|2| 3"],
        ["b", '["x|y"]', '[1, {"title": "A, \\"B\\""}]'],
        ["c", "[]", "[REC] (2007)|[500] Days"],
        ["d", "1", '["1"'],
        ["e", "1", "[1, 2"],
        ["f", "1", " "],
    ]
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(table)
    rows = rows_of(path)
    records = [row.record for row in rows]
    assert records[0] == {"id": "a", "candidates": ["1", "2", "3"]}
    assert records[1] == {"id": "b", "history": ["x|y"], "candidates": [1, {"title": 'A, "B"'}]}
    assert records[2] == {"id": "c", "history": [], "candidates": ["[REC] (2007)", "[500] Days"]}
    assert "JSON list" in rows[3].error and records[3] == {"id": "d"}
    assert records[4] == {"id": "e", "history": ["1"], "candidates": ["[1, 2"]}
    assert records[5] == {"id": "f", "history": ["1"]}


def test_stray_quote_affects_one_row(tmp_path: Path) -> None:
    path = tmp_path / "r.tsv"
    text = 'id\tcandidates\nb1\t1|2\nb2\t"1|2\nb3\t1|2\nb4\t"1\n|2"\n\nb5\t"1"x\nb6\t3\t4\nb7\t9"\nb8\t"open\nb9\t7\n'
    path.write_text(text, encoding="utf-8")
    rows = rows_of(path)
    read_rows = {row.line: row.record for row in rows if row.record is not None}
    assert {line: record["id"] for line, record in read_rows.items()} == {2: "b1", 4: "b3", 5: "b4", 10: "b7", 12: "b9"}
    assert read_rows[5]["candidates"] == ["1", "2"]
    assert [row.line for row in rows if row.error] == [3, 8, 9, 11]
    assert open_requests(path).blank == 1


@given(st.lists(st.lists(st.text(st.sampled_from('ab|"\n,\r[]{} ü'), max_size=6), min_size=2, max_size=2), max_size=8))
def test_csv_is_read_back(tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]]) -> None:
    path = tmp_path_factory.mktemp("csv") / "r.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["id", "candidates"], ["first", "1"], *cells])
    rows = list(open_requests(path))
    assert len(rows) == 1 + len(cells)
    for row, (name, _) in zip(rows[1:], cells, strict=True):
        assert row.record is not None and row.record.get("id", "") == (name if name.strip() else "")


def test_large_cell(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    pool = [{"title": f"Title {n} " + "x" * 290} for n in range(1000)]
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["candidates"], [json.dumps(pool)]])
    (row,) = rows_of(path)
    assert row.record == {"candidates": pool}


def test_parquet_with_lists_structs_or_texts(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    kinds: list[Any] = [
        [["1", "2"], ["3"]],
        [[{"item_id": "1", "title": None}], [{"item_id": "2", "title": "B"}]],
        ['["1", "2"]', "3"],
    ]
    for candidates in kinds:
        pq.write_table(pa.table({"id": [1, 2], "candidates": candidates, "other": [0.5, None]}), path, row_group_size=1)
        rows = rows_of(path)
        assert [row.line for row in rows] == [1, 2]
        assert rows[0].record is not None and rows[0].record["id"] == 1
        requests = [parse_request(row.record or {}, row.line, ITEMS | {"3": ITEMS["2"]}) for row in rows]
        assert requests[0].candidates[0] == ITEMS["1"]
    pq.write_table(pa.table({"candidates": pa.array([b"ok", b"\xff"]).cast(pa.string(), safe=False)}), path)
    rows = rows_of(path)
    assert [row.error for row in rows] == ["", "a value is not UTF-8; write the file again"]
    pq.write_table(pa.table({"candidate": [["1"]]}), path)
    with raises(DataError, Facts("missing-column", path, column="candidates", says="did you mean 'candidate'")):
        open_requests(path)


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.parquet"])
def test_files_are_read_in_batches(tmp_path: Path, name: str) -> None:
    path, count, pool = tmp_path / name, 3000, [f"item {n}" for n in range(50)]
    if name == "r.jsonl":
        path.write_text((json.dumps({"candidates": pool}) + "\n") * count, encoding="utf-8")
    elif name == "r.csv":
        path.write_text("candidates\n" + ("|".join(pool) + "\n") * count, encoding="utf-8")
    else:
        pq.write_table(pa.table({"candidates": [pool] * count}), path, row_group_size=500)
    tracemalloc.start()
    try:
        total = sum(len(list((row.record or {})["candidates"])) for row in open_requests(path))  # type: ignore[call-overload]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 50 * count
    assert peak < 3 * 2**20


def test_malformed_files(tmp_path: Path) -> None:
    for name, content, facts in (
        ("b.jsonl", b"\n \n", Facts("empty")),
        ("c.csv", b"id,candidates\n", Facts("empty")),
        ("d.csv", b"id;candidate\n1;2\n", Facts("missing-column", says="did you mean 'candidate'")),
        ("e.csv", b"candidates,candidates\n1,2\n", Facts("duplicate", None, 0, "candidates")),
        ("g.jsonl.gz", gzip.compress(b"{}\n" * 9)[:-9], Facts("damaged")),
        ("h.parquet", b"no parquet", Facts("damaged")),
        ("i.json", b"[]", Facts("wrong-format", says=".jsonl")),
        ("j.parquet.gz", b"", Facts("wrong-format", says="inside .gz")),
        ("k.csv", "id,candidates\n".encode("utf-16"), Facts("encoding", line=1)),
    ):
        (tmp_path / name).write_bytes(content)
        with raises(DataError, replace(facts, file=name)):
            open_requests(tmp_path / name)
    with raises(DataError, Facts("missing-file", "gone.jsonl", says="--in")):
        open_requests(tmp_path / "gone.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with raises(DataError, Facts("unreadable", "folder.jsonl", says="--in")):
        open_requests(tmp_path / "folder.jsonl")


# --------------------------------------------------------------------------- rankings


RANKED = [
    RankingRecord(
        request_id="=cmd()",
        user_id="-1",
        line=1,
        items=("1", "a,b"),
        scores=(-0.1, -1e-17),
        titles=("+A", 'B "quoted"'),
        notes=("no history",),
        prompt_tokens=9,
        completion_tokens=4,
    ),
    RankingRecord(request_id=None, user_id=None, line=3, error="not JSON"),
    RankingRecord(request_id="\u2028ü", user_id="u", line=4, items=("x",), scores=(0.0,), titles=("y\u2029",)),
]


def test_damaged_parts_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    assert read_part(path) is None
    write_part(path, RANKED)
    assert read_part(path) == read_part(path, [1, 3, 4]) == RANKED
    assert read_part(path, [1, 3]) is None
    for damage in (path.read_text()[:-30], "", "{}\n", "[]\n", '{"x": 1}\n'):
        path.write_text(damage, encoding="utf-8")
        assert read_part(path) is None


def test_row_groups_contain_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranked, "_ROW_GROUP", 2)
    write_records(tmp_path / "r.parquet", iter(RANKED))
    file = pq.ParquetFile(tmp_path / "r.parquet")
    assert file.num_row_groups == 2 and file.read()["line"].to_pylist() == [1, 3, 4]


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.parquet", "r.tsv.gz"])
def test_rankings_are_written_deterministically(tmp_path: Path, name: str) -> None:
    first, second = tmp_path / "1" / name, tmp_path / "2" / name
    for path in (first, second):
        write_records(path, iter(RANKED))
    assert first.read_bytes() == second.read_bytes()
    assert list(first.parent.iterdir()) == [first]
    columns = list(RankingRecord.__dataclass_fields__)
    if "parquet" in name:
        frame = pl.read_parquet(first)
        assert frame.columns == columns
        assert frame.rows() == [
            tuple(list(v) if isinstance(v, tuple) else v for v in (getattr(r, c) for c in columns)) for r in RANKED
        ]
        return
    raw = first.read_bytes()
    text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode()
    if "jsonl" in name:
        records = [json.loads(line) for line in text.rstrip("\n").split("\n")]
        assert [list(each) for each in records] == [columns] * 3
        assert records[0]["scores"] == [-0.1, -1e-17] and records[1]["error"] == "not JSON"
    else:
        table = list(csv.reader(text.split("\n"), delimiter="\t" if "tsv" in name else ","))[:-1]
        assert table[0] == columns and len(table) == 4
        assert table[1][:4] == ["'=cmd()", "'-1", "1", '["1", "a,b"]']
        assert json.loads(table[1][4]) == [-0.1, -1e-17]
        assert table[2][:2] == ["", ""] and table[2][6] == "not JSON"


def test_long_line_is_one_request(tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_bytes(b"x" * (20 * 2**20))
    assert open_requests(file).rows == 1


def test_small_table_reserves_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "small.csv"
    file.write_bytes(b"user_id,item_id\n" * 1000)
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, before[1]))
    try:
        assert read_bytes(file)[0] == file.read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
