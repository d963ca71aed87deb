"""Gives the columns of a block their types, and names the first row that does not fit."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from html.entities import html5
from typing import Literal

import polars as pl

from llmrec.data.reading.limits import shown
from llmrec.data.reading.pieces import Block
from llmrec.errors import DataError

Unit = Literal["seconds", "milliseconds"]

# No data set reaches beyond the year 5138 in seconds, or back before 1973 in milliseconds.
_MILLISECONDS_FROM = 1e11
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Tags of HTML, whole or cut off, and what is left of a tag whose beginning was cut off.
_TAGS = "a|b|br|div|em|font|h[1-6]|i|img|input|li|link|meta|p|script|span|strong|style|table|tbody|td|th|tr|u|ul"
_MARKUP = re.compile(
    rf"</?(?:{_TAGS})(?:\s[^<>]*)?(?:/?>|$)|\b(?:class|href|id|src|style|data-[\w-]+|aria-\w+)=[\"']", re.IGNORECASE
)


def has_markup(text: str) -> bool:
    """Whether a text holds HTML, as scraped pages leave it where a title should be."""
    return ("<" in text or "=" in text) and _MARKUP.search(text) is not None


def plain(text: str) -> str:
    """Return a text with its HTML entities decoded, once: ``&amp;`` becomes ``&``, ``AT&T`` stays."""
    return _ENTITY.sub(_meant, text) if "&" in text else text


def _meant(found: re.Match[str]) -> str:
    # The library also decodes names without a semicolon, and so the start of a longer word.
    return html.unescape(found[0]) if found[0][1] == "#" else html5.get(found[0][1:], found[0])


def ids(block: Block, columns: Sequence[str]) -> pl.Series:
    """Return ids as text: of several columns the first that is not blank.

    Raises:
        DataError: If one is missing.
    """
    cleaned = [_filled(block.frame[column]) for column in columns]
    found = cleaned[0]
    for other in cleaned[1:]:
        found = found.zip_with(found.is_not_null(), other)
    row = _first(found.is_null())
    if row is not None:
        which = " and ".join(repr(column) for column in columns)
        raise DataError.at(
            block.where(row),
            "missing-value",
            f": column {which} is empty; every row needs a user and an item",
            columns[0],
        )
    _no_nul(block, found, columns[0])
    return found


def numbers(block: Block, column: str, what: str, *, absent: float | None = None) -> pl.Series:
    """Return finite numbers; those that equal ``absent`` become nulls.

    Raises:
        DataError: If a value is missing, not a number, NaN or infinite.
    """
    series = block.frame[column]
    text = series.str.strip_chars() if series.dtype == pl.String else series
    found = text.cast(pl.Float64, strict=False)
    row = _first(~found.is_finite().fill_null(False))
    if row is not None:
        raise DataError.at(
            block.where(row),
            "bad-value",
            f": the {what} in column {column!r} is {shown(series[row])}, which is not a finite "
            "number; correct or drop the row",
            column,
        )
    return found if absent is None else found.set(found == absent, None)


def times(block: Block, column: str, unit: Unit | None) -> tuple[pl.Series, Unit]:
    """Return times as seconds since 1970, from seconds or milliseconds, as the first row of the file shows.

    Args:
        block: Where they are.
        column: Their name.
        unit: The unit of the blocks before; None for the first one.

    Raises:
        DataError: If a value is missing, not a number, or of another unit than the first one.
    """
    found = numbers(block, column, "time")
    large = found.abs() >= _MILLISECONDS_FROM
    unit = unit or ("milliseconds" if large[0] else "seconds")
    row = _first(~large if unit == "milliseconds" else large)
    # Zero and less is before 1970 in either unit, which no data set here holds in milliseconds.
    if row is not None:
        raise DataError.at(
            block.where(row),
            "bad-value",
            f": the time in column {column!r} is {found[row]:g}, while the file begins with "
            f"{unit} since 1970; one file has one unit, so correct the row",
            column,
        )
    return (found / 1000 if unit == "milliseconds" else found), unit


def dates(block: Block, column: str, formats: Sequence[str]) -> pl.Series:
    """Return dates as seconds since 1970, UTC unless they say otherwise.

    Raises:
        DataError: If a value has none of the formats.
    """
    series = block.frame[column].cast(pl.String).str.strip_chars()
    found = pl.Series(column, [None] * series.len(), pl.Float64)
    for form in formats:
        moments = series.str.to_datetime(form, strict=False, time_unit="us")
        found = found.fill_null(moments.dt.epoch("us").cast(pl.Float64) / 1e6)
        if not found.null_count():
            break
    row = _first(found.is_null())
    if row is not None:
        raise DataError.at(
            block.where(row),
            "bad-value",
            f": the time in column {column!r} is {shown(series[row])}, which is not of the form "
            f"{' or '.join(formats)}; correct or drop the row",
            column,
        )
    return found


def texts(block: Block, column: str) -> pl.Series:
    """Return texts with their HTML entities decoded; blank ones are nulls."""
    found = _filled(block.frame[column])
    _no_nul(block, found, column)
    marked = (found.str.contains("&", literal=True) & found.str.contains(";", literal=True)).fill_null(False)
    rows = marked.arg_true()
    if not rows.len():
        return found
    decoded = pl.Series([plain(text) for text in found.gather(rows)], dtype=pl.String)
    return found.scatter(rows, decoded)


def _filled(series: pl.Series) -> pl.Series:
    """Return a column as text with nulls for blank values."""
    text = series.cast(pl.String)
    return text.set((text.str.strip_chars() == "").fill_null(False), None)


def _no_nul(block: Block, series: pl.Series, column: str) -> None:
    row = _first(series.str.contains("\0", literal=True).fill_null(False))
    if row is not None:
        raise DataError.at(
            block.where(row), "encoding", f": column {column!r} holds a NUL character; remove it", column
        )


def _first(bad: pl.Series) -> int | None:
    """Return the first True row."""
    return int(bad.arg_max() or 0) if bad.any() else None
