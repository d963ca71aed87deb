"""Small interaction data for the data tests."""

from __future__ import annotations

import gzip
import io
import json
import random
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from hypothesis import strategies as st

from llmrec.data.dataset import Dataset
from llmrec.recipe.schema import DataSection
from llmrec.types import Item

Row = tuple[str, str, float, float]


def dataset(rows: list[Row], *, timed: bool = True) -> Dataset:
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    if not timed:
        frame = frame.drop("timestamp")
    items = {item: Item(item_id=item, title=f"Title {item}") for item in sorted({row[1] for row in rows})}
    return Dataset(name="case", noun="things", interactions=frame, items=items, rating_scale=(1.0, 5.0))


def random_rows(seed: int, *, users: int = 12, items: int = 15, repeats: bool = False, moments: int = 6) -> list[Row]:
    """Return rows with many ties in time; each user has 1 to 9 interactions."""
    dice = random.Random(seed)
    rows = []
    for user in range(users):
        size = dice.randint(1, 9)
        drawn = dice.choices(range(items), k=size) if repeats else dice.sample(range(items), size)
        rows += [(f"u{user}", f"i{item}", float(dice.randint(1, 5)), float(dice.randint(1, moments))) for item in drawn]
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
    """Write an archive of files and a file that macOS adds."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("__MACOSX/" + next(iter(files)), b"rubbish")
        for name, raw in _stored(files, packed=packed).items():
            pack.writestr(top + name, raw)
    return path


def _stored(files: Mapping[str, str | bytes], *, packed: bool) -> dict[str, bytes]:
    raw = {name: held.encode() if isinstance(held, str) else held for name, held in files.items()}
    return {f"{name}.gz": gzip.compress(held) for name, held in raw.items()} if packed else raw


def lines(*rows: object) -> bytes:
    """Return rows as lines: texts as they are, others as JSON."""
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows).encode()


def dicts(*rows: Mapping[str, Any]) -> bytes:
    """Return rows as Python dictionaries, one per line."""
    return "".join(f"{row!r}\n" for row in rows).encode()


def zipped(*entries: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    """Return a zip archive; names may be repeated."""
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as pack:
        warnings.simplefilter("ignore")
        for name, raw in entries:
            pack.writestr(name, raw)
    return stream.getvalue()


def pairs(frame: pl.DataFrame) -> list[tuple[str, str]]:
    return list(frame.select("user_id", "item_id").iter_rows())


def section(path: Path | str, **keys: Any) -> DataSection:
    return DataSection(source="table", path=str(path), **keys)


seeds = st.integers(0, 2**32 - 1)
