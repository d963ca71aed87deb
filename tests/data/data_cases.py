"""Small interaction data for the data tests."""

from __future__ import annotations

import gzip
import math
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from hypothesis import strategies as st

from llmrec.data.dataset import Dataset
from llmrec.recipe.schema import DataSection
from llmrec.types import Item
from tests.facts import Facts

Row = tuple[str, str, float, float]


def dataset(rows: list[Row], *, timed: bool = True) -> Dataset:
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    if not timed:
        frame = frame.drop("timestamp")
    items = {item: Item(item_id=item, title=f"Title {item}") for item in sorted({row[1] for row in rows})}
    return Dataset(name="case", noun="things", interactions=frame, items=items, rating_scale=(1.0, 5.0))


def random_rows(seed: int, *, users: int = 12, items: int = 15, repeats: bool = False, moments: int = 6) -> list[Row]:
    """Rows with many ties in time; each user has 1 to 9 interactions."""
    dice = random.Random(seed)
    rows = []
    for user in range(users):
        size = dice.randint(1, 9)
        chosen = dice.choices(range(items), k=size) if repeats else dice.sample(range(items), size)
        rows += [
            (f"u{user}", f"i{item}", float(dice.randint(1, 5)), float(dice.randint(1, moments))) for item in chosen
        ]
    dice.shuffle(rows)
    return rows


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows


def folder(path: Path, files: Mapping[str, str | bytes], *, packed: bool = False) -> Path:
    """Write files to a folder, gzipped or not."""
    path.mkdir(parents=True, exist_ok=True)
    for name, raw in _stored(files, packed=packed).items():
        (path / name).write_bytes(raw)
    return path


def archive(path: Path, files: Mapping[str, str | bytes], *, top: str = "top/", packed: bool = False) -> Path:
    """Write an archive of files, beside one that Macs add."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("__MACOSX/" + next(iter(files)), b"rubbish")
        for name, raw in _stored(files, packed=packed).items():
            pack.writestr(top + name, raw)
    return path


def _stored(files: Mapping[str, str | bytes], *, packed: bool) -> dict[str, bytes]:
    raw = {name: held.encode() if isinstance(held, str) else held for name, held in files.items()}
    return {f"{name}.gz": gzip.compress(held) for name, held in raw.items()} if packed else raw


def section(path: Path | str, **keys: Any) -> DataSection:
    return DataSection(source="table", path=str(path), **keys)


seeds = st.integers(0, 2**32 - 1)

REFUSED: list[tuple[dict[str, Any], Facts]] = [
    ({}, Facts("missing-key", column="candidates")),
    ({"candidate": ["1"]}, Facts("missing-key", column="candidates", says="did you mean 'candidate'")),
    ({"candidates": []}, Facts("empty", column="candidates")),
    ({"candidates": None}, Facts("missing-key", column="candidates")),
    ({"candidates": "1"}, Facts("bad-value", column="candidates")),
    ({"candidates": {"a": 1}}, Facts("bad-value", column="candidates")),
    ({"candidates": [None]}, Facts("missing-value", column="candidates, entry 1")),
    ({"candidates": [True]}, Facts("bad-value", column="candidates, entry 1")),
    ({"candidates": [math.nan]}, Facts("missing-value", column="candidates, entry 1")),
    ({"candidates": [math.inf]}, Facts("bad-value", column="candidates, entry 1")),
    ({"candidates": [["1"]]}, Facts("bad-value", column="candidates, entry 1")),
    ({"candidates": [{"title": 3}]}, Facts("bad-value", column="candidates, entry 1: title")),
    ({"candidates": [{"title": " \u200b"}]}, Facts("missing-value", column="candidates, entry 1")),
    ({"candidates": [{"title": "x", "deep": {"a": 1}}]}, Facts("bad-value", column="candidates, entry 1: deep")),
    ({"candidates": ["1\x07"]}, Facts("bad-value", column="candidates, entry 1")),
    ({"candidates": [{"title": "a\0b"}]}, Facts("encoding", column="candidates, entry 1: title")),
    ({"candidates": [{"title": "a\ud800"}]}, Facts("encoding", column="candidates, entry 1: title")),
    ({"candidates": [{"item_id": "1", "a\ud800": "b"}]}, Facts("encoding", column="candidates, entry 1: a key")),
    ({"candidates": ["x" * 1001]}, Facts("too-large", column="candidates, entry 1", says="1000")),
    ({"candidates": ["1"], "id": "a\nb"}, Facts("bad-value", column="id")),
    ({"candidates": ["1"], "id": ["a"]}, Facts("bad-value", column="id")),
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
"""Requests that cannot be ranked, and what each is told; item 1 is the only one that is known."""
