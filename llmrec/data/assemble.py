"""Builds a `Dataset` from a table of interactions and a table of items: checks, titles and additional fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from llmrec.data.dataset import PARTS, Dataset, GivenSplit, conform_to_schema
from llmrec.data.hashing import digest_strings
from llmrec.data.read.codes import PAIR_COLUMNS, duplicate_indices, pair_codes, values_and_codes
from llmrec.data.read.files import DataFile
from llmrec.data.read.limits import ID_LIMIT, check_regular_file, format_names, format_value
from llmrec.data.read.markup import has_markup, remove_markup
from llmrec.data.read.nested import leaf_name
from llmrec.data.read.table import read_table
from llmrec.data.read.tables import Table, check_usable, check_users_match, find_column
from llmrec.data.read.typed import check_unique_ids, id_column, most_frequent_texts, text_column
from llmrec.errors import DataError, did_you_mean
from llmrec.recipe.schema import Columns, DataSection
from llmrec.terminal import warn_once_logger
from llmrec.types import Item

log = warn_once_logger(__name__)

_ROW, _PART = "_row", "_part"
# Values that tables write for a missing user, and the share of rows above which a warning is given for such a user.
_UNKNOWN_USERS = ("na", "n/a", "nan", "null", "none", "nil", "unknown", "undefined", "anonymous", "guest", "-", "?")
_LARGE_SHARE, _MIN_USERS = 0.2, 20
# Ids with surrounding spaces or non-ASCII characters, which can look like another id.
_LOOKALIKE_PATTERN = r"^\s|\s$|[^\x00-\x7f]"


def build_dataset(
    section: DataSection,
    table: Table,
    interactions: pl.DataFrame,
    items: Mapping[str, Item],
    *,
    name: str,
    provenance: Mapping[str, str],
    users: Mapping[str, Mapping[str, str]] | None = None,
    noun: str = "items",
    scale: tuple[float, float] | None = None,
    parts: pl.Series | None = None,
) -> Dataset:
    """Check interactions, join them with their items, and return them as a `Dataset`.

    Args:
        section: The recipe's section.
        table: The table that the interactions were read from, whose rows are named in errors.
        interactions: Columns of `llmrec.data.dataset.SCHEMA`; optional ones may be missing.
        items: Entries by item id; those without an interaction are dropped.
        name: Short name of the data.
        provenance: See `Dataset`.
        users: Profiles by user id; those without an interaction are dropped.
        noun: The source's name for its items, used if the recipe sets none.
        scale: The source's rating scale; that of the recipe takes precedence; without either it is taken from the data.
        parts: The index of each row's part in `PARTS`, if the source has its own split.

    Raises:
        DataError: If a pair is repeated, a rating is off the scale, an item has no entry, or there is only one item.
    """
    frame = conform_to_schema(interactions).with_row_index(_ROW)
    frame = frame.with_columns(pl.lit(0, pl.Int8).alias(_PART) if parts is None else parts.alias(_PART))
    _check_id_lengths(table, frame)
    _warn_of_placeholders(table, frame)
    _warn_of_lookalikes(table, frame)
    frame = _resolve_duplicates(section, table, frame)
    _check_items_known(table, frame, items)
    scale = _declared_rating_scale(section, table, frame, scale)
    kept = frame["item_id"].unique().cast(pl.String)
    if kept.len() < 2:
        raise DataError.at(
            table.name, "too-few", f": there is only one item, {format_value(kept[0])}; a recommender needs at least 2"
        )
    default = DataSection.model_fields["noun"].default
    present = set(frame["user_id"].unique())
    return Dataset(
        name=name,
        noun=noun if section.noun == default else section.noun,
        interactions=frame.drop(_ROW, _PART),
        items={item_id: items[item_id] for item_id in kept.sort()},
        users={user: fields for user, fields in sorted((users or {}).items()) if user in present},
        rating_scale=scale,
        provenance=provenance,
        given=GivenSplit(_pairs_in_part(frame, "valid"), _pairs_in_part(frame, "test")) if parts is not None else None,
    )


def check_column_settings(section: DataSection, source: str, *keys: str) -> None:
    """Reject keys of ``data.columns`` that do not apply to a source with fixed columns.

    Args:
        section: The recipe's section.
        source: Name of the source.
        keys: The keys that apply.
    """
    if section.columns != Columns(**{key: getattr(section.columns, key) for key in keys}):
        raise DataError(
            f"data.columns: source {source!r} has fixed columns; set only {', '.join(keys)}, or use source 'table'",
            kind="contradiction",
            column="data.columns",
        )


def build_provenance(
    source: str,
    files: Iterable[DataFile | Table | None],
    *,
    rows: int | str,
    licence: str,
    more: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, str]:
    """Return the provenance of data that were read from files; see `Dataset`.

    Args:
        source: Name of the source.
        files: The files or tables; None for one that does not exist.
        rows: Number of interactions.
        licence: Terms of the data.
        more: Further entries.
        notes: What users need to know about results.
    """
    read = [member for member in files if member is not None]
    return {
        "source": source,
        "path": "; ".join(member.name for member in read),
        "sha256": "; ".join(dict.fromkeys(member.sha256 for member in read)),
        "rows": str(rows),
        "made": "no",
        "licence": licence,
        **(more or {}),
        **({"notes": "; ".join(notes)} if notes else {}),
    }


def _pairs_in_part(frame: pl.DataFrame, part: str) -> frozenset[tuple[str, str]]:
    return frozenset(frame.filter(pl.col(_PART) == PARTS.index(part)).select(PAIR_COLUMNS).iter_rows())


def _check_id_lengths(table: Table, frame: pl.DataFrame) -> None:
    for column in PAIR_COLUMNS:
        names, row_codes = values_and_codes(frame[column])
        long = (names.str.len_chars() > ID_LIMIT).to_numpy()
        if long.any():
            row = int(long[row_codes].argmax())
            text = names[int(row_codes[row])]
            raise DataError.at(
                table.where(row),
                "too-large",
                f": the {column.removesuffix('_id')} is {format_value(text)}, {len(text)} characters long; "
                f"an id has at most {ID_LIMIT}, so correct the row",
                column,
            )


def _warn_of_placeholders(table: Table, frame: pl.DataFrame) -> None:
    """Warn if a user id probably means "unknown user", such as "guest" or an id with a large share of the rows."""
    names, row_codes = values_and_codes(frame["user_id"])
    sizes = pl.DataFrame({"user_id": names, "count": np.bincount(row_codes, minlength=len(names))})
    sizes = sizes.filter(pl.col("count") > 0)
    unknown = pl.col("user_id").str.to_lowercase().is_in(_UNKNOWN_USERS)
    large = (pl.col("count") > _LARGE_SHARE * frame.height) & (sizes.height >= _MIN_USERS)
    for user, count in sizes.filter(unknown | large).sort("count", descending=True).iter_rows():
        log.warning(
            "%s: user %s has %d of %d rows; if this ID stands for unknown users, remove these rows, or use another "
            "column for the user",
            *(table.name, format_value(user), count, frame.height),
        )


def _warn_of_lookalikes(table: Table, frame: pl.DataFrame) -> None:
    """Warn of ids that differ only in surrounding spaces, invisible characters or Unicode composition."""
    for column in PAIR_COLUMNS:
        names, row_codes = values_and_codes(frame[column])
        odd = names.filter(names.str.contains(_LOOKALIKE_PATTERN))
        seen = odd.str.replace_all(r"\p{Cf}", "").str.normalize("NFC").str.strip_chars()
        plain = names.filter(names.is_in(seen.implode())) if len(odd) else odd
        pairs = pl.DataFrame({"name": pl.concat([odd, plain]), "seen": pl.concat([seen, plain])}).unique()
        if pairs["seen"].n_unique() == pairs.height:
            continue
        # The categories of a column may include values that do not occur.
        pairs = pairs.filter(pl.col("name").is_in(names.gather(np.unique(row_codes)).implode()))
        pairs = pairs.filter(pl.len().over("seen") > 1).sort("seen", "name")
        if not pairs.is_empty():
            what = column.removesuffix("_id")
            log.warning(
                "%s: the ids of %d %ss differ only in surrounding spaces or invisible characters, such as %s and %s; "
                "if they mean the same, write them identically",
                *(table.name, pairs.height, what, ascii(pairs["name"][0]), ascii(pairs["name"][1])),
            )


def _resolve_duplicates(section: DataSection, table: Table, frame: pl.DataFrame) -> pl.DataFrame:
    if section.duplicates == "keep_all":
        return frame
    indices = duplicate_indices(pair_codes(frame["user_id"], frame["item_id"]))
    if not len(indices):
        return frame
    repeats = frame[indices]
    again = repeats.filter(~pl.struct(PAIR_COLUMNS).is_first_distinct())
    if section.duplicates == "error":
        row, part, user, item = again.select(_ROW, _PART, *PAIR_COLUMNS).row(0)
        first = repeats.filter((pl.col("user_id") == user) & (pl.col("item_id") == item)).row(0, named=True)
        location = table.where(first[_ROW])
        where = f"row {location.row}" if not table.parts else str(location)
        names, kept = "", "the latest of each"
        if first[_PART] != part:
            names = f", in the splits {PARTS[first[_PART]]} and {PARTS[part]}"
            kept = "test before valid before train, and the latest within a split"
        raise DataError.at(
            table.where(row),
            "duplicate",
            f" repeats user {format_value(user)} with item {format_value(item)} of {where}{names} "
            f"({again.height} such rows); drop the repeats, or set data.duplicates=keep_last to keep {kept}",
        )
    # Held-out rows take precedence, then the latest row; with equal or missing timestamps, the last one in the file.
    early = section.duplicates == "keep_first"
    ordered = repeats.sort(_PART, "timestamp", _ROW, descending=[False, early, early])
    selected = ordered.unique(subset=PAIR_COLUMNS, keep="last", maintain_order=True)
    keep = np.ones(frame.height, dtype=bool)
    keep[indices] = False
    keep[selected[_ROW].to_numpy()] = True
    rows = frame.filter(keep)
    return _sum_duplicate_ratings(table, frame, rows) if section.duplicates == "sum" else rows


def _sum_duplicate_ratings(table: Table, frame: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Sum the ratings of rows with the same user, item and part of the split."""
    if frame["rating"].null_count() == frame.height:
        raise DataError.at(
            table.name,
            "contradiction",
            " has no ratings to sum; set data.columns.rating to the column of quantities, or data.duplicates=keep_last",
            "data.duplicates",
        )
    key = [*PAIR_COLUMNS, _PART]
    sums = frame.group_by(key).agg(pl.col("rating").sum())
    joined = rows.drop("rating").join(sums, on=key, how="left", maintain_order="left")
    return joined.select(rows.columns)


