"""Flattens nested columns: ``user.id`` in an object, and ``lines[].sku`` in a list with one row per element."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from llmrec.display import shorten_text
from llmrec.errors import DataError

ELEMENT_SUFFIX = "[]"
"""Suffix of a list's name, for each of its elements."""
_ELEMENT_PATTERN = re.compile(r"\[\]")
# Maximum depth of objects and number of keys per object; an object with more keys is a mapping by id, not columns.
MAX_DEPTH, MAX_KEYS = 20, 200
OBJECTS, LISTS = "objects", "lists"


# --------------------------------------------------------------------------- names


def is_nested_path(name: str) -> bool:
    """Whether a name may be a path within a nested column, such as ``user.id``."""
    return "." in name or ELEMENT_SUFFIX in name


def top_level_column(name: str) -> str:
    """Return the top-level column of a path."""
    return name.partition(ELEMENT_SUFFIX)[0].partition(".")[0]


def leaf_name(name: str) -> str:
    """Return the last name of a path: ``sku`` of ``lines[].sku``, and ``skus`` of ``skus[]``."""
    return name.removesuffix(ELEMENT_SUFFIX).rpartition(".")[2] if is_nested_path(name) else name


def enclosing_lists(name: str) -> list[str]:
    """Return the lists on a path, outermost first."""
    return [name[: match.end()] for match in _ELEMENT_PATTERN.finditer(name)]


def readable_paths(name: str, kind: Any) -> Iterator[str]:
    """Yield the paths of readable values within a column of a given type."""
    if pa.types.is_struct(kind):
        for inner in kind:
            yield from readable_paths(f"{name}.{inner.name}", inner.type)
    elif _is_expandable_list(kind):
        yield from readable_paths(name + ELEMENT_SUFFIX, kind.value_type)
    elif is_plain_type(kind):
        yield name


# --------------------------------------------------------------------------- types


def is_plain_type(kind: Any) -> bool:
    """Whether a column can contain ids, numbers, times or texts."""
    types = pa.types
    if types.is_dictionary(kind) or _is_list_type(kind):
        return is_text_type(kind.value_type)
    tests = (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
    more = (types.is_string_view, types.is_timestamp, types.is_date, types.is_decimal128, types.is_null)
    return any(test(kind) for test in (*tests, *more))


def is_text_type(kind: Any) -> bool:
    """Whether a column has one text per row."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_readable_type(kind: Any) -> bool:
    """Whether a column has readable values, directly or within objects and lists."""
    if pa.types.is_struct(kind):
        return any(is_readable_type(inner.type) for inner in kind)
    return is_plain_type(kind) or _is_expandable_list(kind)


def _is_list_type(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_expandable_list(kind: Any) -> bool:
    """Whether a column has lists whose elements can become rows: objects, texts or integers."""
    if not _is_list_type(kind):
        return False
    inner = kind.value_type
    return is_readable_type(inner) if pa.types.is_struct(inner) else is_text_type(inner) or pa.types.is_integer(inner)


def describe_type(kind: Any) -> str:
    """Describe the values of a nested or unsupported column."""
    if is_readable_type(kind):
        return OBJECTS if pa.types.is_struct(kind) else LISTS
    return shorten_text(str(kind), 60)


# --------------------------------------------------------------------------- columns


@dataclass
class FlattenedColumns:
    """The columns of a file after its objects are flattened.

    Attributes:
        file: The file, for errors.
        columns: Columns with a plain value in each row, by path.
        lists: Columns with a list in each row, by path with `ELEMENT_SUFFIX`.
        unusable: Descriptions of the other columns.
    """

    file: str
    columns: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, Any] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, column: Any, depth: int = 0) -> None:
        """Add a column and the columns nested in it.

        Raises:
            DataError: If a path is the name of another column.
        """
        kind = column.type
        if pa.types.is_struct(kind) and depth <= MAX_DEPTH and kind.num_fields <= MAX_KEYS:
            for index, inner in enumerate(kind):
                self.add(f"{name}.{inner.name}", pc.struct_field(column, [index]), depth + 1)
            self.unusable[name] = describe_type(kind)
            return
        if _is_expandable_list(kind):
            self.lists[name + ELEMENT_SUFFIX] = column
        if not is_plain_type(kind):
            self.unusable[name] = describe_type(kind)
        elif name in self.columns:
            raise DataError.at(
                self.file,
                "duplicate",
                f": there are two columns {name!r}, one of them in a nested value; rename one column",
                name,
            )
        else:
            self.columns[name] = column


def flatten_columns(file: str, columns: Mapping[str, Any]) -> FlattenedColumns:
    """Flatten the Arrow columns of a file; see `FlattenedColumns`."""
    result = FlattenedColumns(file)
    for name, column in columns.items():
        result.add(name, column)
    return result


def arrow_to_polars(columns: Mapping[str, Any]) -> pl.DataFrame:
    """Return plain Arrow columns as a polars frame.

    Raises:
        pyarrow.ArrowException, ValueError: If a text is not UTF-8 or a column cannot be read.
    """
    table = pa.table([_strip_type_metadata(column) for column in columns.values()], names=list(columns))
    table.validate(full=True)  # Arrow does not check that texts are UTF-8
    return pl.DataFrame(pl.from_arrow(table))


def _strip_type_metadata(column: Any) -> Any:
    """Return a column without field names and metadata in its type, which may not be UTF-8."""
    kind = column.type
    return column.cast(pa.large_list(kind.value_type)) if _is_list_type(kind) else column
