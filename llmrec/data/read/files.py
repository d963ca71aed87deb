"""Opens files as streams, plain, compressed or in an archive, without extracting them to disk."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, cast

import pyarrow as pa

from llmrec.data.read import limits
from llmrec.data.read.limits import (
    READ_ERRORS,
    LimitedStream,
    check_regular_file,
    format_error,
    format_names,
    format_value,
    list_archive_files,
    replace_unprintable,
)
from llmrec.durable import sha256_of
from llmrec.errors import DataError

DECOMPRESSORS: Mapping[str, Callable[[Any], Any]] = {
    ".gz": lambda stored: gzip.GzipFile(fileobj=stored),
    ".bz2": lambda stored: bz2.BZ2File(stored),
    ".xz": lambda stored: lzma.LZMAFile(stored),  # noqa: SIM115 - who opens it closes it
    ".zst": lambda stored: pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), "zstd"),
}
"""Functions that open single compressed files, by ending."""
COMPRESSED_ENDINGS = (*DECOMPRESSORS, ".zip")
"""Endings of compressed files."""
JSON_LINES_ENDINGS = (".jsonl", ".ndjson")
"""Endings of files with one JSON object per line."""
JSON_ENDINGS = (".json", *JSON_LINES_ENDINGS)
"""Endings of files with JSON objects."""
PARQUET_ENDINGS = (".parquet", ".pq")
"""Endings of Parquet files."""
PATH_ADVICE = "check data.path, data.items and data.users"
"""Advice in errors about a missing or unreadable file."""
_COMPRESSION_NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_BLOCK = 4 * 2**20


class Source(Protocol):
    """A file that can be opened repeatedly."""

    @property
    def name(self) -> str:
        """Name of the file in errors."""
        ...

    @property
    def published(self) -> bool:
        """Whether errors advise the user to download the file again."""
        ...

    def open(self) -> AbstractContextManager[Any]:
        """Open the file for reading, decompressed."""
        ...


# --------------------------------------------------------------------------- paths


def expand_path(text: str) -> Path:
    """Return a path of a recipe with ``~`` expanded to the home folder.

    Raises:
        DataError: If it cannot be a path.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # unknown user: the file of that name will be reported as missing
        path = Path(text)
    try:
        path.exists()
    except OSError as error:
        raise DataError(
            f"{format_value(text)} cannot be a path ({format_error(error)}); {PATH_ADVICE}",
            kind="bad-value",
            at=text,
        ) from error
    return path


# --------------------------------------------------------------------------- user files


class HashedFile:
    """A user's file, decompressed and hashed while it is read.

    Attributes:
        name: The path, for errors.
        sha256: Hash of the file as stored, after it was read to its end.
    """

    published = False

    def __init__(self, path: Path, packing: str = "", *, limit: int | None = None, fix: str = PATH_ADVICE) -> None:
        """Prepare to read a file.

        Args:
            path: The file.
            packing: Its compression, as an ending; empty if it is not compressed.
            limit: Maximum decompressed bytes.
            fix: The advice in the error if it cannot be read.
        """
        self.name, self.sha256 = str(path), ""
        self._path, self._packing, self._limit, self._fix = path, packing, limit, fix

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open the file for reading, decompressed.

        Raises:
            DataError: If it is unreadable, damaged or too large.
        """
        packing = self._packing
        try:
            size = self._path.stat().st_size
            if self._limit is not None and size > self._limit:
                raise DataError.at(
                    self.name, "too-large", f" has {size} bytes, more than {self._limit}; split the file"
                )
            with self._path.open("rb") as file:
                hashed = _HashingReader(file)
                if packing and not size:
                    raise DataError.at(self.name, "empty", " is empty; write the table again")
                if packing:
                    with DECOMPRESSORS[packing](hashed) as stream:
                        yield LimitedStream(self.name, stream, size, self._limit)
                else:
                    yield hashed
                while hashed.read(2**16):
                    pass
                self.sha256 = hashed.digest.hexdigest()
        except (*READ_ERRORS, pa.ArrowException) as error:
            if packing and getattr(error, "errno", None) is None:
                raise _damaged_error(self.name, packing, error) from error
            raise DataError.at(
                self.name, "unreadable", f" cannot be read ({format_error(error)}); {self._fix}"
            ) from error


@dataclass(frozen=True)
class InMemoryFile:
    """Bytes in memory instead of a file."""

    name: str
    raw: bytes
    published: bool = False

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open the bytes for reading."""
        yield io.BytesIO(self.raw)