def _check_items_known(table: Table, frame: pl.DataFrame, items: Mapping[str, Item]) -> None:
    names, row_codes = values_and_codes(frame["item_id"])
    missing = np.array([item not in items for item in names.to_list()], dtype=bool)[row_codes]
    if missing.any():
        absent = frame["item_id"].filter(missing).unique(maintain_order=True)
        row = frame[_ROW][int(missing.argmax())]
        raise DataError.at(
            table.where(row),
            "unknown-name",
            f": item {format_value(absent[0])} is not in the table of items ({len(absent)} items are missing); add the "
            "item, or drop its rows",
            "item_id",
        )


def _declared_rating_scale(
    section: DataSection, table: Table, frame: pl.DataFrame, scale: tuple[float, float] | None
) -> tuple[float, float] | None:
    """Return the rating scale set in the recipe or by the source; None if it is not set, see `scale_of`."""
    named = section.rating_scale or scale
    if named is None or frame["rating"].drop_nulls().is_empty():
        return None
    low, high = named
    if section.rating_scale is not None and not low < high:
        raise DataError(
            f"data.rating_scale is ({low:g}, {high:g}); write the lowest rating first",
            kind="bad-value",
            column="data.rating_scale",
        )
    off = frame.filter((pl.col("rating") < low) | (pl.col("rating") > high))
    if not off.is_empty():
        row, rating = off.select(_ROW, "rating").row(0)
        raise DataError.at(
            table.where(row),
            "bad-value",
            f": the rating {rating:g} is outside the scale from {low:g} to {high:g}; correct the row, or set "
            "data.rating_scale=[lowest, highest]",
            "rating",
        )
    return float(low), float(high)


