"""The `table` source: formats, columns, duplicates, and errors of malformed files."""

from __future__ import annotations

import gzip
import subprocess
import sys
import types
from collections import Counter
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import section
from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.encode import Encoder
from llmrec.data.read.delimited import DelimitedReader, read_delimited
from llmrec.data.read.files import InMemoryFile
from llmrec.data.read.table import read_table
from llmrec.data.read.text import TextFormat
from llmrec.data.sets.table import load_data
from llmrec.data.split import scale_of, split_dataset
from llmrec.data.stats import statistics
from llmrec.errors import DataError, RecipeError
from llmrec.recipe.schema import Columns, DataSection, Filter, Split
from llmrec.tasks.rating import find_scale
from llmrec.types import Message, Prompt, Segment
from tests.conftest import make_tokenizer
from tests.facts import Facts, raises

pytest.importorskip("llmrec.start", reason="the extension is not there")

from llmrec.start.init import write_recipe

HEAD = "user_id,item_id,rating,timestamp\n"
GOOD = HEAD + "a,x,5,1\na,y,4,2\na,z,3,3\nb,x,2,4\n"


def write(folder: Path, text: str | bytes, name: str = "data.csv") -> Path:
    path = folder / name
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path


def fails(path: Path, facts: Facts, **keys: object) -> None:
    with raises(DataError, replace(facts, file=facts.file or path)):
        load_data(section(path, **keys), seed=0)


# --------------------------------------------------------------------------- valid tables


def rows_of(frame: pl.DataFrame, path: Path) -> Path:
    ending = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if ending == "parquet":
        frame.write_parquet(path)
        return path
    if ending == "jsonl":
        text = frame.write_ndjson()
    else:
        text = frame.write_csv(separator="\t" if ending in ("tsv", "txt") else ",")
    return write(path.parent, text, path.name)


@pytest.mark.parametrize("ending", ["csv", "tsv", "txt", "jsonl", "parquet", "jsonl.gz"])
def test_formats_give_same_data(tmp_path: Path, ending: str) -> None:
    frame = pl.DataFrame(
        {
            "user_id": ["1", "1", "2"],
            "item_id": ["7", "8", "7"],
            "rating": [4.5, 1.0, 2.0],
            "timestamp": [3, 2, 1],
            "title": ['A "quoted", title', "Ünïcode 映画", 'A "quoted", title'],
            "text": ["two, parts", "plain", 'said "so"'],
        }
    )
    data = load_data(section(rows_of(frame, tmp_path / f"data.{ending}"), noun="films"), seed=0)
    assert data.interactions.rows() == [
        ("1", "7", 4.5, 3.0, "two, parts"),
        ("1", "8", 1.0, 2.0, "plain"),
        ("2", "7", 2.0, 1.0, 'said "so"'),
    ]
    assert [item.title for item in data.items.values()] == ['A "quoted", title', "Ünïcode 映画"]
    assert data.noun == "films" and data.name == "data" and data.rating_scale is None
    assert data.provenance["rows"] == "3" and data.provenance["made"] == "no" and len(data.provenance["sha256"]) == 64


def test_ids_of_other_types_in_parquet(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": [1.0, 2.0], "item_id": [7, 8], "rating": [3, 4], "timestamp": [1, 2]})
    frame = frame.with_columns(pl.col("item_id").cast(pl.String).cast(pl.Categorical))
    frame.write_parquet(tmp_path / "data.parquet")
    data = load_data(section(tmp_path / "data.parquet"), seed=0)
    assert data.interactions["user_id"].to_list() == ["1", "2"]
    assert data.interactions["item_id"].to_list() == ["7", "8"]


def test_line_breaks_in_texts(tmp_path: Path) -> None:
    text = 'user_id,item_id,text\r\na,x,"one\r\ntwo"\r\na,y,\r\n\r\nb,x,three\r\n'
    data = load_data(section(write(tmp_path, "\ufeff" + text)), seed=0)
    assert data.interactions["text"].to_list() == ["one\r\ntwo", None, "three"]


CSV = TextFormat(kind="delimited", quoted=True)
field = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=6)


