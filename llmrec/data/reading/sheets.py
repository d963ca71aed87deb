"""Reads a sheet of a spreadsheet, every cell as text: ``orders.xlsx``, or ``orders.xlsx#Sheet 2``."""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path

import polars as pl

from llmrec.data.reading.limits import BROKEN, FREE_BYTES, MAX_RATIO, archived, enumerated, reason, shown
from llmrec.data.reading.text import Table, column_names
from llmrec.errors import DataError, did_you_mean, require

log = logging.getLogger(__name__)

SHEETS = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
"""Endings of spreadsheets."""


def split_sheet(path: Path) -> tuple[Path, str | None]:
    """Return a spreadsheet and the sheet that stands behind ``#``; other paths as they are."""
    book, mark, sheet = str(path).rpartition("#")
    if mark and Path(book).suffix.lower() in SHEETS and not path.exists():
        return Path(book), sheet
    return path, None


def sheets_of(path: Path) -> list[str]:
    """Return a spreadsheet's sheets as recipes name them, ``orders.xlsx#Sheet 2``; none if it cannot be read.

    Raises:
        MissingExtra: If ``fastexcel`` is not installed.
    """
    fastexcel = require("fastexcel", "tables")
    try:
        return [f"{path}#{name}" for name in fastexcel.read_excel(path).sheet_names]
    except Exception:  # as in `sheet_of`; whoever reads the sheet is told what is wrong with it
        return []


def sheet_of(path: Path, raw: bytes, sha256: str, sheet: str | None) -> Table:
    """Read one sheet; dates become ISO dates, and nothing is calculated: a formula has the value that was saved.

    Args:
        path: The spreadsheet, for errors.
        raw: Its bytes.
        sha256: Of them.
        sheet: Which one; None: the first, with a warning where there are others.

    Raises:
        DataError: If it is damaged, plays tricks, or has no such sheet or no rows.
        MissingExtra: If ``fastexcel`` is not installed.
    """
    fastexcel = require("fastexcel", "tables")
    _refuse_tricks(path, raw)
    try:
        book = fastexcel.read_excel(raw)
        names = list(book.sheet_names)
        if sheet is not None and sheet not in names:
            raise DataError.at(
                path,
                "unknown-name",
                f" has no sheet {shown(sheet)}{did_you_mean(sheet, names)}; its sheets are: {enumerated(names)}",
                "data.path",
            )
        chosen = names[0] if sheet is None else sheet
        head = book.load_sheet(chosen, header_row=None, n_rows=1, dtypes="string").to_polars()
        frame = book.load_sheet(chosen, dtypes="string").to_polars()
    except DataError:
        raise
    except Exception as error:  # the library has errors of its own, and passes on those of its parsers
        raise DataError.at(
            path, "damaged", f" cannot be read as a spreadsheet ({reason(error)}); save it again, or save it as CSV"
        ) from error
    if sheet is None and len(names) > 1:
        others = enumerated(names[1:])
        log.warning("%s: the first sheet is read, %s; name another as %s#SHEET: %s", path, chosen, path, others)
    name = f"{path}#{chosen}" if len(names) > 1 else str(path)
    # The library gives a column that stands twice another name.
    column_names(name, [text for text in (head.row(0) if head.height else ()) if text])
    columns = [column.strip() for column in frame.columns]
    frame = frame.rename(dict(zip(frame.columns, columns, strict=True))).fill_null("")
    # Rows that were emptied and not deleted stand below the last one.
    filled = frame.select(pl.any_horizontal(pl.all().str.strip_chars() != "")).to_series() if columns else pl.Series([])
    rows = filled.arg_true().to_list() if len(filled) else []
    if not rows:
        raise DataError.at(name, "empty", " has a header and no rows; choose another sheet, or write the table again")
    return Table(name, frame[: rows[-1] + 1], sha256, header=1)


def _refuse_tricks(path: Path, raw: bytes) -> None:
    """Refuse an archive that unpacks to far more than it holds, before anything unpacks it."""
    if not raw.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            size = sum(entry.file_size for entry in archived(path, archive))
    except (*BROKEN, ValueError) as error:
        raise DataError.at(path, "damaged", f" is a damaged spreadsheet ({reason(error)}); save it again") from error
    if size > max(FREE_BYTES, MAX_RATIO * len(raw)):
        raise DataError.at(
            path,
            "too-large",
            f" unpacks to {size} bytes from {len(raw)}, so it is not what it seems; save its sheet as CSV",
        )