@dataclass(frozen=True)
class _EntityTable:
    """A table with one item or user per row, and the id of each row."""

    table: Table
    keys: pl.Series
    unique: bool
    first: bool = False

    def column(self, name: str) -> dict[str, str]:
        """Return the text of a column by id, without HTML; if rows differ, the most frequent or last text."""
        if not self.unique:
            result = most_frequent_texts(self.table, self.keys, name)
        else:
            values = text_column(self.table, name)
            rows = (self.keys.reverse(), values.reverse()) if self.first else (self.keys, values)
            result = dict(zip(*rows, strict=True))
        return {key: remove_markup(text) for key, text in result.items()}


def build_catalogue(
    section: DataSection, interactions: Table, item_ids: pl.Series, items: Table | None, *, complete: bool = False
) -> dict[str, Item]:
    """Return the `Item` of every item that has interactions.

    A column is taken from the item table or, if it is missing there, from the interactions. Items missing in the item
    table have no entry.

    Args:
        section: The recipe's section.
        interactions: The table of interactions.
        item_ids: The item of each of its rows.
        items: The table of items, if any.
        complete: Also return the entries of the other items of that table.

    Raises:
        DataError: If a column is in neither table, an item is listed twice, or no item has a title.
    """
    listings = [_EntityTable(interactions, item_ids, False)]
    known = item_ids.unique(maintain_order=True).to_list()
    if items is not None:
        listing = _entity_table(section, items, "item")
        listings.insert(0, listing)
        listed = set(listing.keys)
        known = list(dict.fromkeys(listing.keys)) if complete else [item for item in known if item in listed]
    fields = {
        name: _table_with_column(listings, name, "data.columns.fields=[...]").column(name)
        for name in section.columns.fields
    }
    titles = _item_titles(section, listings, known)
    return {
        item: Item(
            item_id=item,
            title=titles.get(item, item),
            fields={name: values.get(item, "") for name, values in fields.items()},
        )
        for item in known
    }