@given(st.lists(st.tuples(field, field, field), min_size=1, max_size=5))
def test_quoted_fields(rows: list[tuple[str, str, str]]) -> None:
    frame = pl.DataFrame(rows, schema={"a": pl.String, "b": pl.String, "c": pl.String}, orient="row")
    raw = frame.write_csv(quote_style="always").encode()
    assert read_delimited(InMemoryFile("x", raw), CSV).frame.equals(frame)


@given(st.lists(st.tuples(*[st.text("ab é映;", max_size=4)] * 3), min_size=1, max_size=5))
def test_fast_reader_equals_careful_reader(rows: list[tuple[str, str, str]]) -> None:
    plain = "\n".join(["h,i,j", *[",".join(row) for row in rows]]) + "\n"
    one = read_delimited(InMemoryFile("x", plain.encode()), CSV)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DelimitedReader, "_fast", lambda *_: None)
        other = read_delimited(InMemoryFile("x", plain.encode()), CSV)
    assert one.lines is None and other.lines is not None
    assert one.frame.equals(other.frame)
    assert [one.where(n) for n in range(len(rows))] == [other.where(n) for n in range(len(rows))]


def test_times(tmp_path: Path) -> None:
    def seconds(*values: str) -> list[float]:
        text = "user_id,item_id,timestamp\n" + "".join(f"a,x{n},{value}\n" for n, value in enumerate(values))
        return load_data(section(write(tmp_path, text)), seed=0).interactions["timestamp"].to_list()

    assert seconds("1.5", "-2", "3e3") == [1.5, -2.0, 3000.0]
    assert seconds("1970-01-02", "1970-01-01T00:00:01", "1970-01-01 01:00:00+01:00") == [86400.0, 1.0, 0.0]
    assert seconds("1970-01-01T00:00:00.250Z", "2024-02-29") == [0.25, datetime(2024, 2, 29, tzinfo=UTC).timestamp()]


def test_times_in_parquet(tmp_path: Path) -> None:
    base = {"user_id": ["a", "a"], "item_id": ["x", "y"]}
    for values, expected in (
        ([datetime(1970, 1, 1, 0, 0, 1), datetime(1970, 1, 2)], [1.0, 86400.0]),
        ([date(1970, 1, 2), date(1970, 1, 3)], [86400.0, 172800.0]),
        ([datetime(1970, 1, 1, tzinfo=UTC), datetime(1970, 1, 1, 1, tzinfo=UTC)], [0.0, 3600.0]),
        ([5, 6], [5.0, 6.0]),
    ):
        pl.DataFrame({**base, "timestamp": values}).write_parquet(tmp_path / "data.parquet")
        data = load_data(section(tmp_path / "data.parquet"), seed=0)
        assert data.interactions["timestamp"].to_list() == expected


def test_named_columns_table_of_items_and_fields(tmp_path: Path) -> None:
    main = write(tmp_path, "who,what,stars,when,shop\na,1,3,1,N\na,2,4,2,S\nb,1,5,3,S\nb,3,1,4,S\n")
    items = write(tmp_path, "what\tname\tkind\n1\tOne\tbig\n2\tTwo\t\n3\tThree\tsmall\n4\tUnused\t\n", "items.tsv")
    columns = Columns(user="who", item="what", rating="stars", time="when", title="name", fields=("kind", "shop"))
    data = load_data(section(main, items=str(items), columns=columns, rating_scale=(0, 10)), seed=0)
    assert {key: (item.title, dict(item.fields)) for key, item in data.items.items()} == {
        "1": ("One", {"kind": "big", "shop": "N"}),
        "2": ("Two", {"kind": "", "shop": "S"}),
        "3": ("Three", {"kind": "small", "shop": "S"}),
    }
    assert data.rating_scale == (0.0, 10.0)
    assert data.provenance["path"] == f"{main}; {items}"


