"""Limits on the types and the decompressed sizes of files.

A path may name a pipe without a writer, an endless device or a circular link; a small compressed file may decompress to
more than the memory; a file may differ from its ending. All of these raise an error early.
"""

from __future__ import annotations

import codecs
import lzma
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from llmrec.display import shorten_text
from llmrec.errors import DataError, ErrorKind, Location, did_you_mean

MAX_BYTES = 8 * 2**30
"""Maximum decompressed size of a table; tables are held in memory as a whole."""
ALWAYS_ALLOWED_BYTES = 16 * 2**20
"""Decompressed bytes allowed for a file of any size."""
MAX_RATIO = 100
"""Decompressed size allowed beyond that, in file sizes: data rarely compresses more than 20 to 1, a bomb 1,000 to 1."""
ID_LIMIT = 1000
"""Maximum length of an id in characters; ids are copied unchanged into rows, results and reports."""
MAX_EXACT_INTEGER = 2**53
"""Largest integer up to which floats are exact; two larger ids can be the same float."""
MAX_MEMBERS = 100_000
"""Maximum number of files in an archive."""

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, RuntimeError)
"""Exceptions raised while reading a damaged or unreadable file."""

# First bytes of other file types, with their names and the fix.
_FILE_TYPES: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip file", "rename it to end in .gz"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "extract it, or save its sheet as CSV"),
    (b"PK\x05\x06", "an empty zip archive", "write the file again"),
    (b"PAR1", "a Parquet file", "rename it to end in .parquet"),
    (b"BZh", "compressed with bzip2", "decompress it, or use gzip"),
    (b"\xfd7zXZ", "compressed with xz", "decompress it, or use gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it, or use gzip"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "extract it"),
    (b"Rar!", "a RAR archive", "extract it"),
    (b"\xd0\xcf\x11\xe0", "an old spreadsheet or document", "save its sheet as CSV"),
    (b"%PDF", "a PDF file", "download or export the data as text"),
    (b"\x89PNG", "a picture", "check the path"),
    (b"\x7fELF", "a program", "check the path"),
    (b"SQLite format 3", "a database", "use sqlite:///FILE with data.query, or export its table as CSV"),
    (b"\x93NUMPY", "a NumPy array, which is never read", "write it as CSV or Parquet"),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file itself", "fetch the file with `git lfs pull`"),
    *((bytes((0x80, n)), "a Python pickle, which is never read", "write it as CSV or Parquet") for n in range(2, 6)),
)
_HTML_STARTS = (b"<!doctype html", b"<html")


# --------------------------------------------------------------------------- values in error messages


def format_error(error: BaseException) -> str:
    """Return the message of another library as one short line, to be quoted in an error."""
    return shorten_text(replace_unprintable(" ".join(str(error).split())), 200)


def has_invalid_characters(text: str) -> bool:
    """Whether a string has a NUL or a lone surrogate, which UTF-8 text cannot contain."""
    return "\0" in text or (not text.isascii() and any("\ud800" <= mark <= "\udfff" for mark in text))


def replace_unprintable(text: str) -> str:
    """Return a text with unprintable characters replaced."""
    return text if text.isprintable() else "".join(mark if mark.isprintable() else "\ufffd" for mark in text)


def format_value(value: object) -> str:
    """Return a value from a file in quotes, on one line, and shortened if it is long."""
    if isinstance(value, str) and len(value) > 80:
        value = value[:80] + "…"
    return shorten_text(repr(value), 100)


def format_names(names: Sequence[str]) -> str:
    """Return column names as text, truncated to what fits on one line."""
    result = ", ".join(name if name.isprintable() else repr(name) for name in (shorten_text(n, 60) for n in names[:40]))
    return shorten_text(result, 500) + (f" and {len(names) - 40} more" if len(names) > 40 else "")


# --------------------------------------------------------------------------- paths


_MISSING_REASONS = ("does not exist", "is a broken link")


