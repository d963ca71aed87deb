"""Reads a table of any kind, as its ending says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from llmrec.data.reading.limits import reason
from llmrec.data.reading.parquet import parquet
from llmrec.data.reading.text import Table, check_path, delimited, json_lines, read_bytes
from llmrec.errors import DataError

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".inter": "\t", ".item": "\t", ".user": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = (".parquet", ".pq")


def read_table(path: Path) -> Table:
    """Read a CSV, TSV, JSON Lines or Parquet file, the text ones optionally gzipped.

    Raises:
        DataError: If it is missing, empty or malformed.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[-2:-1] if packed else suffixes[-1:]) or [""]
    name = str(path)
    check_path(path)
    if suffix[0] not in (*_SEPARATORS, *_JSON_LINES, *_PARQUET):
        known = sorted([*_SEPARATORS, *_JSON_LINES, *_PARQUET])
        ending = repr(suffix[0]) if suffix[0] else "nothing"
        raise DataError.at(
            name,
            "wrong-format",
            f": a file that ends in {ending} is no table; write one that ends in {', '.join(known)}",
        )
    raw, sha256 = read_bytes(path, text=suffix[0] not in _PARQUET)
    if suffix[0] in _PARQUET:
        return parquet(name, raw, sha256)
    if suffix[0] in _JSON_LINES:
        return json_lines(name, raw, sha256)
    return delimited(name, raw, separator=_SEPARATORS[suffix[0]], sha256=sha256)


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
                    "every part",
                    absent[0],
                )
    columns = first.frame.columns
    try:
        frame = pl.concat([table.frame.select(columns) for table in tables], how="vertical_relaxed")
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
    )