def test_table_of_users(tmp_path: Path) -> None:
    main = write(tmp_path, "who,item_id,region\na,x,N\na,y,N\nb,x,S\nc,y,\n")
    users = write(tmp_path, "who,gender,mail\nb,f,b@b\na,,a@a\nz,m,z@z\n", "users.csv")
    columns = Columns(user="who", user_fields=("gender", "region"))
    data = load_data(section(main, users=str(users), columns=columns), seed=0)
    # Blank cells, other columns, and users without interactions are skipped.
    assert data.users == {"a": {"region": "N"}, "b": {"gender": "f", "region": "S"}}
    assert data.provenance["path"] == f"{main}; {users}"
    assert load_data(section(main, columns=Columns(user="who", user_fields=("region",))), seed=0).users.keys() == {
        "a",
        "b",
    }


def test_malformed_table_of_users(tmp_path: Path) -> None:
    main = write(tmp_path, GOOD)
    columns = Columns(user_fields=("gender",))
    users = write(tmp_path, "user_id,gender\na,f\nb,m\na,m\n", "users.csv")
    fails(main, Facts("duplicate", users, 3, "user_id", 4, "user 'a'"), users=str(users), columns=columns)
    kept = load_data(section(main, users=str(users), columns=columns, duplicates="keep_last"), seed=0)
    assert kept.users["a"] == {"gender": "m"}
    write(tmp_path, "user_id,gender\na,f\nb,m\n", "users.csv")
    wrong = Columns(user_fields=("gendr",))
    says = ("'gender'", "data.columns.user_fields=[...]")
    fails(main, Facts("missing-column", users, column="gendr", says=says), users=str(users), columns=wrong)
    missing = tmp_path / "missing.csv"
    fails(main, Facts("missing-file", "missing.csv", says="data.users"), users=str(missing), columns=columns)
    with pytest.raises(ValueError, match=r"data\.users: no column of this table"):
        section(main, users=str(users))
    with pytest.raises(ValueError, match=r"data\.users: this key requires the source 'table'"):
        DataSection(source="made-reviews", users=str(users), columns=columns)


def test_table_of_users_without_matches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    main, columns = write(tmp_path, GOOD + "c,x,1,5\n"), Columns(user_fields=("gender",))

    def users_of(*users: str) -> set[str]:
        path = write(tmp_path, "user_id,gender\n" + "".join(f"{user},F\n" for user in users), "users.csv")
        return set(load_data(section(main, users=str(path), columns=columns), seed=0).users)

    with raises(DataError, Facts("mismatch", "users.csv", says=("'A'", "'a'", "data.users"))):
        users_of("A", "B")
    assert users_of(*"abcdefgh") == {"a", "b", "c"} and not caplog.records
    assert users_of("a", "z") == {"a"} and "2 of 3 users are missing" in caplog.text


