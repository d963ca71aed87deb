"""Reads a table of any kind, as its ending says: a file, packed or not, or all files of a folder or a pattern."""

from __future__ import annotations

import glob
import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.compute as pc

from llmrec.data.codes import stacked
from llmrec.data.read import lean, limits
from llmrec.data.read.databases import database_at
from llmrec.data.read.encodings import in_any_encoding
from llmrec.data.read.lean import Kind
from llmrec.data.read.limits import printable, reason
from llmrec.data.read.nested import EACH, in_polars, lists_in, opened
from llmrec.data.read.objects import json_file, json_lines
from llmrec.data.read.packed import PACKED, only_member
from llmrec.data.read.parquet import parquet
from llmrec.data.read.sheets import SHEETS, sheet_of, split_sheet
from llmrec.data.read.text import Table, check_path, delimited, read_bytes
from llmrec.data.read.typed import as_whole
from llmrec.errors import DataError

ATOMIC = (".inter", ".item", ".user")
"""RecBole's files, whose header says what kind a column is of."""
_ATOMIC_KINDS = (":token", ":float", ":token_seq", ":float_seq")
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".psv": "|", **dict.fromkeys(ATOMIC, "\t")}
_JSON = (".jsonl", ".ndjson", ".json")
_PARQUET = (".parquet", ".pq")
_TABLES = (*_SEPARATORS, *_JSON, *_PARQUET)


def read_table(path: Path, wanted: Mapping[str, Kind] | None = None) -> Table:
    """Read a CSV, TSV, JSON or Parquet file, packed or not; or all files of a folder or a pattern as one table.

    Text that is no UTF-8 is read as UTF-16 or Windows-1252 where it seems to be that, with a warning.

    Args:
        path: The file, the folder or the pattern.
        wanted: The columns that are needed, of those that are there, and what they hold: a plain file is then read a
            block at a time, and the other columns may be there by name alone. None: all of them.

    Raises:
        DataError: If it is missing, empty or malformed.
    """
    if path.is_dir() or is_pattern(path):
        return _several(path, wanted)
    path, sheet = split_sheet(path)
    check_path(path)
    kind, packing = _endings(path)
    name = str(path)
    if wanted is not None and (found := _lean(path, kind, packing, wanted)) is not None:
        return found
    if kind in SHEETS and not packing:
        raw, sha256 = read_bytes(path, text=False)
        return sheet_of(path, raw, sha256, sheet)
    if packing == ".zip":
        stored, sha256 = read_bytes(path, text=False)
        inner, raw = only_member(path, stored, _TABLES)
        return _read(f"{name}/{printable(inner)}", raw, sha256, Path(inner).suffix.lower())
    if kind not in _TABLES and (url := database_at(path)) is not None:
        raise DataError.at(
            name, "wrong-format", f": this is a database; set data.path={url}, and data.query to a SELECT", "data.path"
        )
    if kind not in _TABLES:
        raise DataError.at(
            name,
            "wrong-format",
            f": a file that ends in {repr(kind) if kind else 'nothing'} is no table; write one that ends in "
            f"{', '.join(sorted((*_TABLES, *SHEETS)))}",
        )
    raw, sha256 = read_bytes(path, text=kind not in _PARQUET)
    return _read(name, raw, sha256, kind)


def _lean(path: Path, kind: str, packing: str, wanted: Mapping[str, Kind]) -> Table | None:
    """Read a plain file a block at a time; None if it has to be read with care."""
    if kind in _PARQUET and not packing:
        return lean.parquet(path, wanted)
    if kind in (".jsonl", ".ndjson") and packing != ".zip":
        return lean.json_lines(path, packing, wanted)
    if kind not in _SEPARATORS or packing == ".zip":
        return None
    if kind in ATOMIC:
        wanted = {f"{name}{kind_of}": held for name, held in wanted.items() for kind_of in ("", *_ATOMIC_KINDS)}
    found = lean.delimited(path, _SEPARATORS[kind], packing, wanted)
    return without_kinds(found) if found is not None and kind in ATOMIC else found


