"""Delimited files as they are written: cells that no spreadsheet runs as a formula, and the ids read back from them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from typing import TextIO

import polars as pl

# A spreadsheet takes a cell that starts so for a formula; the last four are the full-width forms. What may be trimmed
# before it looks (space, controls, characters without a width) counts as not there. Apostrophes before it are those of
# an earlier writer, and get one more, so that taking one away gives back what was written. Python and polars read it.
_FORMULA = "'*(?:[\\t\\r\\n]|[\\s\\x00-\\x1f\\x7f-\\x9f\u200b-\u200f\u2060\ufeff]*[=+\\-@＝＋－＠])"
_GUARDED = re.compile(_FORMULA)


def cell(value: object) -> str:
    """Return a cell of a delimited file.

    Numbers have full precision, lists are JSON, and a text that a spreadsheet would run gets a leading apostrophe.
    """
    if value is None:
        return ""
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    text = str(value).replace("\x00", "")
    return f"'{text}" if _GUARDED.match(text) else text


def unguarded(texts: pl.Series) -> pl.Series:
    """Return texts of cells without the apostrophe that `cell` put before them."""
    return texts.str.replace(f"^'({_FORMULA})", "${1}")


def write_rows(
    stream: TextIO, header: Sequence[str], rows: Iterable[Iterable[object]], *, separator: str = ",", end: str = "\n"
) -> None:
    """Write a header and rows; every delimited file that others may open in a spreadsheet is written with this.

    Args:
        stream: Text, opened with ``newline=""``.
        header: Names of the columns.
        rows: Values, one a column.
        separator: Between cells.
        end: Of a row.
    """
    # Python before 3.13 quotes a lone carriage return only where rows end in one.
    writer = csv.writer(_Rows(stream, end), delimiter=separator, lineterminator="\r\n")
    writer.writerow(header)
    writer.writerows([cell(value) for value in row] for row in rows)


class _Rows:
    """Takes whole rows of a `csv.writer`, and ends them as wanted."""

    def __init__(self, stream: TextIO, end: str) -> None:
        self._stream, self._end = stream, end

    def write(self, row: str) -> None:
        self._stream.write(row.removesuffix("\r\n") + self._end)
