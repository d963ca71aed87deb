"""Writes delimited files that are safe from formula injection in spreadsheets, and reads ids back from them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from typing import TextIO

import polars as pl

# A spreadsheet treats a cell that starts with one of these as a formula; the last four are full-width forms.
# Leading characters that it may trim first (space, controls, zero-width characters) are skipped. Apostrophes before
# them come from an earlier writer and get one more, so that removing one restores the original. Python and polars read
# this expression.
_FORMULA = "'*(?:[\\t\\r\\n]|[\\s\\x00-\\x1f\\x7f-\\x9f\u200b-\u200f\u2060\ufeff]*[=+\\-@＝＋－＠])"
_FORMULA_CELL = re.compile(_FORMULA)


def escape_cell(value: object) -> str:
    """Escape a text as a cell of a delimited file, so that spreadsheets do not run it as a formula.

    Numbers have full precision, lists are JSON, and a text that would run as a formula gets a leading apostrophe.
    """
    if value is None:
        return ""
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    text = str(value).replace("\x00", "")
    return f"'{text}" if _FORMULA_CELL.match(text) else text


def unescape_cells(texts: pl.Series) -> pl.Series:
    """Return cells without the apostrophe that `escape_cell` adds."""
    return texts.str.replace(f"^'({_FORMULA})", "${1}")


def write_rows(
    stream: TextIO, header: Sequence[str], rows: Iterable[Iterable[object]], *, separator: str = ",", end: str = "\n"
) -> None:
    """Write a header and rows; used for every delimited file that may be opened in a spreadsheet.

    Args:
        stream: Text stream, opened with ``newline=""``.
        header: Names of the columns.
        rows: Values, one per column.
        separator: Separator between cells.
        end: End of a row.
    """
    # Before version 3.13, Python quotes a lone carriage return only if the line terminator has one.
    writer = csv.writer(_LineEndWriter(stream, end), delimiter=separator, lineterminator="\r\n")
    writer.writerow(header)
    writer.writerows([escape_cell(value) for value in row] for row in rows)


class _LineEndWriter:
    """File object for a `csv.writer` that replaces the line end of each row."""

    def __init__(self, stream: TextIO, end: str) -> None:
        self._stream, self._end = stream, end

    def write(self, row: str) -> None:
        self._stream.write(row.removesuffix("\r\n") + self._end)
