"""Builds columns block by block with few bytes per row: ids as codes, numbers as floats."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from llmrec.data.read.codes import coded_column
from llmrec.data.read.tables import Table
from llmrec.data.read.typed import convert_to_floats

ColumnKind = Literal["id", "number", "text", "maybe"]
"""The kind of a column's values: ids that repeat in many rows, numbers, or texts that all differ.

``maybe`` columns are texts that an object may lack.
"""

_TEXT_TYPES = (pl.String, pl.Categorical, pl.Enum)


class NeedsExactReader(Exception):
    """Raised when a fast reader finds values that only the slower, exact reader handles."""


class NotNumeric(Exception):
    """Raised for a column that should be numeric but contains other values, such as dates."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Column:
    """The values of a column, added block by block."""

    def __init__(self, name: str, kind: ColumnKind) -> None:
        self.name, self.kind = name, kind
        self._categories = pl.Categorical(pl.Categories.random())
        # polars drops the categories of codes when no series uses them.
        self._alive = pl.Series([""], dtype=self._categories)
        self._blocks: list[NDArray[Any] | pl.Series] = []

    def add(self, values: pl.Series) -> None:
        """Append rows.

        Raises:
            NotNumeric: If the column should be numeric and a value is not a finite number.
        """
        if self.kind == "id" and (values.dtype in _TEXT_TYPES or values.dtype.is_integer()):
            values = values.cast(pl.String).fill_null("").cast(self._categories)
            self._blocks.append(values.to_physical().to_numpy())
        elif self.kind == "number" and (values.dtype.is_float() or values.dtype == pl.String):
            values = convert_to_floats(values)
            if values.null_count() or not values.is_finite().all():
                raise NotNumeric(self.name)
            self._blocks.append(values.to_numpy())
        else:
            self._blocks.append(values)

    def add_coded(self, values: pa.Array, numbers: pa.Array) -> None:
        """Append rows of an id column, as indices into a list of values; null counts as an empty text."""
        known = pl.concat([pl.Series(values).cast(pl.String), pl.Series([""])]).cast(self._categories)
        indices = numbers.fill_null(len(values)).to_numpy(zero_copy_only=False)
        self._blocks.append(known.to_physical().to_numpy()[indices])

    def series(self) -> pl.Series:
        """Return all rows as one series; id columns as codes.

        Raises:
            NeedsExactReader: If there are no rows, or blocks have different types.
        """
        blocks, self._blocks = self._blocks, []
        if not blocks:
            raise NeedsExactReader
        arrays = [block for block in blocks if isinstance(block, np.ndarray)]
        if len(arrays) < len(blocks):
            series = [block for block in blocks if isinstance(block, pl.Series)]
            if arrays or len({block.dtype for block in series}) > 1:
                raise NeedsExactReader
            return pl.concat(series, rechunk=True).alias(self.name)
        if self.kind == "number":
            return pl.Series(self.name, np.concatenate(arrays))
        present = np.zeros(max((int(block.max(initial=0)) for block in arrays), default=0) + 1, dtype=bool)
        for block in arrays:
            present[block] = True
        values = pl.Series(np.flatnonzero(present).astype(np.uint32)).cat.to(self._alive.dtype).cast(pl.String)
        code = (np.cumsum(present) - 1).astype(np.uint32)
        return coded_column(self.name, values, (code[block] for block in arrays))


def table_from_columns(
    name: str,
    names: Sequence[str],
    columns: Iterable[Column],
    sha256: str = "",
    *,
    lines: Sequence[Sequence[int]] = (),
    unusable: Mapping[str, str] | None = None,
) -> Table:
    """Return columns as a table, with the names of columns that were not read.

    Args:
        name: The file.
        names: All columns of the file.
        columns: The columns that were read.
        sha256: Hash of the file.
        lines: The line of each row, block by block; empty if row n is on line n.
        unusable: See `Table`.

    Raises:
        NeedsExactReader: If there are no rows, or blocks of a column have different types.
    """
    read = {column.name: column.series() for column in columns}
    rows = len(next(iter(read.values()), ()))
    if not rows:
        raise NeedsExactReader
    nothing = pl.repeat(None, rows, dtype=pl.Null, eager=True)
    frame = pl.DataFrame([read[column] if column in read else nothing.alias(column) for column in names])
    locations = row_location_table(name, lines)
    unread = frozenset(names) - read.keys()
    return Table(name, frame, sha256, locations.lines, locations.header, unusable=unusable or {}, unread=unread)


def row_location_table(name: str, lines: Sequence[Sequence[int]]) -> Table:
    """Return a table without columns, which locates rows for error messages.

    Args:
        name: The file.
        lines: The line of each row, block by block.
    """
    rows = 0
    gaps: set[int | None] = set()
    for block in lines:
        gaps.add(block.start - 1 - rows if isinstance(block, range) else None)
        rows += len(block)
    gap = next(iter(gaps), 0)
    if len(gaps) < 2 and gap is not None:
        return Table(name, pl.DataFrame(), header=gap)
    return Table(name, pl.DataFrame(), lines=array("q", (line for block in lines for line in block)))