def user_profiles(
    section: DataSection, interactions: Table, user_ids: pl.Series, users: Table | None
) -> dict[str, dict[str, str]]:
    """Return the profile fields ``data.columns.user_fields`` by user, without empty values.

    A column is taken from the user table or, if it is missing there, from the interactions.

    Args:
        section: The recipe's section.
        interactions: The table of interactions.
        user_ids: The user of each of its rows.
        users: The table of users, if any.

    Raises:
        DataError: If a column is in neither table, or a user is listed twice.
    """
    listings = [_EntityTable(interactions, user_ids, False)]
    if users is not None:
        listings.insert(0, _entity_table(section, users, "user"))
        if section.columns.user_fields:
            check_users_match(users.name, listings[0].keys, user_ids)
    result: dict[str, dict[str, str]] = {}
    for name in section.columns.user_fields:
        values = _table_with_column(listings, name, "data.columns.user_fields=[...]").column(name)
        for user, value in values.items():
            if value.strip():
                result.setdefault(user, {})[name] = value
    return result


def _entity_table(section: DataSection, listed: Table, kind: Literal["item", "user"]) -> _EntityTable:
    named = getattr(section.columns, kind)
    # The item of an order is lines[].sku; in a product table it is sku.
    if named not in listed.frame.columns and leaf_name(named) in listed.frame.columns:
        named = leaf_name(named)
    column = find_column(listed, named, f"{kind}_id", f"data.columns.{kind}") or ""
    keys = id_column(listed, column)
    if section.duplicates == "error":
        fix = "drop the repeats, or set data.duplicates=keep_last to keep the last of each"
        check_unique_ids(listed, column, keys, kind, fix)
    return _EntityTable(listed, keys, True, section.duplicates == "keep_first")


