"""Codes from a file: all formats, and errors that name the file, the item and the fix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from catalogues import trained

from llmrec.data.split import SplitDataset
from llmrec.durable import sha256_of
from llmrec.errors import DataError, ErrorKind
from llmrec.index.table import ItemIndex, build_item_index
from llmrec.recipe.schema import IndexSection
from llmrec.types import Code, Item
from tests.facts import Facts, raises


def catalogue(names: Sequence[str]) -> SplitDataset:
    return trained([("u", name) for name in names], {name: Item(item_id=name, title=name) for name in names})


def read(path: Path, names: Sequence[str] = "xyz") -> ItemIndex:
    index = build_item_index(IndexSection(scheme="external", path=str(path)), catalogue(names), seed=0)
    assert index.codes.keys() == {*names}
    assert all(index.decode(index.encode(item)) == item for item in index.codes)
    assert index.settings["sha256"] == sha256_of(path) and str(path) not in json.dumps(dict(index.settings))
    return index


def as_json(folder: Path, codes: object) -> Path:
    path = folder / "codes.json"
    path.write_text(codes if isinstance(codes, str) else json.dumps(codes), encoding="utf-8")
    return path


def as_table(folder: Path, codes: Sequence[str], names: Sequence[str] = "xyz", ending: str = "tsv") -> Path:
    path = folder / f"codes.{ending}"
    mark = {"tsv": "\t", "csv": ","}[ending]
    lines = [f"item_id{mark}code", *(f"{name}{mark}{code}" for name, code in zip(names, codes, strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


TOKENS = {"x": ("<a_3>", "<b_17>"), "y": ("<a_3>", "<b_2>"), "z": ("<a_10>", "<b_2>")}


@pytest.mark.parametrize(
    "codes",
    [
        {"x": [3, 17], "y": [3, 2], "z": [10, 2]},
        {"x": ["<a_3>", "<b_17>"], "y": "<a_3> <b_2>", "z": ["<a_10><b_2>"]},
        {"x": "3 17", "y": "3-2", "z": "10 - 2"},
    ],
)
def test_json_codes_become_tokens(tmp_path: Path, codes: Any) -> None:
    index = read(as_json(tmp_path, codes))
    assert index.codes == TOKENS and isinstance(index.encode("x"), Code)
    assert index.tokens == ("<a_3>", "<a_10>", "<b_2>", "<b_17>")


@pytest.mark.parametrize(
    ("codes", "ending"), [(("3 17", "3-2", "10 2"), "csv"), (("<a_3><b_17>", "<a_3><b_2>", "<a_10><b_2>"), "tsv")]
)
def test_table_codes_become_tokens(tmp_path: Path, codes: Sequence[str], ending: str) -> None:
    assert read(as_table(tmp_path, codes, ending=ending)).codes == TOKENS


def test_json_lines_and_parquet_may_hold_lists_of_tokens(tmp_path: Path) -> None:
    rows = [{"item_id": name, "code": list(pieces)} for name, pieces in TOKENS.items()]
    lines = tmp_path / "codes.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read(lines).codes == TOKENS
    table = tmp_path / "codes.parquet"
    pl.DataFrame(rows).write_parquet(table)
    assert read(table).codes == TOKENS
    pl.DataFrame({"item_id": [1, 2], "code": [7, 9]}).write_parquet(table)
    assert read(table, ("1", "2")).codes == {"1": ("<a_7>",), "2": ("<a_9>",)}


def test_item_tokens_are_kept_and_listed_last(tmp_path: Path) -> None:
    codes = {"x": "<a_1><item_2>", "y": "<a_1><item_10>", "z": "<b_0><a_2><item_2>"}
    assert read(as_json(tmp_path, codes)).tokens == ("<a_1>", "<a_2>", "<b_0>", "<item_2>", "<item_10>")


def test_other_codes_are_text(tmp_path: Path) -> None:
    codes = ("Toy  Story 3-17", "toy story", "3:17")
    index = read(as_table(tmp_path, codes))
    assert index.tokens == () and not isinstance(index.encode("x"), Code)
    assert index.encode("y") == codes[1]
    assert read(as_json(tmp_path, dict(zip("xyz", codes, strict=True)))).codes == index.codes


def test_json_lists_of_strings_are_text(tmp_path: Path) -> None:
    assert read(as_json(tmp_path, {"x": ["3 17"], "y": ["3", "2"], "z": ["Heat"]})).codes == {
        "x": ("3 17",),
        "y": ("32",),
        "z": ("Heat",),
    }


def test_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    one, two = (read(as_json(tmp_path, dict(order))) for order in (TOKENS.items(), reversed(TOKENS.items())))
    assert list(one.codes) == list(two.codes) and one.tokens == two.tokens


@pytest.mark.parametrize(
    ("codes", "kind", "column", "says"),
    [
        ({"x": [1], "y": [2]}, "missing-value", "code", "1 of 3 items have no code, such as z"),
        ({"x": [1], "y": [2], "z": [1]}, "duplicate", "code", ("item 'z'", "'<a_1>'", "item 'x'")),
        ({"x": [1], "y": [2], "z": [1, 3]}, "duplicate", "code", ("item 'z'", "<a_1><b_3>", "<a_1> of item 'x'")),
        ({"x": [1], "y": [2], "z": "<a_3>"}, "contradiction", "code", ("item 'z'", "tokens", "item 'x' of numbers")),
        ({"x": "3 17", "y": "3 1", "z": "3 x"}, "contradiction", "code", ("item 'z'", "text", "of numbers")),
        ({"x": [1], "y": [], "z": [2]}, "missing-value", "code", "item 'y'"),
        ({"x": [1], "y": 2, "z": [3]}, "bad-value", "code", ("item 'y': 2", "write a list of numbers")),
        ({"x": [1], "y": [True], "z": [3]}, "bad-value", "code", "item 'y': [True]"),
        ({"x": [1], "y": [-1], "z": [3]}, "bad-value", "code", ("item 'y': '-1'", "use 0 to 999999999")),
        ({"x": [1], "y": [1] * 27, "z": [3]}, "too-large", "code", ("item 'y'", "27 levels, more than 26")),
        ({"x": "<a_1>", "y": "<c1_2>", "z": "<a_2>"}, "bad-value", "code", ("'<c1_2>'", "write it as <a_12>")),
        ({"x": "Heat <a_1>", "y": "b", "z": "c"}, "bad-value", "code", ("item 'x'", "'Heat <a_1>'")),
        ({"x": ["two\nlines"], "y": "b", "z": "c"}, "bad-value", "code", "item 'x'"),
        ([["x", 1]], "wrong-format", None, "one object of lists by item id"),
        ('{"x": [1], "x": [2]}', "duplicate", "item_id", "'x'"),
        ("{", "syntax", None, "one object of lists by item id"),
    ],
)
def test_json_errors(
    tmp_path: Path, codes: object, kind: ErrorKind, column: str | None, says: str | tuple[str, ...]
) -> None:
    with raises(DataError, Facts(kind, "codes.json", column=column, says=says)):
        read(as_json(tmp_path, codes))


def test_table_errors_name_the_row(tmp_path: Path) -> None:
    with raises(DataError, Facts("duplicate", "codes.tsv", row=3, line=4, column="item_id", says="item 'x'")):
        read(as_table(tmp_path, ("1", "2", "3"), "xyx"))
    with raises(
        DataError, Facts("duplicate", "codes.tsv", row=2, line=3, column="code", says=("item 'y'", "item 'x'"))
    ):
        read(as_table(tmp_path, ("1", "1", "3")))
    with raises(DataError, Facts("missing-value", "codes.tsv", row=2, line=3, column="code", says="item 'y'")):
        read(as_table(tmp_path, ("1", "", "3")))
    with raises(DataError, Facts("missing-value", "codes.tsv", row=2, line=3, column="item_id")):
        read(as_table(tmp_path, ("1", "2", "3"), ("x", "", "z")))
    with raises(DataError, Facts("missing-column", "codes.tsv", column="code", says="item_id, codes")):
        path = as_table(tmp_path, ("1", "2", "3"))
        path.write_text(path.read_text().replace("code", "codes"))
        read(path)
    table = tmp_path / "codes.parquet"
    pl.DataFrame({"item_id": ["x", "y", "z"], "code": [[1], [2], [3]]}).write_parquet(table)
    with raises(DataError, Facts("bad-value", "codes.parquet", column="code", says="numbers separated by")):
        read(table)


def test_missing_file(tmp_path: Path) -> None:
    for name in ("none.json", "none.csv"):
        with raises(DataError, Facts("missing-file", name, says="index.path")):
            read(tmp_path / name)


def test_other_items_of_the_file_are_used_by_extend(tmp_path: Path) -> None:
    codes = {"x": [3, 17], "y": [3, 2], "z": [10, 2], "v": [10, 17], "w": [4, 4]}
    index = read(as_json(tmp_path, codes))
    assert index.codes == TOKENS and index.figures["spare"] == 2
    one = index.extend({"v": Item(item_id="v", title="v")})
    assert one.encode("v") == "<a_10><b_17>" and one.tokens == index.tokens
    two = one.extend({name: Item(item_id=name, title=name) for name in "vw"})
    assert two.encode("w") == "<a_4><b_4>" and two.tokens == (*index.tokens, "<a_4>", "<b_4>")
    assert all(two.codes[item] == pieces for item, pieces in TOKENS.items()) and two.settings["spare"] == {}
    with raises(DataError, Facts("missing-value", says="such as q")):
        two.extend({"q": Item(item_id="q", title="q")})
