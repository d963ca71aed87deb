"""Reads a table in any format, by its extension: a file, compressed or not, or all files of a folder or pattern."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from llmrec.data.read import limits
from llmrec.data.read.columns import ColumnKind
from llmrec.data.read.databases import detect_database_url
from llmrec.data.read.delimited import DelimitedReader, read_delimited
from llmrec.data.read.files import (
    COMPRESSED_ENDINGS,
    JSON_ENDINGS,
    PARQUET_ENDINGS,
    PATH_ADVICE,
    HashedFile,
    InMemoryFile,
    Source,
    extract_zipped_table,
    read_bytes,
)
from llmrec.data.read.limits import check_regular_file, replace_unprintable
from llmrec.data.read.objects import object_blocks, object_records, read_json_file, read_json_lines
from llmrec.data.read.parquet import parse_parquet, read_plain_columns
from llmrec.data.read.sheets import SPREADSHEET_ENDINGS, read_sheet, split_sheet_name
from llmrec.data.read.tables import Table, concatenate_tables
from llmrec.data.read.text import TextFormat, read_in_any_encoding
from llmrec.errors import DataError, Location

ATOMIC_ENDINGS = (".inter", ".item", ".user")
"""Endings of RecBole's files, whose header gives the types of the columns."""
_ATOMIC_KINDS = (":token", ":float", ":token_seq", ":float_seq")
SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".psv": "|", **dict.fromkeys(ATOMIC_ENDINGS, "\t")}
_TABLE_ENDINGS = (*SEPARATORS, *JSON_ENDINGS, *PARQUET_ENDINGS)
# Bytes examined to estimate the number of rows, and the peak memory per row.
_HEAD_BYTES, _ROW_BYTES = 2**16, 100


def read_table(path: Path, wanted: Mapping[str, ColumnKind] | None = None) -> Table:
    """Read a CSV, TSV, JSON or Parquet file, compressed or not, or all files of a folder or pattern as one table.

    Text that is not UTF-8 is read as UTF-16 or Windows-1252 if it seems to be one of them, with a warning.

    Args:
        path: The file, the folder or the pattern.
        wanted: The needed columns, where they exist, with the kinds of their values; others may be only listed by name.
            None: all columns.

    Raises:
        DataError: If it is missing, empty or malformed.
    """
    if path.is_dir() or is_pattern(path):
        return _read_several_files(path, wanted)
    path, sheet = split_sheet_name(path)
    check_regular_file(path, PATH_ADVICE)
    kind, packing = _split_extensions(path)
    name = str(path)
    if kind in SPREADSHEET_ENDINGS and not packing:
        raw, sha256 = read_bytes(path)
        return read_sheet(path, raw, sha256, sheet)
    if packing == ".zip":
        stored, sha256 = read_bytes(path)
        inner, raw = extract_zipped_table(path, stored, _TABLE_ENDINGS)
        kind, member = Path(inner).suffix.lower(), f"{name}/{replace_unprintable(inner)}"
        if kind in PARQUET_ENDINGS:
            return parse_parquet(member, raw, sha256)
        return replace(_read_text_table(InMemoryFile(member, raw), kind, wanted), sha256=sha256)
    if kind not in _TABLE_ENDINGS and (url := detect_database_url(path)) is not None:
        raise DataError.at(
            name, "wrong-format", f": this is a database; set data.path={url}, and data.query to a SELECT", "data.path"
        )
    if kind not in _TABLE_ENDINGS:
        raise DataError.at(
            name,
            "wrong-format",
            f": files that end in {repr(kind) if kind else 'nothing'} are not tables; use a file that ends in "
            f"{', '.join(sorted((*_TABLE_ENDINGS, *SPREADSHEET_ENDINGS)))}",
        )
    if kind in PARQUET_ENDINGS:
        if wanted is not None and not packing and (table := read_plain_columns(path, wanted)) is not None:
            return table
        raw, sha256 = read_bytes(path)
        return parse_parquet(name, raw, sha256)
    if wanted is not None and not packing and kind != ".json":
        check_memory(path)
    source = HashedFile(path, packing, limit=limits.MAX_BYTES if wanted is None or kind == ".json" else None)
    table = _read_text_table(source, kind, wanted)
    return replace(table, sha256=source.sha256)


def _read_text_table(source: Source, kind: str, wanted: Mapping[str, ColumnKind] | None) -> Table:
    """Read delimited text or JSON objects, by file extension."""
    if kind == ".json":
        return read_json_file(source)
    if kind in JSON_ENDINGS:
        return read_json_lines(source, wanted)
    form = TextFormat(kind="delimited", separator=SEPARATORS[kind], quoted=True)
    if kind in ATOMIC_ENDINGS and wanted is not None:
        wanted = {f"{name}{ending}": values for name, values in wanted.items() for ending in ("", *_ATOMIC_KINDS)}
    table = read_in_any_encoding(source, lambda source: read_delimited(source, form, wanted))
    return strip_column_types(table) if kind in ATOMIC_ENDINGS else table


# --------------------------------------------------------------------------- files of published data sets


