"""Kinds of files: compressed, in other encodings and separators, JSON arrays, folders and patterns."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from data_cases import section, zipped

from llmrec.data.read import files
from llmrec.data.read.delimited import count_preamble_lines
from llmrec.data.read.table import find_atomic_file, read_table
from llmrec.data.sets.table import load_data
from llmrec.errors import DataError
from llmrec.pipeline.study import load_split
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Columns
from tests.facts import Facts, raises

pytest.importorskip("llmrec.start", reason="the extension is not there")

from llmrec.start import init as start
from llmrec.start import profile
from llmrec.start.columns import RequestedRoles

ROWS = pl.DataFrame(
    [
        {"user_id": f"u{user}", "item_id": f"i{(user * 3 + step) % 7}", "rating": str(1 + (user + step) % 5)}
        for user in range(8)
        for step in range(4)
    ]
)
TEXT = ROWS.write_csv().encode()
ATOMIC = b"user_id:token\titem_id:token\trating:float\n" + TEXT.split(b"\n", 1)[1].replace(b",", b"\t")


def parquet() -> bytes:
    stream = io.BytesIO()
    ROWS.write_parquet(stream)
    return stream.getvalue()


KINDS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "bzip2": ("rows.csv.bz2", lambda: bz2.compress(TEXT)),
    "xz": ("rows.csv.xz", lambda: lzma.compress(TEXT)),
    "zstd": ("rows.csv.zst", lambda: pa.compress(TEXT, codec="zstd", asbytes=True)),
    "a zip archive": ("rows.zip", lambda: zipped(("a/rows.csv", TEXT), ("__MACOSX/rows.csv", b"x"), ("README", b"x"))),
    "a zipped Parquet file": ("rows.zip", lambda: zipped(("rows.parquet", parquet()))),
    "a packed Parquet file": ("rows.parquet.gz", lambda: gzip.compress(parquet())),
    "an array of objects": ("rows.json", lambda: json.dumps(ROWS.to_dicts(), indent=1).encode()),
    "an array in UTF-16": ("rows.json", lambda: json.dumps(ROWS.to_dicts()).encode("utf-16")),
    "bars": ("rows.csv", lambda: TEXT.replace(b",", b"|")),
    "bars by their ending": ("rows.psv", lambda: TEXT.replace(b",", b"|")),
    "double colons": ("rows.csv", lambda: TEXT.replace(b",", b"::")),
    "UTF-16": ("rows.csv", lambda: TEXT.decode().encode("utf-16")),
    "RecBole's": ("rows.inter", lambda: ATOMIC),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_files_give_same_table(kind: str, tmp_path: Path) -> None:
    name, make = KINDS[kind]
    (tmp_path / name).write_bytes(make())
    table = read_table(tmp_path / name)
    assert table.frame.select(pl.all().cast(pl.String)).equals(ROWS)
    assert len(table.sha256) == 64
    # `init` reads the same rows.
    result = start.write_recipe(str(tmp_path / name), out=tmp_path / "recipe.yaml", name="mine")
    assert "user_id" in result.found and f"{ROWS.height} rows" in result.found


def test_large_files_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Stream(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            sizes.append(size)
            return super().read(size)

    monkeypatch.setitem(files.DECOMPRESSORS, ".gz", lambda stored: Stream(TEXT))
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(b"x" * 10**6)
    assert files.read_bytes(path)[0] == TEXT
    assert all(0 < (size or 0) <= 4 * 2**20 for size in sizes)


def test_part_of_a_recbole_file_has_plain_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.inter"
    path.write_bytes(ATOMIC)
    result = profile.read_sample(path, limit=100, part=4000)
    assert not result.whole and result.table.frame.columns == ["user_id", "item_id", "rating"]


def test_rejects_value_nested_in_one_row(tmp_path: Path) -> None:
    rows = ROWS.to_dicts()
    rows[5]["rating"] = {"stars": 3}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with raises(DataError, Facts("bad-value", row=6, line=6, column="rating", says="flatten")):
        read_table(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("preface", "quoted"),
    [
        ("Orders of the shop\nfrom May to June\n\n", False),
        ("# user, item, rating\n# Export\n", True),
        ("Export\n", False),
    ],
)
def test_lines_above_the_header_are_skipped(
    preface: str, quoted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(preface + TEXT.decode().replace("u3,", '"u3",' if quoted else "u3,"), encoding="utf-8")
    table = read_table(path)
    assert table.frame.equals(ROWS)
    lines = preface.count("\n")
    assert (table.where(4).row, table.where(4).line) == (5, 6 + lines)
    assert f"{lines} lines above the header" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "user_id,item_id\nu,i\nu,j\nv,i\nv,j\n",
        "user_id\nu,i\nu,j\nv,i\nv,j\n",  # possibly a header that lacks one name
        "a\nb,c\nd,e\nf\n",
    ],
)
def test_possible_headers_are_not_skipped(text: str) -> None:
    lines = count_preamble_lines(text, ",")
    assert lines == (1 if text.startswith("user_id\n") else 0)


def test_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "events"
    folder.mkdir()
    ROWS[:10].write_parquet(folder / "part-0.parquet")
    ROWS[10:20].write_parquet(folder / "part-1.parquet")
    (folder / "part-2.csv.gz").write_bytes(gzip.compress(ROWS[20:].write_csv().encode()))
    for other in ("_SUCCESS", ".part-3.parquet.crc", "readme.md"):
        (folder / other).write_text("x", encoding="utf-8")
    for path in (folder, folder / "part-*", tmp_path / "*" / "part-?.*"):
        table = read_table(path)
        assert table.frame.equals(ROWS) and table.name == str(path)
        assert str(table.where(12)) == str(read_table(folder / "part-1.parquet").where(2))
    monkeypatch.chdir(tmp_path)
    assert load_data(section(Path("events/part-*")), seed=0).interactions.height == ROWS.height
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path))
    monkeypatch.chdir(folder)
    assert load_data(section(Path("events/part-*")), seed=0).interactions.height == ROWS.height
    with raises(DataError, Facts("missing-file", says="matches no table")):
        read_table(tmp_path / "events" / "*.tsv")
    (tmp_path / "none").mkdir()
    with raises(DataError, Facts("missing-file", says="folder with no table")):
        read_table(tmp_path / "none")
    pl.DataFrame({"user_id": ["u"], "other": ["x"]}).write_parquet(folder / "part-4.parquet")
    with raises(DataError, Facts("missing-column", "part-4.parquet", column="item_id")):
        read_table(folder)


FILMS = ("Amélie", "Café – Bar", "L'été 42", "Señorita", "“Naïve”", "Æon")
WESTERN = "user_id,item_id,title\n" + "".join(f"u{n},i{n % 3},{title}\n" for n, title in enumerate(FILMS))


def test_windows_1252_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "films.csv"
    path.write_bytes(WESTERN.encode("cp1252"))
    with caplog.at_level(logging.WARNING):
        table = read_table(path)
    assert table.frame["title"].to_list() == [line.split(",", 2)[2] for line in WESTERN.splitlines()[1:]]
    (message,) = caplog.messages
    assert "Windows-1252" in message and f"{sum(mark > chr(127) for mark in WESTERN)} characters" in message
    caplog.clear()
    path.write_bytes(WESTERN.encode())
    assert read_table(path).frame.equals(table.frame) and not caplog.messages


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Брат,Сталкер,Зеркало,Солярис", "cp1251"),
        ("기생충,올드보이,마더", "euc_kr"),
    ],
)
def test_other_encodings_are_not_guessed(text: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "films.csv"
    rows = (f"u,{n},{title}\n" for n, title in enumerate(text.split(",")))
    path.write_bytes("".join(["user_id,item_id,title\n", *rows]).encode(encoding))
    with raises(DataError, Facts("encoding", path, row=1, line=2, says="UTF-8")):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "raw", "facts"),
    [
        ("a.csv.bz2", b"BZh9 not really", Facts("damaged", says="bzip2")),
        ("a.csv.xz", lzma.compress(TEXT)[:-9], Facts("damaged", says="xz")),
        ("a.csv.zst", b"(\xb5/\xfd broken", Facts("damaged", says="zstd")),
        ("a.csv.bz2", bz2.compress(bytes(40 * 2**20)), Facts("too-large", says="decompresses to more than")),
        ("a.zip", zipped(("a.csv", TEXT), ("b.csv", TEXT)), Facts("ambiguous", says=("a.csv", "b.csv", "extract"))),
        ("a.zip", zipped(("../a.csv", TEXT)), Facts("unsafe", says="a path outside the archive")),
        ("a.zip", zipped(("..\\a.csv", TEXT)), Facts("unsafe", says="a path outside the archive")),
        (
            "a.zip",
            zipped(("a.csv", b"a,b\n" + b"1,2\n" * 5 * 10**6)),
            Facts("too-large", says="decompresses to more than"),
        ),
        ("a.json", b'[{"user_id": "u"}, 3]', Facts("wrong-format", row=2, says="array of objects")),
        ("a.json", b'[{"user_id": "u", "user_id": "v"}]', Facts("duplicate", says="user_id")),
        ("a.json", b"[1, 2", Facts("syntax", says="not JSON")),
        ("a.csv", b"user_id::item_id\nu::i\nu::i::j\n", Facts("ragged-row", row=2, line=3, says="'::'")),
    ],
)
def test_rejects_damaged_files(name: str, raw: bytes, facts: Facts, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with raises(DataError, facts):
        read_table(path)


def test_recbole_files_of_a_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    films = sorted(set(ROWS["item_id"].to_list()))
    entries = "".join(f"{film}\tThe {film}\t{('Drama', 'Comedy')[n % 2]}\n" for n, film in enumerate(films))
    (folder / "shop.inter").write_bytes(ATOMIC)
    (folder / "shop.item").write_text(f"item_id:token\tmovie_title:token_seq\tclass:token_seq\n{entries}")
    (folder / "shop.user").write_text("user_id:token\tage:token\nu1\t24\n")
    (folder / "shop.link").write_text("item_id:token\tentity_id:token\n1\tm.08gjyx\n")
    assert read_table(folder).frame.select(pl.all().cast(pl.String)).equals(ROWS)
    for path in (folder, folder / "shop.inter"):
        result = start.write_recipe(str(path), out=tmp_path / "mine.yaml", force=True)
        data = load_recipe(result.recipe).data
        assert data.items == str(folder / "shop.item") and data.columns.title == "movie_title"
        assert data.columns.fields == ("class",) and "shop.user contains user data" in result.found
    # A sorted copy is ignored.
    (folder / "shop.sorted.inter").write_bytes(ATOMIC)
    assert find_atomic_file(folder, ".inter") == folder / "shop.inter"
    (folder / "shop.sorted.inter").unlink()
    # The parts of a split share the files of items and users.
    assert find_atomic_file(folder / "shop.inter", ".user") == folder / "shop.user"
    (folder / "shop.inter").rename(folder / "shop.train.inter")
    assert find_atomic_file(folder / "shop.train.inter", ".item") == folder / "shop.item"
    (folder / "shop.test.inter").write_bytes(ATOMIC)
    assert find_atomic_file(folder, ".inter") is None


def test_default_column_can_be_ignored(tmp_path: Path) -> None:
    """`--time none` with a column ``timestamp`` selects the order of the rows, also in the recipe."""
    rows = [(f"u{user}", f"i{(user + step) % 12}", 3, 9 - step, "so") for user in range(8) for step in range(5)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp", "text"], orient="row")
    frame.write_csv(tmp_path / "rows.csv")
    roles = RequestedRoles(rating="none", time="none", text="none")
    recipe = load_recipe(
        start.write_recipe(str(tmp_path / "rows.csv"), out=tmp_path / "mine.yaml", requested=roles).recipe
    )
    assert recipe.data.columns == Columns(user="user_id", item="item_id", rating="none", time="none", text="none")
    data = load_split(recipe.data, recipe.seed)
    assert not data.dataset.has_time
    assert set(data.test.select("user_id", "item_id").iter_rows()) == {(f"u{n}", f"i{(n + 4) % 12}") for n in range(8)}
    assert all(data.dataset.interactions[name].null_count() == 40 for name in ("rating", "text"))
    # By default, these columns are read.
    data = load_split(recipe.data.model_copy(update={"columns": Columns()}), recipe.seed)
    assert data.dataset.has_time
    assert set(data.test.select("user_id", "item_id").iter_rows()) == {(f"u{n}", f"i{n}") for n in range(8)}
