"""Packed tables: one table in gzip, bzip2, xz, zstd or a zip archive, unpacked in memory and under a cap."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmrec.data.read import limits
from llmrec.data.read.limits import BROKEN, Capped, archived, enumerated, printable, reason
from llmrec.errors import DataError

STREAMS: Mapping[str, Callable[[Any], Any]] = {
    ".gz": lambda stored: gzip.GzipFile(fileobj=stored),
    ".bz2": lambda stored: bz2.BZ2File(stored),
    ".xz": lambda stored: lzma.LZMAFile(stored),  # noqa: SIM115 - who opens it closes it
    ".zst": lambda stored: pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), "zstd"),
}
"""How files that are packed by themselves are opened, by ending."""
_BLOCK = 4 * 2**20
PACKED = (*STREAMS, ".zip")
"""Endings of packed files."""


def unpack(name: str, stored: bytes, ending: str = ".gz", limit: int | None = None) -> bytes:
    """Unpack a file that is packed by itself, with a cap on the size.

    Args:
        name: What errors call it.
        stored: The packed bytes.
        ending: Of the file: how it is packed.
        limit: Most bytes that may come out; `limits.MAX_BYTES` by default.

    Raises:
        DataError: If it is damaged or larger than it can be expected to be.
    """
    try:
        with STREAMS[ending](io.BytesIO(stored)) as stream:
            return _all_of(Capped(name, stream, len(stored), limit or limits.MAX_BYTES))
    except (*BROKEN, pa.ArrowException) as error:
        kind = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}[ending]
        raise DataError.at(name, "damaged", f" is damaged {kind} ({reason(error)}); pack it again") from error


def _all_of(stream: Capped) -> bytes:
    """Read a stream to its end, a block at a time: room for all that might come is never asked for."""
    return b"".join(iter(partial(stream.read, _BLOCK), b""))


def only_member(path: Path, stored: bytes, endings: tuple[str, ...]) -> tuple[str, bytes]:
    """Return the name and the bytes of the only table in a zip archive.

    Args:
        path: The archive, for errors.
        stored: Its bytes.
        endings: Of tables.

    Raises:
        DataError: If there is no table or several, or the archive is damaged or plays tricks.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(stored)) as archive:
            entries = [each for each in archived(path, archive) if not each.filename.startswith("__MACOSX/")]
            tables = [each for each in entries if Path(each.filename).suffix.lower() in endings]
            if len(tables) != 1:
                names = enumerated([each.filename for each in (tables or entries)]) or "nothing"
                raise DataError.at(
                    path,
                    "ambiguous" if tables else "missing-file",
                    f" holds {'several tables' if tables else 'no table'} ({names}); unpack it and name the file as "
                    "data.path",
                )
            (entry,) = tables
            with archive.open(entry) as stream:
                capped = Capped(f"{path}/{printable(entry.filename)}", stream, entry.compress_size, limits.MAX_BYTES)  # type: ignore[arg-type]
                return entry.filename, _all_of(capped)
    except (*BROKEN, ValueError) as error:
        raise DataError.at(
            path, "damaged", f" is no zip archive that can be read ({reason(error)}); pack it again"
        ) from error
