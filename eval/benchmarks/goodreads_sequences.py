"""Converts ONCE's Goodreads data to sequences for ``eval/suites/books.yaml``.

``python -m eval.benchmarks.goodreads_sequences SOURCE TARGET`` reads the folder ``data/goodreads`` of
github.com/Jyonn/ONCE (Liu et al., WSDM 2024) and writes ``sequences.txt`` and ``items.tsv``:

* ``user/data.npy``: users and their histories of up to nine books, as line numbers in the two vocabularies
  ``user/tok.uid.dat`` and ``user/tok.bid.dat``. There are no timestamps; the order is that of the file.
* ``book.csv``: titles. ``book-desc.csv``: a sentence about each, which a language model generated from the title alone.

User interests and generated books in the same folder are not used: a language model generated them from whole
histories, including held-out interactions.
"""

from __future__ import annotations

import csv
import io
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.errors import DataError

# An array of objects is stored as a pickle, which can execute arbitrary code; only these names are allowed.
_ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
_MODULES = {"numpy._core.multiarray": "numpy.core.multiarray"}


class _Arrays(pickle.Unpickler):
    """Reads arrays, lists, numbers and strings, and rejects everything else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        allowed = _ARRAYS.get((_MODULES.get(module_name, module_name), global_name))
        if allowed is None:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not an array")
        return allowed


def convert(source: Path, target: Path) -> tuple[int, int]:
    """Write both files.

    Args:
        source: ONCE's folder ``data/goodreads``.
        target: Output folder for ``sequences.txt`` and ``items.tsv``.

    Returns:
        The numbers of users and interactions.

    Raises:
        DataError: If a file is missing or has an unexpected format.
    """
    users, books = (_lines(source / "user" / f"tok.{name}.dat") for name in ("uid", "bid"))
    rows = list(_histories(source / "user" / "data.npy", users, books))
    titles = dict(_pairs(source / "book.csv", "\t", "bid", "title"))
    about = dict(_pairs(source / "book-desc.csv", ",", "bid", "desc"))
    target.mkdir(parents=True, exist_ok=True)
    lines = [" ".join([user, *history]) for user, history in rows]
    (target / "sequences.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (target / "items.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["item_id", "title", "description"])
        writer.writerows([book, titles.get(book, ""), about.get(book, "")] for book in books)
    return len(rows), sum(len(history) for _, history in rows)


def _histories(path: Path, users: Sequence[str], books: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    file = io.BytesIO(_read(path))
    try:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if version != (1, 0) or shape != () or dtype != np.dtype(object):
            raise ValueError(f"version {version}, shape {shape} and type {dtype}")
        columns = _Arrays(file).load().item()
        for user, history in zip(columns["uid"], columns["history"], strict=True):
            yield users[int(user)], [books[int(book)] for book in history]
    except (ValueError, TypeError, KeyError, IndexError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise DataError(
            f"{path} has no users and histories ({error}); download it again from github.com/Jyonn/ONCE",
            kind="wrong-format",
            at=path,
        ) from error


def _pairs(path: Path, separator: str, key: str, value: str) -> Iterator[tuple[str, str]]:
    rows = csv.DictReader(io.StringIO(_read(path).decode("utf-8"), newline=""), delimiter=separator)
    absent = {key, value} - set(rows.fieldnames or ())
    if absent:
        raise DataError(
            f"{path} has no column {min(absent)!r}; download it again from github.com/Jyonn/ONCE",
            kind="missing-column",
            at=path,
            column=min(absent),
        )
    return ((row[key], " ".join((row[value] or "").split())) for row in rows)


def _lines(path: Path) -> list[str]:
    return _read(path).decode("utf-8").split()


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; name the folder data/goodreads of github.com/Jyonn/ONCE",
            kind="missing-file",
            at=path,
        )
    return path.read_bytes()


if __name__ == "__main__":
    users, interactions = convert(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.write(f"{users:,} users, {interactions:,} interactions\n")