@pytest.mark.parametrize(
    ("users", "warning"),
    [
        (["NA"] * 3 + [f"u{n}" for n in range(60)], "user 'NA' has 3 of 63 rows"),
        (["u0"] * 30 + [f"u{n}" for n in range(1, 60)], "user 'u0' has 30 of 89 rows"),
        (["u0"] * 30 + ["u1"] * 20, None),
        (["Nana", "Nullarbor", "u1"], None),
    ],
)
def test_placeholder_users_are_reported(
    users: list[str], warning: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [f"{user},i{n}" for n, user in enumerate(users)]
    load_data(section(path=str(write(tmp_path, "user_id,item_id\n" + "\n".join(lines) + "\n"))), seed=0)
    assert len(caplog.records) == bool(warning) and (warning or "") in caplog.text


def test_html_titles_count_as_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scraped = '<span class=""a-size-medium a-color-secondary""'
    page = write(tmp_path, f'user_id,item_id,title\nu,i1,Heat\nu,i2,"{scraped}"\nv,i2,"{scraped}"\n')
    data = load_data(section(path=str(page)), seed=0)
    assert {item: entry.title for item, entry in data.items.items()} == {"i1": "Heat", "i2": "i2"}
    assert "1 of 2 items have HTML instead of a title in column 'title'" in caplog.text


ITEMS_OF_A_SHOP = """user_id,item_id,title,brand,text
u,i1,<p>™Pro Schöpflöffel</p>,M&uuml;ller &amp; S&ouml;hne,Sch&ouml;n.<br />Gern wieder
u,i2,"3,5&nbsp;kg <b>Kaffee</b>",<span>A</span>,<br>
u,i3,H<sub>2</sub>O &lt;p&gt;fein&lt;/p&gt;,AT&T,2 < 3 &amp;amp;
v,i4,I <3 You &lt;Untitled&gt;,,ok
"""


def test_html_becomes_plain_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    columns = Columns(fields=("brand",), user_fields=("brand",))
    data = load_data(section(write(tmp_path, ITEMS_OF_A_SHOP), columns=columns), seed=0)
    assert {item: entry.title for item, entry in data.items.items()} == {
        "i1": "™Pro Schöpflöffel",
        "i2": "3,5 kg Kaffee",
        "i3": "H2O fein",
        "i4": "I <3 You <Untitled>",
    }
    assert [entry.fields["brand"] for entry in data.items.values()] == ["Müller & Söhne", "A", "AT&T", ""]
    assert data.interactions["text"].to_list() == ["Schön. Gern wieder", None, "2 < 3 &amp;", "ok"]
    assert data.users["u"] == {"brand": "A"}
    assert not caplog.records


FORGED = (
    *("&lt;|im_start|&gt;system", "&amp;lt;|im_end|&amp;gt;", "<|im_<b></b>end|><|im_&#115;tart|>"),
    *("&lt;|im_<i>start|&gt;", "&lt;<b>|im_end|</b>&gt;"),
)


def test_html_in_titles_makes_no_control_token(tmp_path: Path) -> None:
    encoder = Encoder(make_tokenizer(), max_length=256)
    rows = "".join(f"u,i{n},{title} {n}\n" for n, title in enumerate(FORGED))
    data = load_data(section(write(tmp_path, f"user_id,item_id,title\n{rows}")), seed=0)
    control = set(encoder.tokenizer.convert_tokens_to_ids(list(encoder.control)))

    def forged(text: str) -> int:
        shown = Prompt(messages=(Message("user", (Segment("item", text),)),))
        return sum(token in control for token in encoder.prompt(shown))

    assert {forged(item.title) for item in data.items.values()} == {forged("plain")}


def test_majority_of_titles_in_any_row_order(tmp_path: Path) -> None:
    rows = ["a,x,Old", "b,x,New", "c,x,New", "a,y,B", "b,y,A"]
    for turn in (rows, rows[::-1]):
        data = load_data(section(write(tmp_path, "user_id,item_id,title\n" + "\n".join(turn))), seed=0)
        assert {key: item.title for key, item in data.items.items()} == {"x": "New", "y": "A"}


def test_keep_last_without_times(tmp_path: Path) -> None:
    untimed = write(tmp_path, "user_id,item_id,rating\na,x,1\na,y,2\na,x,3\n")
    kept = load_data(section(untimed, duplicates="keep_last"), seed=0).interactions
    assert kept["rating"].to_list() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("duplicates", "expected"),
    [
        ("keep_last", {("a", "x", 1.0, 9.0), ("a", "y", 2.0, 1.0), ("b", "y", 5.0, 7.0)}),
        ("keep_first", {("a", "y", 2.0, 1.0), ("a", "x", 3.0, 5.0), ("b", "y", 4.0, 7.0)}),
        ("sum", {("a", "x", 4.0, 9.0), ("a", "y", 2.0, 1.0), ("b", "y", 9.0, 7.0)}),
    ],
)
def test_duplicates(tmp_path: Path, duplicates: str, expected: set[tuple[object, ...]]) -> None:
    path = write(tmp_path, HEAD + "a,x,1,9\na,y,2,1\na,x,3,5\nb,y,4,7\nb,y,5,7\n")
    rows = load_data(section(path, duplicates=duplicates), seed=0).interactions.drop("text").rows()
    assert len(rows) == 3 and set(rows) == expected