def of_atomic(path: Path, ending: str) -> Path | None:
    """Return one of RecBole's files of a data set, by its ending; None if it is not beside the interactions.

    Args:
        path: The file of interactions, or of a part of them (``NAME.train.inter``); or the folder that holds one, or
            one that is called like the folder.
        ending: ``.inter``, ``.item`` or ``.user``.
    """
    found = sorted(path.glob("*.inter")) if path.is_dir() else [path]
    found = [each for each in found if path.is_dir() and each.stem == path.absolute().name] or found
    if len(found) != 1 or found[0].suffix.lower() != ".inter":
        return None
    file = found[0] if ending == ".inter" else found[0].with_name(found[0].name.split(".")[0] + ending)
    return file if file.is_file() else None


def is_pattern(path: Path) -> bool:
    """Whether a path stands for the files that fit it, such as ``part-*.csv``; a file of that very name goes first."""
    return glob.has_magic(str(path)) and not split_sheet(path)[0].exists()


def fitting(pattern: Path) -> list[Path]:
    """Return what fits a pattern, by name."""
    start = Path(pattern.anchor)
    return sorted(start.glob(str(pattern.relative_to(start))) if pattern.anchor else Path().glob(str(pattern)))


def _endings(path: Path) -> tuple[str, str]:
    """Return the ending that says what a file holds, and the one that says how it is packed; empty where none does."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ""
    return (suffixes[-1] if suffixes else ""), packing


def _read(name: str, raw: bytes, sha256: str, kind: str) -> Table:
    if kind in _PARQUET:
        return parquet(name, raw, sha256)
    if kind in _JSON:
        read = json_file if kind == ".json" else json_lines
        return in_any_encoding(name, raw, partial(read, name, sha256=sha256))
    table = in_any_encoding(name, raw, partial(delimited, name, separator=_SEPARATORS[kind], sha256=sha256))
    return without_kinds(table) if kind in ATOMIC else table


def without_kinds(table: Table) -> Table:
    """Return a table without the kinds in the names of its columns, where all of them have one."""
    columns = table.frame.columns
    if not all(name.endswith(_ATOMIC_KINDS) for name in columns):
        return table
    bare = {name: name.rpartition(":")[0] for name in columns}
    return replace(table, frame=table.frame.rename(bare), unread=frozenset(bare[name] for name in table.unread))


def _several(path: Path, wanted: Mapping[str, Kind] | None) -> Table:
    """Read the tables of a folder, or those that fit a pattern, in the order of their names."""
    found = sorted(path.iterdir()) if path.is_dir() else fitting(path)
    if (events := of_atomic(path, ".inter")) is not None:
        found = [events]  # its other tables are about items and users
    shown = [each for each in found if each.is_file() and not each.name.startswith((".", "_"))]
    files = [each for each in shown if _endings(each)[0] in _TABLES or _endings(each)[1] == ".zip"]
    if not files:
        what = "is a folder that holds" if path.is_dir() else "fits"
        raise DataError.at(
            path, "missing-file", f" {what} no table; give files that end in {', '.join(sorted(_TABLES))}"
        )
    tables = [read_table(each, wanted) for each in files]
    if len(tables) == 1:
        return tables[0]
    digest = hashlib.sha256("".join(table.sha256 for table in tables).encode()).hexdigest()
    return replace(joined(tables), name=str(path), sha256=digest)


def joined(tables: Sequence[Table]) -> Table:
    """Return tables of the same columns as one, the rows of each behind those before; errors name the file of a row.

    Raises:
        DataError: If a column is not in all of them, or holds values that do not go together.
    """
    first = tables[0]
    for table in tables[1:]:
        for one, other in ((first, table), (table, first)):
            absent = [name for name in one.frame.columns if name not in other.frame.columns]
            if absent:
                raise DataError.at(
                    other.name,
                    "missing-column",
                    f" has no column {absent[0]!r}, which {one.name} has; write the same columns into the file of "
                    "every part, or name the one file that is meant",
                    absent[0],
                )
    columns = first.frame.columns
    unread = frozenset().union(*(table.unread for table in tables))
    try:
        frame = pl.DataFrame([_stacked(name, [table.frame[name] for table in tables], unread) for name in columns])
    except pl.exceptions.PolarsError as error:
        raise DataError.at(
            "; ".join(table.name for table in tables),
            "bad-value",
            f": a column has values of different types in these files ({reason(error)}); write it alike in all",
        ) from error
    return Table(
        "; ".join(table.name for table in tables),
        frame,
        "; ".join(table.sha256 for table in tables),
        unusable={name: held for table in tables for name, held in table.unusable.items()},
        parts=tuple(tables),
        unread=unread,
    )


def _stacked(name: str, parts: Sequence[pl.Series], unread: frozenset[str]) -> pl.Series:
    """Return the values of a column of several tables."""
    if name in unread:
        return pl.repeat(None, sum(map(len, parts)), dtype=pl.Null, eager=True).alias(name)
    if all(isinstance(part.dtype, pl.Enum) for part in parts):
        return stacked(name, parts)
    plain = [part.cast(pl.String) if isinstance(part.dtype, pl.Enum) else part for part in parts]
    if any(part.dtype == pl.String for part in plain):
        plain = [as_whole(part) for part in plain]
    return pl.concat([part.to_frame(name) for part in plain], how="vertical_relaxed")[name]


# --------------------------------------------------------------------------- lists


def rows_of(table: Table, names: Iterable[str | None]) -> Table:
    """Return a table with a row for each element of the list that columns are named in; others as they are.

    Rows keep their place in the file, so that errors name it. A row whose list is empty gives none.

    Args:
        table: As it was read.
        names: The columns that are needed, such as ``lines[].sku``.

    Raises:
        DataError: If columns of two lists are named, or all lists are empty.
    """
    chosen = tuple(name for name in names if name is not None and EACH in name)
    if not chosen:
        return table
    if table.parts:
        parts = joined([_along(part, chosen) for part in table.parts])
        found = replace(parts, name=table.name, sha256=table.sha256)
    else:
        found = _along(table, chosen)
    if found.frame.is_empty():
        raise DataError.at(table.name, "empty", f": the lists of {chosen[0]} have no elements in any row", chosen[0])
    return found


def _along(table: Table, names: Sequence[str]) -> Table:
    """Return the rows of one file, of which there may be none."""
    wanted = {name: lists_in(name) for name in names if name not in table.frame.columns}
    wanted = {name: lists for name, lists in wanted.items() if lists and lists[0] in table.lists}
    if not wanted:
        return table
    longest = max(wanted, key=lambda name: len(wanted[name]))
    for name, lists in wanted.items():
        if lists != wanted[longest][: len(lists)]:
            raise DataError.at(
                table.name,
                "contradiction",
                f": the columns {longest!r} and {name!r} are in two lists, and each row is an element of one; name "
                "columns of one list",
                name,
            )
    for each in wanted[longest]:
        if each in table.lists:
            table = _each(table, each)
    return table


def _each(table: Table, name: str) -> Table:
    """Return a table with a row for each element of a list."""
    column = table.lists[name]
    counts = pc.list_value_length(column).fill_null(0).to_numpy()
    rows = np.repeat(np.arange(len(counts)), counts)
    sizes = [_bytes(each) for each in table.frame if each.dtype in (pl.String, pl.List(pl.String))]
    if sum(int((size.to_numpy() * counts).sum()) for size in sizes) > limits.MAX_BYTES:
        raise DataError.at(
            table.name,
            "too-large",
            f": with a row for each element of {name} its texts take more than {limits.MAX_BYTES} bytes; write fewer "
            "columns, or split it",
            name,
        )
    found = opened(table.name, {name: pc.list_flatten(column)})
    inner = in_polars(found.columns).with_columns(pl.col(pl.String).fill_null(""))
    frame = pl.concat([table.frame[rows], inner], how="horizontal")
    return replace(
        table,
        frame=frame,
        lines=array("q", map(table.line, rows)),
        rows=array("q", (table.rows[row] for row in rows) if table.rows is not None else rows),
        lists=found.lists,
        unusable={**table.unusable, **found.unusable},
    )


def _bytes(texts: pl.Series) -> pl.Series:
    """Return the bytes of the texts in each row."""
    if texts.dtype == pl.String:
        return texts.str.len_bytes().cast(pl.Int64).fill_null(0)
    return texts.list.eval(pl.element().str.len_bytes().cast(pl.Int64)).list.sum().fill_null(0)
