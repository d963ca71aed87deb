"""Accepts data frames in memory: writes them as Parquet files to the run folder, to be read like other tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.data.read.limits import format_error
from llmrec.durable import replace_atomically
from llmrec.errors import DataError, LlmrecError, RecipeError
from llmrec.recipe.schema import Recipe

FRAME_FOLDER = "data"
"""Subfolder of a run folder for frames."""
_FRAME_NAMES: Mapping[str, str] = {"path": "interactions", "items": "items"}


def with_frames(recipe: Recipe, folder: Path, data: Any = None, items: Any = None) -> Recipe:
    """Write data frames to a folder, and return a recipe that reads them.

    Equal frames give equal files, so that a later run of the same recipe reuses the results of an earlier one.

    Args:
        recipe: The recipe; its ``data.path`` and ``data.items`` are replaced, and its source must be ``table``.
        folder: The run folder.
        data: Interactions: a pandas or polars frame, an Arrow table, a `datasets.Dataset`, any other object with
            ``__arrow_c_stream__``, a list of dictionaries, or a dictionary of columns; None: as in the recipe.
        items: One row per item, in any of these types; None: as in the recipe.

    Raises:
        RecipeError: If the recipe's source is not a table, or the recipe names one file per part.
        DataError: If a frame has an unsupported type, or a column cannot be written.
    """
    if data is None and items is None:
        return recipe
    section = recipe.data
    if section.source != "table" or section.files is not None:
        what = "data.files names files" if section.files is not None else f"it is {section.source!r}"
        raise RecipeError(
            f"data.source: a data frame was passed, but {what}; set data.source=table and drop the keys of other "
            "sources",
            kind="contradiction",
            column="data.source",
        )
    frames = {"path": data, "items": items}
    changed = {key: str(write_frame(frame, folder, key)) for key, frame in frames.items() if frame is not None}
    return recipe.model_copy(update={"data": section.model_copy(update=changed)})


@contextmanager
def temporary_frame_folder() -> Iterator[tuple[Path, Callable[[str], str]]]:
    """Yield a temporary folder for data frames, and a function that restores frame names in error messages.

    Raises:
        LlmrecError: Those of the block, with frame names.
    """
    with TemporaryDirectory() as folder, restore_frame_names(Path(folder)) as named:
        yield Path(folder), named


@contextmanager
def restore_frame_names(folder: Path) -> Iterator[Callable[[str], str]]:
    """Yield a function that replaces the names of temporary files in error messages by frame names.

    Raises:
        LlmrecError: Those of the block, with frame names.
    """

    def named(text: str) -> str:
        for name in _FRAME_NAMES.values():
            text = re.sub(rf"\S*{re.escape(folder.name)}/(?:{FRAME_FOLDER}/)?{name}\.parquet", f"{name} frame", text)
        return text

    try:
        yield named
    except LlmrecError as error:
        at = None if error.location is None else replace(error.location, file=named(error.location.file))
        raise type(error)(named(str(error)), kind=error.kind, at=at, column=error.column) from None


def write_frame(frame: Any, folder: Path, key: str) -> Path:
    """Write a data frame as the table of ``data.path`` or ``data.items``, and return its file.

    Raises:
        DataError: If it is not a frame, or a column cannot be written.
    """
    target = folder / FRAME_FOLDER / f"{_FRAME_NAMES[key]}.parquet"
    table = as_arrow(frame, f"{_FRAME_NAMES[key]} frame")
    with replace_atomically(target) as draft:
        pq.write_table(table, draft)
    return target


def as_arrow(frame: Any, name: str) -> Any:
    """Return a data frame as an Arrow table.

    Args:
        frame: See `with_frames`.
        name: Its name in messages.

    Raises:
        DataError: If it is not a frame, or a column has values of several types.
    """
    if isinstance(frame, list | Mapping) and not frame:
        raise DataError(f"{name}: the data frame is empty; provide rows", kind="empty", at=name)
    try:
        if isinstance(frame, list):
            return _table_from_dictionaries(frame)
        if isinstance(frame, Mapping):
            return pa.table(dict(frame))
        if hasattr(frame, "with_format") and hasattr(frame, "features"):
            # A `datasets.Dataset` stores its selection and order of rows separately from its table.
            return frame.with_format("arrow")[:]
        if type(frame).__module__.partition(".")[0] == "pandas":
            # An unnamed index only has the row positions of a filtered frame, which are not data.
            return pa.Table.from_pandas(frame, preserve_index=None if frame.index.name else False)
        if hasattr(frame, "__arrow_c_stream__") or isinstance(frame, pa.Table | pa.RecordBatch):
            return _with_text_categories(pa.table(frame))
    except (pa.ArrowException, AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"{name}: a column has values of several types ({format_error(error)}); make all its values texts, or "
            "all numbers",
            kind="bad-value",
            at=name,
        ) from error
    raise DataError(
        f"{name}: {type(frame).__module__}.{type(frame).__name__} is not a data frame; use a pandas or polars frame, "
        "an Arrow table, a datasets.Dataset, a list of dictionaries, or the path of a file in the recipe",
        kind="wrong-format",
        at=name,
    )


def convert_like(frame: Any, table: Any) -> Any:
    """Convert an Arrow table to the type of a given data frame."""
    if isinstance(frame, list):
        return table.to_pylist()
    if isinstance(frame, Mapping):
        return table.to_pydict()
    library = type(frame).__module__.partition(".")[0]
    if library == "pandas":
        return table.to_pandas()
    if library == "polars":
        return pl.from_arrow(table)
    if library == "datasets":
        return type(frame)(table)
    return table


def _with_text_categories(table: Any) -> Any:
    """Return a table with categorical columns as texts, in a type that Parquet supports."""
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type) and pa.types.is_string_view(field.type.value_type):
            chunks = [
                pa.DictionaryArray.from_arrays(part.indices, part.dictionary.cast(pa.large_string()))
                for part in table.column(index).chunks
            ]
            kind = pa.dictionary(field.type.index_type, pa.large_string())
            table = table.set_column(index, field.name, pa.chunked_array(chunks, kind))
    return table


def _table_from_dictionaries(rows: list[Any]) -> Any:
    """Return dictionaries as a table with all their keys as columns; missing values are null."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})