def _table_with_column(listings: list[_EntityTable], column: str, setting: str) -> _EntityTable:
    for listing in listings:
        if column in listing.table.frame.columns:
            return listing
    for listing in listings:
        check_usable(listing.table, column, setting.partition("=")[0])
    columns = [name for listing in listings for name in listing.table.frame.columns]
    raise DataError(
        f"{' and '.join(listing.table.name for listing in listings)}: there is no column "
        f"{column!r}{did_you_mean(column, columns)}; the columns are: {format_names(columns)}. Correct {setting} in "
        "the recipe",
        kind="missing-column",
        at=listings[0].table.name,
        column=column,
    )


def _item_titles(section: DataSection, listings: list[_EntityTable], known: list[str]) -> Mapping[str, str]:
    """Return titles by item; empty if the source has no titles, so that ids are used instead.

    An id also replaces a title that is blank or HTML, after a warning with their number.
    """
    column = section.columns.title or "title"
    for listing in listings:
        check_usable(listing.table, column, "data.columns.title")
    if section.columns.title is None and not any(column in listing.table.frame.columns for listing in listings):
        return {}
    listing = _table_with_column(listings, column, "data.columns.title=NAME")
    titles = listing.column(column)
    blank = [item for item in known if not titles.get(item, "").strip()]
    if len(blank) == len(known):
        raise DataError.at(
            listing.table.name,
            "missing-value",
            f": no item has a title in column {column!r}; name another column as data.columns.title, or give the items "
            "titles",
            column,
        )
    if blank:
        log.warning(
            "%d of %d items have no title in column %r of %s, such as %s; their ids are shown instead, which contain "
            "little information for a language model",
            *(len(blank), len(known), column, listing.table.name, format_value(blank[0])),
        )
        titles = dict(titles) | dict(zip(blank, blank, strict=True))
    scraped = [item for item in known if has_markup(titles[item])]
    if scraped:
        log.warning(
            "%d of %d items have HTML instead of a title in column %r of %s, such as %s; their ids are shown "
            "instead, which contain little information for a language model",
            *(len(scraped), len(known), column, listing.table.name, format_value(titles[scraped[0]])),
        )
    return titles | dict(zip(scraped, scraped, strict=True))


def write_items(items: Mapping[str, Item], path: Path) -> None:
    """Write a catalogue in the format of `read_items`: item_id, title and one column per field."""
    names = sorted({name for item in items.values() for name in item.fields} - {"item_id", "title"})
    columns: dict[str, list[str | None]] = {
        "item_id": list(items),
        "title": [item.title for item in items.values()],
        **{name: [item.fields.get(name) for item in items.values()] for name in names},
    }
    pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String)).write_parquet(path)


def read_items(path: Path) -> dict[str, Item]:
    """Read a table with the columns ``item_id`` and ``title``; every other column is a field.

    An item with a blank title stays in the table; code that needs its text checks for this.

    Raises:
        DataError: If the file cannot be read, a column is missing, or an id is repeated.
    """
    check_regular_file(path, "check --items", "the table of items")
    table = read_table(path)
    columns = table.frame.columns
    for name in ("item_id", "title"):
        if name in table.unusable:
            raise DataError.at(
                table.name, "bad-value", f": column {name!r} contains {table.unusable[name]}; write it as texts", name
            )
        if name not in columns:
            raise DataError.at(
                table.name,
                "missing-column",
                f" has no column {name!r}{did_you_mean(name, columns)}; its columns are: {format_names(columns)}. "
                "Rename the column that contains it",
                name,
            )
    item_ids = id_column(table, "item_id")
    check_unique_ids(table, "item_id", item_ids, "item", "keep one of each")
    fields = {name: text_column(table, name).to_list() for name in columns if name not in ("item_id", "title")}
    return {
        item: Item(item_id=item, title=title, fields={name: values[row] for name, values in fields.items()})
        for row, (item, title) in enumerate(zip(item_ids, text_column(table, "title"), strict=True))
    }


def digest_items(items: Mapping[str, Item]) -> str:
    """Return a SHA-256 over ids, titles and fields, independent of the order of items."""
    return digest_strings(
        part
        for item_id, item in sorted(items.items())
        for part in (item_id, item.title, *(text for pair in sorted(item.fields.items()) for text in pair), None)
    )