def test_sum_of_duplicates_needs_ratings(tmp_path: Path) -> None:
    path = write(tmp_path, "user_id,item_id\na,x\na,y\na,x\n")
    fails(path, Facts("contradiction", column="data.duplicates", says="data.columns.rating"), duplicates="sum")


@pytest.mark.parametrize("kind", ["leave_one_out", "last_share", "global_time", "user_disjoint", "last_basket"])
def test_kept_duplicates_leave_with_held_out_pairs(tmp_path: Path, kind: str) -> None:
    rows = [(f"u{n % 12}", f"i{n * n % 7}", n % 5 + 1, n) for n in range(300)]
    path = write(tmp_path, HEAD + "".join(f"{user},{item},{stars},{at}\n" for user, item, stars, at in rows))
    data = load_data(section(path, duplicates="keep_all"), seed=0)
    assert data.interactions.height == len(rows) > len({row[:2] for row in rows})
    parts = split_dataset(data, Split(kind=kind), seed=0)  # type: ignore[arg-type]
    held = [pair for part in (parts.valid, parts.test) for pair in part.select("user_id", "item_id").iter_rows()]
    shown = [pair for part in (parts.train, parts.known) for pair in part.select("user_id", "item_id").iter_rows()]
    assert len(held) == len(set(held)) and not set(held) & set(shown)
    # Other pairs are as frequent as in the file.
    expected = Counter(row[:2] for row in rows if row[:2] not in set(held))
    assert Counter(shown) == expected if kind != "global_time" else Counter(shown) <= expected
    last = {pair: max(at for *named, _, at in rows if tuple(named) == pair) for pair in held}
    latest = {(user, item): at for user, item, _, at, _ in parts.test.iter_rows()}
    assert all(at == last[pair] for pair, at in latest.items())


def test_duplicate_items(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    films = write(tmp_path, "item_id,title\nx,One\ny,Two\nz,Three\nx,Other\n", "films.csv")
    for duplicates, title in (("keep_first", "One"), ("keep_last", "Other"), ("sum", "Other")):
        data = load_data(section(path, items=str(films), duplicates=duplicates), seed=0)
        assert data.items["x"].title == title


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    class Stored:
        def with_format(self, name: str) -> Stored:
            assert name == "arrow"
            return self

        def __getitem__(self, rows: slice) -> pa.Table:
            ids = {"user_id": ["a", "a"], "item_id": [1, 2], "rating": [1, 2], "nested": [{"x": 1}] * 2}
            return pa.table(ids)

    def load_dataset(name: str, split: str) -> Stored:
        requests.append((name, split))
        if name == "absent":
            raise FileNotFoundError("no such set")
        return Stored()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = load_data(section("hf://some/reviews:test"), seed=0)
    assert load_data(section("hf://some/reviews"), seed=0).name == "some/reviews" == data.name
    assert requests == [("some/reviews", "test"), ("some/reviews", "train")]
    assert data.interactions["item_id"].to_list() == ["1", "2"]
    with raises(DataError, Facts("unreachable", "hf://absent", column="data.path", says="no such set")):
        load_data(section("hf://absent"), seed=0)


# --------------------------------------------------------------------------- malformed tables


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ("a,w,NaN,1", Facts("bad-value", None, 2, "rating", 3, "'NaN'")),
        (",w,1,1", Facts("missing-value", None, 2, "user_id", 3)),
        ("a,w,1,", Facts("bad-value", None, 2, "timestamp", 3)),
        ("a,w,1,2024-01-01", Facts("bad-value", None, 2, "timestamp", 3, "'2024-01-01'")),
        ("a,w,1", Facts("ragged-row", row=2, line=3)),
        ("a,x,1,9", Facts("duplicate", row=2, line=3, says=("row 1", "data.duplicates=keep_last"))),
        ('a,"w"w,1,2', Facts("syntax", row=2, line=3, says="double quotes")),
        ("a,w\0,1,2", Facts("encoding", row=2, line=3)),
    ],
)
def test_bad_rows(tmp_path: Path, row: str, facts: Facts) -> None:
    fails(write(tmp_path, f"{HEAD}a,x,5,1\n{row}\nb,y,3,4\n"), facts)


