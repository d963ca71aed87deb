"""Reads enough of a table to judge it: a small one whole, a large one in blocks from all over the file."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.data.arrow import FAULTS, check_size, from_arrow
from llmrec.data.files import Table, delimited, json_lines
from llmrec.data.opening import BROKEN, Capped, no_file, reason
from llmrec.data.tables import read_table
from llmrec.errors import DataError

WHOLE_BYTES = 32 * 2**20
"""Files up to this size, unpacked, are read whole."""
PART_BYTES = 16 * 2**20
"""About so much is read of larger ones."""
WHOLE_ROWS = 1_000_000
"""Parquet tables up to so many rows are read whole."""
PART_ROWS = 400_000
"""About so many are read of larger ones."""

_BLOCKS = 12
_PARQUET = (".parquet", ".pq")
_JSON = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Peek:
    """A table, or a part of it.

    Attributes:
        table: The rows that were read.
        whole: Whether these are all of them.
        first: So many rows are the first ones of the file; the others come from further down.
    """

    table: Table
    whole: bool
    first: int

    def where(self, index: int) -> str:
        """Name a row by its 0-based index, as far as that can be known."""
        return self.table.where(index) if index < self.first else f"{self.table.name}, a row further down"


def peek(path: Path, *, whole: bool = False, limit: int = WHOLE_BYTES, part: int = PART_BYTES) -> Peek:
    """Read a table, or blocks of it where it is larger than ``limit`` bytes.

    Args:
        path: The file.
        whole: Read all of it, whatever its size.
        limit: Largest size, unpacked, that is read whole.
        part: Bytes that are read of a larger file, about.

    Raises:
        DataError: If it is missing, empty or malformed.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[-2:-1] if packed else suffixes[-1:]) or [""]
    size = 0 if no_file(path) else path.stat().st_size  # `read_table` says what is wrong
    if not whole and size:
        try:
            if packed and kind[0] not in _PARQUET:
                return _packed(path, kind[0], limit, part) or _all(path)
            if kind[0] in _PARQUET and not packed:
                return _row_groups(path) or _all(path)
            if size > limit:
                return _blocks(path, kind[0], size, part)
        except (*BROKEN, *FAULTS) as error:
            raise DataError(f"{path} cannot be read ({reason(error)}); write the table again") from error
    return _all(path)


def _all(path: Path) -> Peek:
    table = read_table(path)
    return Peek(table, True, table.frame.height)


def _packed(path: Path, kind: str, limit: int, part: int) -> Peek | None:
    """Read the beginning of a gzipped file; None if that is all of it."""
    with gzip.open(path) as stream:
        raw = Capped(str(path), stream, path.stat().st_size).read(limit + 1)  # type: ignore[arg-type]
    return None if len(raw) <= limit else _part(path, kind, _complete(raw[:part]), b"")


def _blocks(path: Path, kind: str, size: int, part: int) -> Peek:
    with path.open("rb") as stream:
        head = stream.read(part // _BLOCKS)
        if kind not in _JSON and b'"' in head:
            # A quoted field may hold line breaks, so that a block further down has no certain beginning.
            return _part(path, kind, _complete(head + stream.read(part // 2)), b"")
        rest = []
        for number in range(1, _BLOCKS):
            stream.seek(size * number // _BLOCKS)
            block = stream.read(part // _BLOCKS)
            rest.append(block[block.find(b"\n") + 1 : block.rfind(b"\n") + 1])
    return _part(path, kind, head[: head.rfind(b"\n") + 1], b"".join(rest))


def _complete(raw: bytes) -> bytes:
    """Cut a beginning after its last row that is complete: a line end outside double quotes."""
    end = raw.rfind(b"\n")
    while end > 0 and raw.count(b'"', 0, end) % 2:
        end = raw.rfind(b"\n", 0, end)
    return raw[: end + 1]


def _part(path: Path, kind: str, head: bytes, rest: bytes) -> Peek:
    name = str(path)
    if not head.strip():
        raise DataError(f"{name}: its beginning holds no complete row; write the table again")
    separator = "," if kind == ".csv" else "\t"
    first = json_lines(name, head) if kind in _JSON else delimited(name, head, separator=separator)
    known = first.frame.height
    # Rows further down are for figures only: `llmrec check` reads the whole file and names what is wrong there.
    lines = rest.decode("utf-8", errors="replace").replace("\0", " ").encode().split(b"\n")
    if kind in _JSON:
        kept = [line for line in lines if _is_object(line)]
        more = json_lines(name, b"\n".join(kept)).frame if kept else first.frame.clear()
    else:
        header = head[: head.find(b"\n")]
        mark = next((each for each in (separator, ";", "\t", ",") if each.encode() in header), separator)
        names = first.frame.columns
        kept = [line for line in lines if line.count(mark.encode()) == len(names) - 1 and b'"' not in line]
        raw = b"\n".join(kept)
        more = delimited(name, raw, separator=mark, columns=names).frame if kept else first.frame.clear()
    frame = pl.concat([first.frame, more], how="diagonal").with_columns(pl.all().fill_null(""))
    return Peek(Table(name, frame, "", first.lines if more.is_empty() else None, first.header), False, known)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _row_groups(path: Path) -> Peek | None:
    """Read the first rows of row groups from all over a Parquet file; None if it is small enough to be read whole."""
    file = pq.ParquetFile(path)
    check_size(str(path), file, path.stat().st_size)
    rows, groups = file.metadata.num_rows, file.metadata.num_row_groups
    if rows <= WHOLE_ROWS:
        return None
    chosen = sorted({groups * number // _BLOCKS for number in range(_BLOCKS)})
    need = PART_ROWS // len(chosen)
    batches: list[pa.RecordBatch] = []
    for group in chosen:
        taken = 0
        for batch in file.iter_batches(batch_size=need, row_groups=[group]):
            batches.append(batch)
            taken += batch.num_rows
            if taken >= need:
                break
    table = from_arrow(str(path), pa.Table.from_batches(batches))
    return Peek(table, False, min(need, table.frame.height))
