"""Reads Parquet files, and the plain columns of Arrow tables."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmrec.data.read import limits
from llmrec.data.read.columns import Column, ColumnKind, NeedsExactReader, NotNumeric, table_from_columns
from llmrec.data.read.limits import format_error, format_value
from llmrec.data.read.nested import (
    arrow_to_polars,
    describe_type,
    flatten_columns,
    is_nested_path,
    is_plain_type,
    is_readable_type,
    is_text_type,
    top_level_column,
)
from llmrec.data.read.tables import Table, validate_column_names
from llmrec.data.read.typed import first_unsupported_date
from llmrec.durable import sha256_of
from llmrec.errors import DataError, LlmrecError
from llmrec.terminal import warn_once_logger

log = warn_once_logger(__name__)

PARQUET_ERRORS = (
    *(pa.ArrowException, pl.exceptions.PolarsError, OSError, MemoryError, ArithmeticError),
    *(LookupError, TypeError, ValueError, pl.exceptions.PanicException),
)
"""Exceptions that the libraries raise for a damaged file."""

ALWAYS_ALLOWED_BYTES = 2**30
"""Memory allowed for the table of a file of any size: repeated texts are stored once."""
# Rows decoded at a time: few enough to detect a long text that is repeated in all rows before memory runs out.
_BATCH_ROWS, _SMALL_BATCH_ROWS = 2048, 64
_FAST_BATCH_ROWS = 2**20
_LONG_ROW_BYTES = 4096
_MANY_ROWS = 10_000_000
_MAX_ROWS_PER_BYTE = 20


def parse_parquet(name: str, raw: bytes, sha256: str = "") -> Table:
    """Read a Parquet file.

    Raises:
        DataError: If it is not Parquet, is damaged, decompresses to far more than its size, or has no rows.
    """
    with open_parquet_file(name, raw) as file:
        table = _read_columns(name, file, len(raw))
    result = table_from_arrow(name, table, sha256)
    return replace(result, unusable={**unreadable_columns(file.schema_arrow), **result.unusable})


@contextmanager
def open_parquet_file(name: str, source: Path | bytes) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file.

    Args:
        name: Its name in errors.
        source: Its path, or its bytes.

    Raises:
        DataError: If it is not Parquet or is damaged, now or while it is read, or declares far too much data.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source)
        check_declared_size(name, file, len(source) if isinstance(source, bytes) else source.stat().st_size)
        yield file
    except PARQUET_ERRORS as error:
        raise DataError.at(
            name, "damaged", f" is not a Parquet file or is damaged ({format_error(error)}); write it again"
        ) from error


def check_declared_size(name: str, file: pq.ParquetFile, stored: int) -> None:
    """Check the sizes that the metadata of a file declares.

    Raises:
        DataError: If a column name is repeated, or it declares more rows or bytes than it can contain.
    """
    validate_column_names(name, file.schema_arrow.names)
    rows, groups = file.metadata.num_rows, range(file.metadata.num_row_groups)
    size = sum(file.metadata.row_group(group).total_byte_size for group in groups)
    if rows > max(_MANY_ROWS, _MAX_ROWS_PER_BYTE * stored) or size > max_decompressed_bytes(stored):
        raise DataError.at(
            name,
            "too-large",
            f" declares {rows} rows and {size} bytes in a file of {stored} bytes, so it is malformed or too large; "
            "write it again, or split it",
        )


def max_decompressed_bytes(stored: int) -> int:
    """Return the maximum number of decompressed bytes for a file of this size."""
    return min(limits.MAX_BYTES, max(ALWAYS_ALLOWED_BYTES, limits.MAX_RATIO * stored))


def _read_columns(name: str, file: pq.ParquetFile, stored: int) -> pa.Table:
    """Read the columns with readable values, without decoding the others."""
    schema = file.schema_arrow
    wanted = [field.name for field in schema if is_readable_type(field.type)]
    if not wanted:
        raise DataError.at(name, "empty", " has no columns of texts, numbers or times; add such columns")
    columns = wanted if len(wanted) < len(schema) else None
    first = next(file.iter_batches(batch_size=_SMALL_BATCH_ROWS, columns=columns), None)
    few = first is not None and first.nbytes > _LONG_ROW_BYTES * first.num_rows
    batches: list[pa.RecordBatch] = []
    size = 0
    for batch in file.iter_batches(batch_size=_SMALL_BATCH_ROWS if few else _BATCH_ROWS, columns=columns):
        size += batch.nbytes + sum(expanded_text_bytes(column) for column in batch.columns)
        if size > max_decompressed_bytes(stored):
            raise DataError.at(
                name,
                "too-large",
                f" has {stored} bytes and decompresses to more than {max_decompressed_bytes(stored)} bytes, so it is "
                "malformed or too large; write it again, or split it",
            )
        batches.append(batch)
    return pa.Table.from_batches(batches, batches[0].schema if batches else schema)


def read_plain_columns(path: Path, wanted: Mapping[str, ColumnKind]) -> Table | None:
    """Read plain columns of a Parquet file batch by batch; None if a column is not plain.

    Args:
        path: The file.
        wanted: The columns to keep, see `llmrec.data.read.delimited.read_delimited`.
    """
    try:
        digest = sha256_of(path)
        file = pq.ParquetFile(path)
        check_declared_size(str(path), file, path.stat().st_size)
        schema = file.schema_arrow
        # A requested path may be in a nested column.
        if any(
            is_nested_path(name) and top_level_column(name) in schema.names and name not in schema.names
            for name in wanted
        ):
            return None
        # Repeated texts are stored once; with a copy per row, a long text would exhaust the memory.
        coded = [field.name for field in schema if wanted.get(field.name) == "id" and is_text_type(field.type)]
        if any(is_text_type(field.type) for field in schema if wanted.get(field.name, "id") != "id"):
            return None
        file = pq.ParquetFile(path, read_dictionary=coded)
        columns = [Column(field.name, wanted[field.name]) for field in schema if field.name in wanted]
        if not columns or not all(is_plain_type(schema.field(column.name).type) for column in columns):
            return None
        size, most = 0, max_decompressed_bytes(path.stat().st_size)
        for batch in file.iter_batches(batch_size=_FAST_BATCH_ROWS, columns=[column.name for column in columns]):
            size += batch.nbytes
            for column in columns:
                values = batch.column(batch.schema.names.index(column.name))
                values.validate(full=True)
                size += expanded_text_bytes(values)
                if pa.types.is_dictionary(values.type) and column.kind == "id":
                    column.add_coded(values.dictionary, values.indices)
                else:
                    column.add(pl.Series(values))
            if size > most:
                return None
        plain = [field.name for field in schema if is_plain_type(field.type)]
        return table_from_columns(str(path), plain, columns, digest, unusable=unreadable_columns(schema, is_plain_type))
    except (NeedsExactReader, NotNumeric, LlmrecError, *PARQUET_ERRORS):
        return None


def expanded_text_bytes(column: Any) -> int:
    """Return the memory in bytes that texts would take with a copy per row; 0 if each row has a copy already."""
    if not pa.types.is_dictionary(column.type):
        return 0
    lengths = pc.binary_length(column.dictionary)
    return int(pc.sum(pc.take(lengths, column.indices)).as_py() or 0)


def table_from_arrow(name: str, table: Any, sha256: str = "") -> Table:
    """Convert an Arrow table to a `Table`; nested columns are named by their paths.

    Raises:
        DataError: If there are no rows, or a column name is repeated.
    """
    try:
        validate_column_names(name, table.column_names)
        result = flatten_columns(
            name,
            {
                column_name: table.column(column_name)
                for column_name in table.column_names
                if is_readable_type(table.schema.field(column_name).type)
            },
        )
        validate_column_names(name, result.columns)
        if not table.num_rows or not result.columns:
            raise DataError.at(
                name, "empty", " has no rows, or no columns of texts, numbers or times; write the table again"
            )
        frame = arrow_to_polars(result.columns)
        for column in result.lists.values():
            column.validate(full=True)
    except PARQUET_ERRORS as error:
        raise DataError.at(
            name,
            "bad-value",
            f" has a column of an unsupported type ({format_error(error)}); write columns of texts, numbers or times",
        ) from error
    odd = {column.name: row for column in frame if (row := first_unsupported_date(column)) is not None}
    for column, row in odd.items():
        log.warning(
            "%s: column %s is excluded, since it has a date outside the years 1 to 9999 in row %d",
            *(name, format_value(column), row + 1),
        )
    unsupported = dict.fromkeys(odd, "dates outside the years 1 to 9999")
    unusable = {**unreadable_columns(table.schema), **result.unusable, **unsupported}
    return Table(name, frame.drop(odd), sha256, unusable=unusable, lists=result.lists)


def unreadable_columns(schema: pa.Schema, reads: Callable[[Any], bool] = is_readable_type) -> dict[str, str]:
    """Return the columns of unreadable types, each with a description of its values."""
    return {field.name: describe_type(field.type) for field in schema if not reads(field.type)}