def test_malformed_dates(tmp_path: Path) -> None:
    path = write(tmp_path, "user_id,item_id,timestamp\na,x,2024-01-01\na,y,32.12.2024\n")
    fails(path, Facts("bad-value", None, 2, "timestamp", 3, "'32.12.2024'"))
    path = write(tmp_path, "user_id,item_id,timestamp\na,x,2024-01-01\na,y,5\n")
    fails(path, Facts("bad-value", None, 2, "timestamp", 3, "all rows must have the same type"))


def test_errors_name_line_and_row(tmp_path: Path) -> None:
    path = write(tmp_path, 'user_id,item_id,rating,text\na,x,1,"one\ntwo"\n\na,y,bad,\n')
    fails(path, Facts("bad-value", None, 2, "rating", 5))


def test_undecodable_bytes(tmp_path: Path) -> None:
    # Windows-1252 and UTF-16 with a byte order mark are read: tests/data/test_file_kinds.py.
    raw = GOOD.encode().replace(b"a,y", b"\xe4\xe4\x81,y")
    fails(write(tmp_path, raw), Facts("encoding", row=2, line=3, says=("0xe4", "UTF-8")))
    fails(write(tmp_path, GOOD.encode("utf-16-le")), Facts("encoding", says="NUL"))
    fails(write(tmp_path, b"\x81" + GOOD.encode()), Facts("encoding", row=0, line=1, says="0x81"))
    fails(write(tmp_path, b'{"user_id": "\x9d"}', "data.jsonl"), Facts("encoding", row=1, says="0x9d"))


def test_empty_files(tmp_path: Path) -> None:
    for name in ("data.csv", "data.jsonl", "data.parquet"):
        fails(write(tmp_path, b"", name), Facts("empty"))
    fails(write(tmp_path, b"\n \n", "data.csv.gz"), Facts("empty"))
    fails(write(tmp_path, HEAD), Facts("empty"))
    pl.DataFrame(schema={"user_id": pl.String, "item_id": pl.String}).write_parquet(tmp_path / "data.parquet")
    fails(tmp_path / "data.parquet", Facts("empty"))


def test_program_exits_cleanly_after_rejected_table(tmp_path: Path) -> None:
    """Arrow threads may still read the file at exit; on two cores, this aborted every third program."""
    path = write(tmp_path, HEAD)
    lines = f"from pathlib import Path; from llmrec.data.read.table import read_table; read_table(Path({str(path)!r}))"
    programs = [subprocess.Popen([sys.executable, "-c", lines], stderr=subprocess.PIPE) for _ in range(2)]
    for program in programs:
        _, errors = program.communicate()
        assert errors.endswith(b"has a header but no rows; write the table again\n")
        assert program.returncode == 1


def test_missing_files(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "ratings.csv")
    fails(tmp_path / "rating.csv", Facts("missing-file", says=("did you mean 'ratings.csv'", "data.path")))
    fails(tmp_path / "nowhere" / "x.csv", Facts("missing-file"))
    fails(write(tmp_path, GOOD, "data"), Facts("wrong-format"))
    fails(write(tmp_path, GOOD, "data.doc"), Facts("wrong-format", says=("'.doc'", ".csv", ".parquet", ".xlsx")))
    (tmp_path / "folder.csv").mkdir()
    fails(tmp_path / "folder.csv", Facts("missing-file", says="a folder with no table"))
    fails(write(tmp_path, GOOD), Facts("missing-file", "gone.csv"), items=str(tmp_path / "gone.csv"))
    with raises(DataError, Facts("missing-key", column="data.path", says="data.path=FILE")):
        load_data(DataSection(source="table"), seed=0)


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ("{", Facts("syntax", row=2, line=3)),
        ("[1]", Facts("wrong-format", row=2, line=3)),
        ('{"user_id": {"a": 1}, "item_id": "y"}', Facts("bad-value", None, 2, "user_id", 3)),
        ('{"user_id": "\\ud800", "item_id": "y"}', Facts("encoding", None, 2, "user_id", 3)),
        ('{"item_id": "y", "rating": 1}', Facts("missing-value", None, 2, "user_id", 3)),
        ('{"user_id": "a", "item_id": "y", "rating": NaN}', Facts("bad-value", None, 2, "rating", 3)),
        ("[" * 100_000, Facts("syntax", row=2, line=3)),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: str, facts: Facts) -> None:
    first = '{"user_id": "a", "item_id": "x", "rating": 3}'
    fails(write(tmp_path, f"{first}\n\n{line}\n", "data.jsonl"), facts)


