"""Conversion of ONCE's Goodreads folder into sequences."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.benchmarks.goodreads_sequences import convert
from llmrec.data.sets.table import load_data
from llmrec.errors import DataError
from llmrec.recipe.schema import Columns, DataSection
from tests.facts import Facts, raises

HISTORIES = [[2, 0, 1], [1, 3, 0, 2]]


def stored(path: Path, value: Any) -> None:
    holder = np.empty((), dtype=object)
    holder[()] = value
    np.save(path, holder, allow_pickle=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder in the form of ONCE's ``data/goodreads``."""
    root = tmp_path / "once"
    (root / "user").mkdir(parents=True)
    (root / "user" / "tok.uid.dat").write_text("ada\nbo\n", encoding="utf-8")
    (root / "user" / "tok.bid.dat").write_text("70\n10\n90\n20\n", encoding="utf-8")
    (root / "book.csv").write_text(
        'bid\ttitle\n70\tDune\n10\t"Define ""Normal"""\n90\tÉmile\n20\tIt\n', encoding="utf-8"
    )
    (root / "book-desc.csv").write_text('bid,desc\n70,"Sand, and\nspice."\n10,A word.\n90,A pupil.\n', encoding="utf-8")
    histories = np.empty(2, dtype=object)
    histories[:] = HISTORIES
    stored(root / "user" / "data.npy", {"uid": np.array([0, 1], dtype=object), "history": histories})
    return root


def test_converts_histories_and_books(folder: Path, tmp_path: Path) -> None:
    assert convert(folder, tmp_path / "out") == (2, 7)
    assert (tmp_path / "out" / "sequences.txt").read_text(encoding="utf-8") == "ada 90 70 10\nbo 10 20 70 90\n"
    section = DataSection(source="sequences", path=str(tmp_path / "out"), columns=Columns(fields=("description",)))
    items = load_data(section, seed=0).items
    assert {item: entry.title for item, entry in items.items()} == {
        "70": "Dune", "10": 'Define "Normal"', "90": "Émile", "20": "It",
    }  # fmt: skip
    assert items["70"].fields["description"] == "Sand, and spice."


class _Call:
    """Pickles as a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "value", [_Call(), {"uid": [0], "history": [[0], [1]]}, {"uid": [0], "history": [[4]]}, ["uid", "history"]]
)
def test_rejects_other_pickles_without_running_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    stored(folder / "user" / "data.npy", value)
    with raises(DataError, Facts("wrong-format", file="data.npy")):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_missing_file_or_column(folder: Path, tmp_path: Path) -> None:
    (folder / "book.csv").write_text("bid\tname\n70\tDune\n", encoding="utf-8")
    with raises(DataError, Facts("missing-column", file="book.csv", column="title")):
        convert(folder, tmp_path / "out")
    (folder / "book.csv").unlink()
    with raises(DataError, Facts("missing-file", file="book.csv")):
        convert(folder, tmp_path / "out")