def read_blocks(source: Source, form: TextFormat, wanted: Mapping[str, ColumnKind]) -> Iterator[Table]:
    """Read columns of a published file, in blocks of rows.

    Args:
        source: The file.
        form: Its format.
        wanted: The columns, with the kinds of their values. Delimited text gives texts for numbers too.

    Raises:
        DataError: If the file is damaged or empty, lacks a column, or a line cannot be read.
    """
    if form.kind == "delimited":
        yield from DelimitedReader(source, form).blocks(wanted)
    else:
        yield from object_blocks(source, form, wanted)


def read_column_names(source: Source, form: TextFormat) -> tuple[str, ...]:
    """Return the column names of a published delimited file.

    Raises:
        DataError: If the file is missing, damaged or empty.
    """
    return form.columns or DelimitedReader(source, form).read_header()


def read_records(
    source: Source, form: TextFormat, columns: Sequence[str]
) -> Iterator[tuple[Location, Mapping[str, object]]]:
    """Yield the rows of a published file, each with its location and its values by column.

    Raises:
        DataError: As `read_blocks`.
    """
    if form.kind != "delimited":
        yield from object_records(source, form)
        return
    for block in read_blocks(source, form, dict.fromkeys(columns, "text")):
        for index, row in enumerate(block.frame.iter_rows(named=True)):
            yield block.where(index), row


# --------------------------------------------------------------------------- several files


def find_atomic_file(path: Path, ending: str) -> Path | None:
    """Return the RecBole file with this extension next to the file of interactions; None if it is missing.

    Args:
        path: The file of interactions, or of a part of them (``NAME.train.inter``); or the folder with one, or with one
            that has the folder's name.
        ending: ``.inter``, ``.item`` or ``.user``.
    """
    result = sorted(path.glob("*.inter")) if path.is_dir() else [path]
    result = [file for file in result if path.is_dir() and file.stem == path.absolute().name] or result
    if len(result) != 1 or result[0].suffix.lower() != ".inter":
        return None
    file = result[0] if ending == ".inter" else result[0].with_name(result[0].name.split(".")[0] + ending)
    return file if file.is_file() else None


def is_pattern(path: Path) -> bool:
    """Whether a path is a pattern such as ``part-*.csv``; a file with exactly that name takes precedence."""
    return glob.has_magic(str(path)) and not split_sheet_name(path)[0].exists()


def matching_paths(pattern: Path) -> list[Path]:
    """Return the paths that match a pattern, sorted by name."""
    start = Path(pattern.anchor)
    return sorted(start.glob(str(pattern.relative_to(start))) if pattern.anchor else Path().glob(str(pattern)))


def _split_extensions(path: Path) -> tuple[str, str]:
    """Return the format extension and the compression extension of a path."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED_ENDINGS else ""
    return (suffixes[-1] if suffixes else ""), packing


def strip_column_types(table: Table) -> Table:
    """Return a RecBole table without the types in its column names; other tables unchanged."""
    columns = table.frame.columns
    if not all(name.endswith(_ATOMIC_KINDS) for name in columns):
        return table
    bare = {name: name.rpartition(":")[0] for name in columns}
    return replace(table, frame=table.frame.rename(bare), unread=frozenset(bare[name] for name in table.unread))


def _read_several_files(path: Path, wanted: Mapping[str, ColumnKind] | None) -> Table:
    """Read the tables of a folder or pattern as one table, in the order of their names."""
    result = sorted(path.iterdir()) if path.is_dir() else matching_paths(path)
    if (events := find_atomic_file(path, ".inter")) is not None:
        result = [events]  # other tables are about items and users
    shown = [file for file in result if file.is_file() and not file.name.startswith((".", "_"))]
    files = [file for file in shown if not {*_TABLE_ENDINGS, ".zip"}.isdisjoint(_split_extensions(file))]
    if not files:
        what = "is a folder with" if path.is_dir() else "matches"
        raise DataError.at(
            path, "missing-file", f" {what} no table; provide files that end in {', '.join(sorted(_TABLE_ENDINGS))}"
        )
    tables = [read_table(file, wanted) for file in files]
    if len(tables) == 1:
        return tables[0]
    digest = hashlib.sha256("".join(table.sha256 for table in tables).encode()).hexdigest()
    return replace(concatenate_tables(tables), name=str(path), sha256=digest)


def check_memory(path: Path) -> None:
    """Reject a table whose estimated number of rows exceeds the memory.

    Raises:
        DataError: With both sizes.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        rows = path.stat().st_size * max(1, head.count(b"\n")) / max(1, len(head))
    except OSError:
        return  # reading the file reports why
    needed, free = rows * _ROW_BYTES, psutil.virtual_memory().available
    if needed > free:
        raise DataError.at(
            path,
            "too-large",
            f" seems to have {rows / 1e6:,.0f} million rows, which require about {needed / 2**30:.1f} GiB of memory "
            f"to read and split; {free / 2**30:.1f} GiB are free. Keep fewer rows, or use a larger machine",
            "data.path",
        )