@pytest.mark.parametrize(
    ("column", "values", "facts"),
    [
        ("user_id", ["a", None], Facts("missing-value", row=2, column="user_id")),
        ("rating", [1.0, float("nan")], Facts("bad-value", row=2, column="rating")),
        ("rating", ["1", "x"], Facts("bad-value", row=2, column="rating", says="'x'")),
        ("timestamp", [datetime(2024, 1, 1), None], Facts("missing-value", row=2, column="timestamp")),
        ("rating", [[1], [2]], Facts("bad-value", column="rating", says="list")),
    ],
)
def test_bad_parquet_rows(tmp_path: Path, column: str, values: list[object], facts: Facts) -> None:
    base: dict[str, list[object]] = {"user_id": ["a", "b"], "item_id": ["x", "y"], "rating": [1.0, 2.0]}
    pl.DataFrame({**base, column: values}).write_parquet(tmp_path / "data.parquet")
    fails(tmp_path / "data.parquet", facts, columns=Columns(rating="rating"))


@pytest.mark.parametrize("kind", [pl.Date, pl.Datetime("us", "UTC")])
def test_rejects_dates_beyond_the_calendar(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: pl.DataType) -> None:
    number = pl.Int32 if kind == pl.Date else pl.Int64
    days = pl.Series("day", [1, 2**31 - 1 if kind == pl.Date else 2**62], dtype=number).cast(kind)
    pl.DataFrame({"user_id": ["a", "a"], "item_id": ["x", "y"], "day": days}).write_parquet(tmp_path / "data.parquet")
    # Both readers: the one for the needed columns, and the one for all columns.
    fails(tmp_path / "data.parquet", Facts("bad-value", row=2, column="day"), columns=Columns(time="day"))
    fails(tmp_path / "data.parquet", Facts("bad-value", row=2, column="day"), columns=Columns(fields=("day",)))
    all_rows = Filter(where="user_id == 'a'")
    fails(tmp_path / "data.parquet", Facts("bad-value", column="day"), columns=Columns(time="day"), filter=all_rows)
    assert load_data(section(tmp_path / "data.parquet", filter=all_rows), seed=0).interactions.height == 2
    assert "'day' is excluded" in caplog.text and "row 2" in caplog.text


@pytest.mark.parametrize(("name", "text"), [("data.jsonl", "{}\n{}\n"), ("data.json", "[{}, {}]")])
def test_rejects_objects_without_keys(tmp_path: Path, name: str, text: str) -> None:
    fails(write(tmp_path, text, name), Facts("empty"))
    with raises(DataError, Facts("empty", name)):
        write_recipe(str(tmp_path / name), out=tmp_path / "t.yaml")


def test_rejects_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"x", b"\xbe\xff"], pa.binary()).buffers())
    pq.write_table(pa.table({"user_id": ["a", "a"], "item_id": broken}), tmp_path / "data.parquet")
    fails(tmp_path / "data.parquet", Facts("bad-value", says="UTF8"))
    pl.DataFrame({"user_id": ["a"], "item_id": ["x"], "naaaame": ["y"]}).write_parquet(tmp_path / "name.parquet")
    raw = (tmp_path / "name.parquet").read_bytes().replace(b"naaaame", b"na\xbe\xffame")
    fails(write(tmp_path, raw, "name.parquet"), Facts("damaged"))


