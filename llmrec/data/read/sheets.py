"""Reads a sheet of a spreadsheet, with every cell as text: ``orders.xlsx``, or ``orders.xlsx#Sheet 2``."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import polars as pl

from llmrec.data.read.limits import (
    ALWAYS_ALLOWED_BYTES,
    MAX_RATIO,
    READ_ERRORS,
    format_error,
    format_names,
    format_value,
    list_archive_files,
)
from llmrec.data.read.tables import MAX_COLUMNS, Table, validate_column_names
from llmrec.errors import DataError, did_you_mean, require
from llmrec.terminal import warn_once_logger

log = warn_once_logger(__name__)

SPREADSHEET_ENDINGS = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
"""Endings of spreadsheets."""
_MEMORY, _MEMORY_PER_BYTE = 2**30, 40
"""Memory allowed for reading in bytes, and in bytes per byte of the decompressed file: a cell takes about 24."""


def split_sheet_name(path: Path) -> tuple[Path, str | None]:
    """Split ``orders.xlsx#Sheet 2`` into path and sheet name; other paths are returned unchanged."""
    book, mark, sheet = str(path).rpartition("#")
    if mark and Path(book).suffix.lower() in SPREADSHEET_ENDINGS and not path.exists():
        return Path(book), sheet
    return path, None


def list_sheets(path: Path) -> list[str]:
    """Return the sheets of a spreadsheet as written in recipes (``orders.xlsx#Sheet 2``).

    Raises:
        MissingExtra: If ``fastexcel`` is not installed.
    """
    try:
        names, _, _ = _read_in_process(path, path.read_bytes(), None, load=False)
    except (OSError, DataError):  # the error is reported when the sheet is read
        return []
    return [f"{path}#{name}" for name in names]


def read_sheet(path: Path, raw: bytes, sha256: str, sheet: str | None) -> Table:
    """Read one sheet; dates become ISO dates, and formulas are replaced by their saved values.

    All columns are texts, except those of numbers too large for ids; see `sheet_process`.

    Args:
        path: The spreadsheet, for errors.
        raw: Its bytes.
        sha256: Their hash.
        sheet: The sheet; None: the first, with a warning if there are others.

    Raises:
        DataError: If the spreadsheet is damaged or malicious, or the sheet is missing or has no rows.
        MissingExtra: If ``fastexcel`` is not installed.
    """
    names, head, frame = _read_in_process(path, raw, sheet, load=True)
    if frame is None:
        validate_column_names(str(path), [text or f"column {n}" for n, text in enumerate(head, start=1)])
        if sheet is None:
            raise DataError.at(path, "empty", " has no sheets; save it again, or save it as CSV")
        raise DataError.at(
            path,
            "unknown-name",
            f" has no sheet {format_value(sheet)}{did_you_mean(sheet, names)}; its sheets are: {format_names(names)}",
            "data.path",
        )
    chosen = names[0] if sheet is None else sheet
    if sheet is None and len(names) > 1:
        others = format_names(names[1:])
        log.warning("%s: reading the first sheet, %s; choose another with %s#SHEET: %s", path, chosen, path, others)
    name = f"{path}#{chosen}" if len(names) > 1 else str(path)
    # The library renames duplicate columns.
    validate_column_names(name, [text for text in head if text])
    columns = [column.strip() for column in frame.columns]
    frame = frame.rename(dict(zip(frame.columns, columns, strict=True))).fill_null("")
    # Rows that were cleared but not deleted can follow the last data row.
    has_text = (pl.all().cast(pl.String).str.strip_chars() != "").fill_null(value=False)
    filled = frame.select(pl.any_horizontal(has_text)).to_series() if columns else pl.Series([])
    rows = filled.arg_true().to_list() if len(filled) else []
    if not rows:
        raise DataError.at(name, "empty", " has a header but no rows; choose another sheet, or write the table again")
    return Table(name, frame[: rows[-1] + 1], sha256, header=1)


def _read_in_process(
    path: Path, raw: bytes, sheet: str | None, *, load: bool
) -> tuple[list[str], list[str | None], pl.DataFrame | None]:
    """Read a sheet in a separate process; see `sheet_process`."""
    require("fastexcel", "tables")
    size = _validated_size(path, raw)
    request = json.dumps(
        {"sheet": sheet, "load": load, "bytes": _MEMORY + _MEMORY_PER_BYTE * size, "columns": MAX_COLUMNS}
    )
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("sheet_process.py"))],
        input=request.encode() + b"\n" + raw,
        # The limit includes the memory that each thread reserves.
        env={**os.environ, "POLARS_MAX_THREADS": "1", "RAYON_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    line, _, rest = done.stdout.partition(b"\n")
    if done.returncode or not line:
        raise DataError.at(
            path,
            "too-large",
            f" cannot be read: its {size} bytes need more memory than expected, because a cell is far outside the "
            "table or the file is damaged; delete the empty rows and columns, or save its sheet as CSV",
        )
    answer = json.loads(line)
    if "error" in answer:
        raise DataError.at(
            path,
            "damaged",
            f" cannot be read as a spreadsheet ({format_error(ValueError(answer['error']))}); save it again, or save "
            "it as CSV",
        )
    return answer["names"], answer["head"], pl.read_ipc(rest) if rest else None


def _validated_size(path: Path, raw: bytes) -> int:
    """Return the decompressed size of an archive, and reject zip bombs."""
    if not raw.startswith(b"PK"):
        return len(raw)
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            size = sum(entry.file_size for entry in list_archive_files(path, archive))
    except (*READ_ERRORS, ValueError) as error:
        raise DataError.at(
            path, "damaged", f" is a damaged spreadsheet ({format_error(error)}); save it again"
        ) from error
    if size > max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * len(raw)):
        raise DataError.at(
            path,
            "too-large",
            f" has {len(raw)} bytes and decompresses to {size} bytes, so it is malformed; save its sheet as CSV",
        )
    return size