def describe_file_problem(path: Path) -> str:
    """Return why a path is not a readable file; an empty text if it is readable."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return _MISSING_REASONS[path.is_symlink()]
    except (OSError, ValueError) as error:
        return f"cannot be read ({format_error(error)})"
    if stat.S_ISREG(mode):
        return ""
    return "is a folder, not a file" if stat.S_ISDIR(mode) else "is a pipe or a device, not a file"


def check_regular_file(path: Path, fix: str, what: str = "") -> None:
    """Check that a path is a regular file, since reading a pipe or device could block or never end.

    Args:
        path: The path.
        fix: The advice in the error.
        what: What the file is, for the error: ``the table of items``.

    Raises:
        DataError: If it is not a regular file.
    """
    problem = describe_file_problem(path)
    if problem:
        kind: ErrorKind = "missing-file" if problem in _MISSING_REASONS else "unreadable"
        hint = suggest_file_name(path) if problem == "does not exist" else ""
        raise DataError(f"{what} {path} {problem}{hint}; {fix}".lstrip(), kind=kind, at=path)


def suggest_file_name(path: Path) -> str:
    """Return a suggestion for the name of a missing file, as part of an error message."""
    try:
        return did_you_mean(path.name, [other.name for other in path.parent.iterdir()])
    except OSError:
        return f" (its folder {str(path.parent)!r} cannot be read either)"


def describe_wrong_format(head: bytes) -> str:
    """Return the type of a file that is not text, and how to fix it; empty if unknown."""
    for start, what, fix in _FILE_TYPES:
        if head.startswith(start):
            return f"this is {what}; {fix}"
    if head[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML_STARTS):
        return "this is a web page; download the file again, perhaps after logging in"
    return ""


def check_text_start(location: Location, head: bytes) -> None:
    """Reject a file that does not begin like UTF-8 text.

    Raises:
        DataError: With the type of the file.
    """
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError.at(location, "encoding", ": this looks like UTF-16; save the file as UTF-8")
    problem = describe_wrong_format(head[:100])
    if problem:
        raise DataError.at(location, "wrong-format", f": {problem}")


# --------------------------------------------------------------------------- sizes


class LimitedStream:
    """Stream that raises an error after more bytes than a file may contain."""

    def __init__(self, name: str, stream: BinaryIO, stored: int, limit: int | None = None) -> None:
        self._name, self._stream, self._stored = name, stream, stored
        roomy = max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * stored)
        self._limit = roomy if limit is None else min(limit, roomy)
        self._seen = 0

    def read(self, size: int = -1) -> bytes:
        """Read up to ``size`` bytes; all if it is negative.

        Raises:
            DataError: If there are too many.
        """
        return self._counted(self._stream.read(self._limit - self._seen + 1 if size < 0 else size))

    def readline(self, size: int = -1) -> bytes:
        """Read up to the end of a line; see `read`."""
        return self._counted(self._stream.readline(size))

    def _counted(self, raw: bytes) -> bytes:
        self._seen += len(raw)
        if self._seen > self._limit:
            raise DataError.at(
                self._name,
                "too-large",
                f" has {self._stored} bytes and decompresses to more than {self._limit} bytes, so it is malformed or "
                "too large; check its origin, or decompress or split it",
            )
        return raw


# --------------------------------------------------------------------------- archives


def list_archive_files(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the files of an archive after checking all its entries.

    Nothing is extracted to disk; still, an archive with a malicious entry is not the published one.

    Raises:
        DataError: If an entry is a link or leaves the archive, a name is repeated, or there are too many.
    """
    entries = archive.infolist()
    if len(entries) > MAX_MEMBERS:
        raise DataError.at(
            path, "too-large", f" contains {len(entries)} files, which is too many for a data set; check its origin"
        )
    for entry in entries:
        parts = entry.filename.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or parts[0].endswith(":"):
            raise DataError.at(
                path,
                "unsafe",
                f" contains {format_value(entry.filename)}, a path outside the archive; download the archive again",
            )
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise DataError.at(
                path,
                "unsafe",
                f" contains {format_value(entry.filename)}, which is a link, not a file; download the archive again",
            )
    names = Counter(entry.filename for entry in entries)
    repeated = next((name for name, count in names.items() if count > 1), None)
    if repeated is not None:
        raise DataError.at(
            path,
            "duplicate",
            f" contains two files called {format_value(repeated)}; create the archive again with one of them",
        )
    return [entry for entry in entries if not entry.is_dir()]