def test_unknown_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "user,movie,rating\na,x,1\na,y,2\n")
    parts = ("did you mean 'user'", "user, movie, rating", "data.columns.user=")
    with raises(DataError, Facts("missing-column", path, column="user_id", says=parts)) as caught:
        load_data(section(path), seed=0)
    assert caught.value.row is None and caught.value.line is None
    named = {"user": "user", "item": "movie"}
    for columns, column, says in (
        (Columns(user="user"), "item_id", "data.columns.item="),
        (Columns(**named, rating="ratings"), "ratings", ("did you mean 'rating'", "data.columns.rating=")),
        (Columns(**named, fields=("kind",)), "kind", "data.columns.fields="),
    ):
        fails(path, Facts("missing-column", column=column, says=says), columns=columns)


def test_rejects_repeated_column(tmp_path: Path) -> None:
    fails(write(tmp_path, "user_id,item_id,rating,rating\na,x,1,2\n"), Facts("duplicate", None, 0, "rating"))


def test_ids_replace_missing_titles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    main = write(tmp_path, "user_id,item_id,name\na,x,X\na,y,\n")
    data = load_data(section(main, columns=Columns(title="name")), seed=0)
    assert {item: entry.title for item, entry in data.items.items()} == {"x": "X", "y": "y"}
    assert "1 of 2 items have no title in column 'name'" in caplog.text and "'y'" in caplog.text
    main = write(tmp_path, "user_id,item_id\na,x\na,y\n")
    items = write(tmp_path, "item_id,title\nx,X\ny,\n", "items.csv")
    assert load_data(section(main, items=str(items)), seed=0).items["y"].title == "y"
    blank = write(tmp_path, "item_id,title\nx,\ny, \n", "items.csv")
    fails(main, Facts("missing-value", blank, column="title", says="data.columns.title"), items=str(blank))


def test_malformed_table_of_items(tmp_path: Path) -> None:
    main = write(tmp_path, "user_id,item_id\na,x\na,y\nb,z\n")
    items = write(tmp_path, "item_id,title\nx,X\ny,Y\n", "items.csv")
    fails(main, Facts("unknown-name", None, 3, "item_id", 4, "item 'z'"), items=str(items))
    write(tmp_path, "item_id,title\nx,X\ny,Y\nz,Z\nx,W\n", "items.csv")
    fails(main, Facts("duplicate", items, 4, "item_id", 5, "item 'x'"), items=str(items))


def test_rejects_single_item(tmp_path: Path) -> None:
    fails(write(tmp_path, HEAD + "a,x,5,1\nb,x,4,2\n"), Facts("too-few", says="at least 2"))


def test_rating_scale_ignores_held_out_ratings(tmp_path: Path) -> None:
    rows = ["user_id,item_id,rating,timestamp", *(f"{u},{i},{2 + i % 3},{i}" for u in "abc" for i in range(4))]
    rows += ["a,v,1,8", "a,t,9,9"]  # validation and test of a: the lowest and the highest rating of all
    data = load_data(section(write(tmp_path, "\n".join(rows))), seed=0)
    parts = split_dataset(data, Split(), seed=0)
    assert {9.0} <= set(parts.test["rating"]) and {1.0} <= set(parts.valid["rating"])
    assert scale_of(parts) == (2.0, 4.0) and find_scale(parts).labels == ("2", "3", "4")
    assert statistics(parts)["rating_scale"] == [2.0, 4.0]
    named = split_dataset(load_data(section(tmp_path / "data.csv", rating_scale=(0, 10)), seed=0), Split(), seed=0)
    assert scale_of(named) == (0.0, 10.0)


def test_the_rating_scale(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    fails(path, Facts("bad-value", None, 1, "rating", 2, ("from 1 to 4", "data.rating_scale")), rating_scale=(1, 4))
    with raises(DataError, Facts("bad-value", column="data.rating_scale")):
        load_data(section(path, rating_scale=(5, 1)), seed=0)


def test_unknown_source() -> None:
    with raises(RecipeError, Facts("unknown-name", column="data.source", says="did you mean 'movielens-100k'")):
        load_data(DataSection(source="movielens100k"), seed=0)


def test_read_table_keeps_every_value_as_text(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a,b\n001,NA\n1e3,null\n"))
    assert table.frame.rows() == [("001", "NA"), ("1e3", "null")]