class _HashingReader(io.RawIOBase):
    """File object that hashes what is read from it; closing it does not close the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        """Read and hash bytes."""
        raw = self._file.read(size)
        self.digest.update(raw)
        return raw

    def readable(self) -> bool:
        """Whether the file can be read: always."""
        return True


def read_bytes(path: Path) -> tuple[bytes, str]:
    """Return the decompressed bytes of a file, and the SHA-256 of the stored file.

    Raises:
        DataError: If it is missing, not a file, unreadable, empty, damaged or too large.
    """
    check_regular_file(path, PATH_ADVICE)
    packing = path.suffix.lower() if path.suffix.lower() in DECOMPRESSORS else ""
    stored = HashedFile(path, packing, limit=limits.MAX_BYTES)
    with stored.open() as stream:
        raw = read_to_end(stream)
    if not raw:
        raise DataError.at(path, "empty", " is empty; write the table again")
    return raw, stored.sha256


# --------------------------------------------------------------------------- compressed files


def _damaged_error(name: str, packing: str, error: BaseException) -> DataError:
    return DataError.at(
        name, "damaged", f" is damaged {_COMPRESSION_NAMES[packing]} ({format_error(error)}); compress it again"
    )


def read_to_end(stream: Any) -> bytes:
    """Read a stream to its end in blocks, so that memory grows only with the data."""
    return b"".join(iter(partial(stream.read, _BLOCK), b""))


def extract_zipped_table(path: Path, stored: bytes, endings: tuple[str, ...]) -> tuple[str, bytes]:
    """Return the name and bytes of the only table in a zip archive.

    Args:
        path: The archive, for errors.
        stored: Its bytes.
        endings: Endings of tables.

    Raises:
        DataError: If there is no table or several, or the archive is damaged or malicious.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(stored)) as archive:
            entries = [file for file in list_archive_files(path, archive) if not file.filename.startswith("__MACOSX/")]
            tables = [entry for entry in entries if Path(entry.filename).suffix.lower() in endings]
            if len(tables) != 1:
                names = format_names([entry.filename for entry in (tables or entries)]) or "nothing"
                raise DataError.at(
                    path,
                    "ambiguous" if tables else "missing-file",
                    f" contains {'several tables' if tables else 'no table'} ({names}); extract the archive and set "
                    "data.path to the file",
                )
            (entry,) = tables
            with archive.open(entry) as stream:
                name = f"{path}/{replace_unprintable(entry.filename)}"
                capped = LimitedStream(name, stream, entry.compress_size, limits.MAX_BYTES)  # type: ignore[arg-type]
                return entry.filename, read_to_end(capped)
    except (*READ_ERRORS, ValueError) as error:
        raise DataError.at(
            path, "damaged", f" is not a readable zip archive ({format_error(error)}); create the archive again"
        ) from error


# --------------------------------------------------------------------------- files of published data sets


@dataclass(frozen=True)
class DataFile:
    """A file in a folder or in an archive.

    Attributes:
        name: Its name in errors.
        path: The file itself, or the archive.
        inner: Its name in the archive; None outside an archive.
    """

    name: str
    path: Path
    inner: str | None = None
    published = True

    @property
    def plain(self) -> str:
        """The file name without ``.gz``, and with ``.json`` for all extensions of JSON Lines."""
        return normalise_file_name(PurePosixPath(self.inner).name if self.inner is not None else self.path.name)

    @property
    def folder(self) -> str:
        """The folder that contains the file."""
        return str(PurePosixPath(self.inner).parent) if self.inner is not None else str(self.path.parent)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file for reading, decompressed.

        Raises:
            DataError: If it is missing, unreadable or damaged, now or while it is read.
        """
        packed = (self.inner or self.path.name).lower().endswith(".gz")
        check_regular_file(self.path, "check data.path and data.items")
        size = self.path.stat().st_size

        def limited(stream: Any, stored: int) -> BinaryIO:
            stream = gzip.GzipFile(fileobj=stream) if packed else stream
            return cast(BinaryIO, LimitedStream(self.name, stream, stored))

        try:
            if self.inner is None:
                with self.path.open("rb") as file:
                    yield limited(file, size) if packed else file
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.inner) as stream:
                    yield limited(stream, min(size, archive.getinfo(self.inner).compress_size))
        except READ_ERRORS as error:
            raise DataError.at(
                self.name,
                "damaged",
                f" cannot be read completely ({format_error(error)}); the file is damaged or truncated, so download "
                "it again",
            ) from error

    @property
    def sha256(self) -> str:
        """Hash of the stored file; for a file in an archive, hash of the archive."""
        try:
            return sha256_of(self.path)
        except OSError as error:
            raise DataError.at(
                self.path, "unreadable", f" cannot be read ({format_error(error)}); check data.path"
            ) from error


def split_gz_ending(path: Path) -> tuple[str, bool]:
    """Return the ending of a file name without ``.gz``, in lower case, and whether the name ends in ``.gz``."""
    packed = path.suffix.lower() == ".gz"
    return (Path(path.stem) if packed else path).suffix.lower(), packed


def normalise_file_name(name: str) -> str:
    """Return a file name without ``.gz``, and with ``.json`` for all extensions of JSON Lines."""
    name = name[:-3] if name.lower().endswith(".gz") else name
    for ending in JSON_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)] + ".json"
    return name


def list_files(root: Path) -> list[DataFile]:
    """Return the files of a folder, or of a zip archive including its subfolders, sorted by name.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        if root.is_dir():
            return [DataFile(str(path), path) for path in sorted(root.iterdir())]
        check_regular_file(root, "check data.path")
        with zipfile.ZipFile(root) as archive:
            names = [entry.filename for entry in list_archive_files(root, archive)]
    except (*READ_ERRORS, ValueError) as error:
        raise DataError.at(
            root, "damaged", f" is not a readable folder or zip archive ({format_error(error)}); download it again"
        ) from error
    shown = [name for name in sorted(names) if not name.startswith("__MACOSX/")]
    return [DataFile(f"{root}/{replace_unprintable(name)}", root, name) for name in shown]
