"""Loads tables of users and data with explanations; `load_data` loads any source.

A source is an entry of `llmrec.registry.SOURCES`. Explanations have the format of XRec (Ma et al., EMNLP Findings
2024), in which a language model writes the profiles and explanations from real reviews.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl

from llmrec.data import dataset as filters
from llmrec.data.assemble import build_catalogue, build_dataset, build_provenance, user_profiles
from llmrec.data.dataset import PARTS, Dataset
from llmrec.data.knowledge import with_facts
from llmrec.data.read.columns import ColumnKind
from llmrec.data.read.databases import hub_name, is_database_url, is_hub_path, read_hub_dataset, read_query
from llmrec.data.read.files import InMemoryFile, expand_path, read_bytes
from llmrec.data.read.limits import format_value
from llmrec.data.read.objects import read_json_lines
from llmrec.data.read.sheets import split_sheet_name
from llmrec.data.read.table import is_pattern, matching_paths, read_table
from llmrec.data.read.tables import Table, concatenate_tables, expand_lists, find_column
from llmrec.data.read.typed import (
    id_column,
    most_frequent_texts,
    number_column,
    plain_text_column,
    text_column,
    time_column,
)
from llmrec.data.read.where import filter_rows
from llmrec.data.sets.pages import is_description_path
from llmrec.data.sets.published import load_published
from llmrec.data.split import count_holdouts_before_training
from llmrec.errors import DataError, LlmrecError
from llmrec.plugins import failed_plugin_error
from llmrec.recipe.schema import Columns, DataSection
from llmrec.registry import SOURCES, import_component, is_plugin
from llmrec.resources import resource
from llmrec.terminal import warn_once_logger
from llmrec.types import Item

log = warn_once_logger(__name__)


# --------------------------------------------------------------------------- a split given in a table

PART_SPELLINGS: Mapping[str, str] = {
    "train": "train",
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
    "test": "test",
}
"""Values of a column of parts, in lower case, and the parts that they mean."""
_SPLIT_KEY = "data.columns.split"


def parse_split_part(cell: str) -> str | None:
    """Return the part of the split (train, valid or test) that a cell names; None if unknown."""
    return PART_SPELLINGS.get(cell.strip().lower())


def parts_by_row(section: DataSection, table: Table) -> pl.Series | None:
    """Return the part of the split (train, valid, test) for every row; None if the split is not given.

    Args:
        section: The recipe's section.
        table: Its table, with the files of the parts concatenated.

    Raises:
        DataError: If nothing defines the held-out rows, a value is not a part, or training or test has no rows.
    """
    if section.split.kind != "given":
        return None
    if section.files is not None:
        named = [part for part in PARTS if getattr(section.files, part) is not None]
        sizes = zip(named, table.parts, strict=True)
        return pl.Series([PARTS.index(name) for name, part in sizes for _ in range(part.frame.height)], dtype=pl.Int8)
    column = find_column(table, section.columns.split, "split", _SPLIT_KEY)
    if column is None:
        raise DataError.at(
            table.name,
            "missing-column",
            f" has no column 'split', which data.split.kind=given requires; set {_SPLIT_KEY} to the column with the "
            "values train, valid and test, set data.files to one file per split, or choose another kind",
            "split",
        )
    names = text_column(table, column).str.strip_chars().str.to_lowercase()
    parts = names.replace_strict({word: PARTS.index(part) for word, part in PART_SPELLINGS.items()}, default=None)
    _check_split_parts(table, column, parts)
    return parts.cast(pl.Int8)


def _check_split_parts(table: Table, column: str, parts: pl.Series) -> None:
    unknown = parts.is_null().arg_true()
    if unknown.len():
        row = unknown[0]
        raise DataError.at(
            table.where(row),
            "bad-value",
            f": column {column!r} has {format_value(table.frame[column][row])}, which is not the name of a split "
            f"({unknown.len()} rows); write {', '.join(PART_SPELLINGS)}",
            column,
        )
    for part in ("train", "test"):
        if not (parts == PARTS.index(part)).any():
            raise DataError.at(
                table.name,
                "too-few",
                f": no row of column {column!r} has {part!r}; a given split requires rows for training and for test, "
                "so correct the column, or choose another data.split.kind",
                column,
            )


def split_provenance(parts: pl.Series, frame: pl.DataFrame) -> dict[str, str]:
    """Return the provenance entries of a given split, and warn if its parts overlap in time.

    Args:
        parts: The result of `parts_by_row`.
        frame: The interactions, with ``user_id`` and, if available, ``timestamp``.
    """
    sizes = ", ".join(f"{name} {int((parts == index).sum())}" for index, name in enumerate(PARTS))
    notes = []
    if not (parts == PARTS.index("valid")).any():
        notes.append("there is no validation split, so nothing can be tuned")
    train, test = (frame.filter(parts == PARTS.index(name)) for name in ("train", "test"))
    if "timestamp" in frame.columns and (early := count_holdouts_before_training(train, test)):
        notes.append(
            f"{early} of {test.height} test rows are earlier than a training row of their user, so histories contain "
            "later interactions and next-item metrics are not meaningful",
        )
        log.warning("data.split.kind=given: %s", notes[-1])
    return {"split": sizes, **({"notes": "; ".join(notes)} if notes else {})}


def load_data(section: DataSection, *, seed: int) -> Dataset:
    """Load any source and apply the filters of the recipe.

    Args:
        section: The recipe's ``data`` or ``reviews``.
        seed: The run's seed, used only by sources with random choices.

    Raises:
        RecipeError: If the source is missing, or its description is invalid.
        DataError: If the data or documents are missing or malformed, or the filters leave fewer than 2 items.
    """
    source = (
        load_published
        if is_description_path(section.source)
        else import_component(SOURCES, section.source, "data source", key="data.source")
    )
    section = resolve_data_paths(section)
    try:
        result = source(section, seed=seed)
    except LlmrecError:
        raise
    except Exception as error:
        if not is_plugin(SOURCES, section.source):
            raise
        raise failed_plugin_error(
            f"data.source: the plug-in {section.source!r}", error, section.source, "data.source"
        ) from error
    if not isinstance(result, Dataset):
        raise DataError(
            f"data.source: {section.source!r} returned a {type(result).__name__}; a source must return a "
            "llmrec.data.dataset.Dataset",
            kind="defect",
            at=section.source,
            column="data.source",
        )
    dataset = filters.filter_dataset(result, section.filter)
    if len(dataset.items) < 2:
        raise DataError(
            f"{dataset.name}: the filter leaves one item; a recommender requires at least 2, so relax data.filter",
            kind="too-few",
            column="data.filter",
        )
    return with_facts(dataset, section.facts)


def resolve_data_paths(section: DataSection) -> DataSection:
    """Return a data section with existing paths, searched also in the folder LLMREC_DATA."""
    folder = os.environ.get("LLMREC_DATA")
    if not folder:
        return section

    def under(path: str | None) -> str | None:
        if path is None or split_sheet_name(Path(path))[0].exists():
            return path
        result = Path(folder) / path
        found = split_sheet_name(result)[0].exists() or (is_pattern(result) and matching_paths(result))
        return str(result) if found else path

    files = section.files
    if files is not None:
        files = files.model_copy(update={part: under(getattr(files, part)) for part in PARTS})
    facts = section.facts and section.facts.model_copy(update={"path": under(section.facts.path)})
    tables = {key: under(getattr(section, key)) for key in ("path", "items", "users")}
    return section.model_copy(update={**tables, "files": files, "facts": facts})


def load_table(section: DataSection, *, seed: int) -> Dataset:
    """Load a CSV, TSV, JSON Lines or Parquet table, or a data set from the Hugging Face hub.

    With ``data.split.kind: given``, a column of the table, or one file per part, defines what is held out.

    Raises:
        DataError: If a file, column or row cannot be used; the message names it.
        MissingExtra: If a hub data set is requested and ``datasets`` is not installed.
    """
    main = _read_interactions(section)
    columns = section.columns
    user = find_column(main, columns.user, "user_id", "data.columns.user") or ""
    item = find_column(main, columns.item, "item_id", "data.columns.item") or ""
    rating = find_column(main, columns.rating, "rating", "data.columns.rating")
    time = find_column(main, columns.time, "timestamp", "data.columns.time")
    text = find_column(main, columns.text, "text", "data.columns.text")
    item_ids = id_column(main, item)
    user_ids = id_column(main, user)
    series = {"user_id": user_ids, "item_id": item_ids}
    if rating is not None:
        series["rating"] = number_column(main, rating, "rating")
    if time is not None:
        series["timestamp"] = time_column(main, time, columns.dates)
    if text is not None:
        series["text"] = plain_text_column(main, text)
    listed, people = (
        None if path is None else expand_lists(_read_file_or_hub(path), _named_columns(columns))
        for path in (section.items, section.users)
    )
    frame, parts = pl.DataFrame(series), parts_by_row(section, main)
    return build_dataset(
        section,
        main,
        frame,
        build_catalogue(section, main, item_ids, listed),
        name=_dataset_name(section),
        users=user_profiles(section, main, user_ids, people),
        parts=parts,
        provenance=build_provenance(
            "table",
            (main, listed, people),
            rows=main.frame.height,
            licence="see the owner of the table",
            more={
                **({"where": section.filter.where} if section.filter.where is not None else {}),
                **(split_provenance(parts, frame) if parts is not None else {}),
            },
        ),
    )


def read_listed_items(section: DataSection) -> dict[str, Item]:
    """Return the `Item` of every row of the table of items, also without interactions.

    Args:
        section: A section of the source `table` with a table of items.

    Raises:
        DataError: If a file or column cannot be used; the message names it.
    """
    main = _read_interactions(section)
    listed = expand_lists(_read_file_or_hub(section.items or ""), _named_columns(section.columns))
    item_ids = id_column(main, find_column(main, section.columns.item, "item_id", "data.columns.item") or "")
    return build_catalogue(section, main, item_ids, listed, complete=True)


def _read_interactions(section: DataSection) -> Table:
    """Return the interaction rows that the recipe keeps, from one table or from the files of a given split."""
    if section.files is not None:
        named = [path for part in PARTS if (path := getattr(section.files, part)) is not None]
        return concatenate_tables([_read_filtered_rows(path, section) for path in named])
    if section.path is None:
        raise DataError(
            "source 'table' needs a file; set data.path=FILE or data.path=hf://NAME[:SPLIT]",
            kind="missing-key",
            column="data.path",
        )
    return _read_filtered_rows(section.path, section)


def _read_filtered_rows(path: str, section: DataSection) -> Table:
    where = section.filter.where
    if is_database_url(path) or section.query is not None:
        result = _run_query(path, section.query)
    else:
        result = _read_file_or_hub(path, _wanted_columns(section.columns) if where is None else None)
    result = expand_lists(result, _named_columns(section.columns))
    return result if where is None else filter_rows(result, where)


def _run_query(path: str, query: str | None) -> Table:
    if not is_database_url(path) or query is None:
        lacks = f"data.path={path} is not a database" if query is not None else f"data.path={path} is a database"
        raise DataError(
            f"{lacks}: to read a database, set sqlite:///FILE, duckdb:///FILE or postgresql://USER@HOST/NAME as "
            "data.path, and a SELECT as data.query",
            kind="missing-key" if query is None else "contradiction",
            column="data.query",
        )
    return read_query(path, query)


def _named_columns(columns: Columns) -> tuple[str | None, ...]:
    """Return the names of the columns set in a recipe."""
    single = (columns.user, columns.item, columns.rating, columns.time, columns.title, columns.text, columns.split)
    return (*single, *columns.fields, *columns.user_fields)


def _wanted_columns(columns: Columns) -> dict[str, ColumnKind]:
    """Return the columns to read: columns named in the recipe, and columns with a default name."""
    fields: dict[str, ColumnKind] = dict.fromkeys((*columns.fields, *columns.user_fields), "id")
    return fields | {
        columns.user or "user_id": "id",
        columns.item or "item_id": "id",
        columns.title or "title": "id",
        columns.split or "split": "id",
        columns.rating or "rating": "number",
        columns.time or "timestamp": "number",
        columns.text or "text": "text",
    }


def _dataset_name(section: DataSection) -> str:
    """Return the name of a data set, derived from the file, folder or hub name."""
    path = section.path or (section.files.train if section.files else "")
    path = split_sheet_name(Path(path))[0].name if not is_database_url(path) and "#" in path else path
    if is_hub_path(path):
        return hub_name(path)
    name = Path(path).absolute().parent.name if section.files else Path(path).name.split(".")[0]
    return name or "table"


def _read_file_or_hub(path: str, wanted: Mapping[str, ColumnKind] | None = None) -> Table:
    return read_hub_dataset(path) if is_hub_path(path) else read_table(expand_path(path), wanted)


_EXPLANATION_COLUMNS = ("uid", "iid", "title", "user_summary", "item_summary", "explanation")


def load_explanations(section: DataSection, *, seed: int) -> Dataset:
    """Load a JSON Lines file, gzipped or plain, with the keys of `_EXPLANATION_COLUMNS`.

    Texts are the explanations; the text about an item is its field ``about``, that about a user the profile ``taste``.
    There are no ratings and no timestamps, so file order is time order.

    Raises:
        DataError: If the file is missing or damaged, a key is missing, or a row is invalid.
    """
    if section.path is None:
        raise DataError(
            "source 'explanations' needs a file of JSON Lines; set data.path=FILE",
            kind="missing-key",
            column="data.path",
        )
    if section.items is not None or section.columns != Columns():
        raise DataError(
            "source 'explanations' has fixed columns and titles; remove data.items and data.columns",
            kind="contradiction",
            column="data.columns",
        )
    path = expand_path(section.path)
    raw, sha256 = read_bytes(path)
    main = replace(read_json_lines(InMemoryFile(str(path), raw)), sha256=sha256)
    absent = [name for name in _EXPLANATION_COLUMNS if name not in main.frame.columns]
    if absent:
        raise DataError.at(
            main.name,
            "missing-column",
            f" has no {absent[0]!r}; this source reads rows with the keys {', '.join(_EXPLANATION_COLUMNS)}. Use "
            "source 'table' and data.columns for other tables",
            absent[0],
        )
    users, items = id_column(main, "uid"), id_column(main, "iid")
    series = text_column(main, "explanation")
    titles, about = most_frequent_texts(main, items, "title"), most_frequent_texts(main, items, "item_summary")
    return build_dataset(
        section,
        main,
        pl.DataFrame({"user_id": users, "item_id": items, "text": series.set(series.str.strip_chars() == "", None)}),
        {
            item: Item(item_id=item, title=titles.get(item, item), fields={"about": about.get(item, "")})
            for item in items.unique()
        },
        name="explanations",
        users={user: {"taste": taste} for user, taste in most_frequent_texts(main, users, "user_summary").items()},
        provenance=build_provenance(
            "explanations",
            [main],
            rows=main.frame.height,
            licence="see the owner of the file",
            more={
                "derived": "profiles of users and items and the explanations, written by a language model from "
                "reviews; profiles may have been written from held-out reviews too"
            },
        ),
    )


# --------------------------------------------------------------------------- the included synthetic reviews


def load_made_reviews(section: DataSection, *, seed: int) -> Dataset:
    """Load the included synthetic reviews: 120 users, 40 products, about 1,400 reviews with texts.

    Products have ``category``, ``brand`` and ``price``.

    Raises:
        DataError: If the recipe sets a path or columns, which this source defines itself.
    """
    if section.path is not None or section.items is not None or section.columns != Columns():
        raise DataError(
            "source 'made-reviews' is included in llmrec; drop data.path, data.items and data.columns",
            kind="contradiction",
            column="data",
        )
    path = resource("recipes", "made", "reviews.csv")
    settings = {
        "path": str(path),
        "columns": Columns(fields=("category", "brand", "price")),
        "rating_scale": section.rating_scale or (1.0, 5.0),
        "noun": section.noun if section.noun != DataSection.model_fields["noun"].default else "kitchen products",
    }
    dataset = load_table(section.model_copy(update=settings), seed=seed)
    provenance = {**dataset.provenance, "source": "made-reviews", "made": "yes", "licence": "the licence of llmrec"}
    return replace(dataset, name="made-reviews", provenance=provenance)
