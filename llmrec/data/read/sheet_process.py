"""Reads one spreadsheet sheet in a process with limited memory; run as a script, without importing llmrec.

A few bytes of a spreadsheet can name a cell in the last column of the last row. The library then requests memory for
every cell up to there and, if that is refused, ends the process that called it.

Standard input: a line of JSON, ``{"sheet": NAME or null, "load": bool, "bytes": N, "columns": N}``, and then the file.
Standard output: a line of JSON, ``{"error": TEXT}`` or ``{"names": [...], "head": [...]}``, and then the sheet in the
Arrow IPC format.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fastexcel
import polars as pl

_LARGE_NUMBER = r"^-?\d{16,}(\.\d+)?$"
"""Format of numbers from 10^15 on; floats are exact for integers up to 2^53, which is 9 * 10^15."""


def limit_memory(more: int) -> None:
    """Limit the additional memory of this process to ``more`` bytes, if the system supports it."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        bound = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    except (ImportError, OSError, ValueError):
        pass


def read_sheet(raw: bytes, name: str | None, *, load: bool, most: int) -> tuple[dict[str, Any], pl.DataFrame | None]:
    """Return the sheet names, the first row of the requested sheet, and its table, with every cell as text.

    Numbers of a spreadsheet are floats. Columns with some so large that two integers are the same float stay floats, so
    that code that reads ids can detect them. A sheet of more columns than ``most`` is not loaded.
    """
    book = fastexcel.read_excel(raw)
    names = list(book.sheet_names)
    chosen = name if name is not None else next(iter(names), None)
    if not load or chosen not in names:
        return {"names": names, "head": []}, None
    head = book.load_sheet(chosen, header_row=None, n_rows=1, dtypes="string").to_polars()
    first = list(head.row(0)) if head.height else [None] * head.width
    if len(first) > most:
        return {"names": names, "head": first}, None
    frame = book.load_sheet(chosen, dtypes="string").to_polars()
    large = [name for name in frame.columns if frame[name].str.contains(_LARGE_NUMBER).any()]
    if large:
        columns = book.load_sheet(chosen, schema_sample_rows=None).available_columns()
        kinds = {column.name: column.dtype for column in columns}
        floats = [name for name in large if kinds.get(name) in ("float", "int")]
        frame = frame.with_columns(pl.col(floats).cast(pl.Float64, strict=False))
    return {"names": names, "head": first}, frame


def main() -> None:
    """Read a spreadsheet from standard input, and write the requested sheet to standard output."""
    request = json.loads(sys.stdin.buffer.readline())
    raw = sys.stdin.buffer.read()
    limit_memory(request["bytes"])
    frame = None
    try:
        answer, frame = read_sheet(raw, request["sheet"], load=request["load"], most=request["columns"])
    except BaseException as error:  # a panic of a Rust library is not an Exception
        answer = {"error": str(error)}
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    if frame is not None:
        frame.write_ipc(sys.stdout.buffer)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
