"""Reads ranked lists and ground truth of any system, with one row per ranked or relevant item.

Lists are llmrec's own records, a table with one row per item (RecBole's too), or a TREC run; ground truth is such a
table or TREC qrels. Tables are frames in memory or files that `llmrec.data.read.table` reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import polars as pl

from llmrec.data.cells import unescape_cells
from llmrec.data.frames import as_arrow
from llmrec.data.ranked import TREC_ENDINGS
from llmrec.data.read import typed
from llmrec.data.read.delimited import parse_rows
from llmrec.data.read.files import JSON_LINES_ENDINGS, PARQUET_ENDINGS, read_bytes, split_gz_ending
from llmrec.data.read.limits import check_regular_file, format_error, format_names, format_value
from llmrec.data.read.objects import parse_json_records
from llmrec.data.read.parquet import open_parquet_file, table_from_arrow
from llmrec.data.read.table import is_pattern, read_table, strip_column_types
from llmrec.data.read.tables import Table
from llmrec.data.read.text import decode_file
from llmrec.data.read.words import interpret_column_name
from llmrec.errors import DataError, Location, did_you_mean

ListUnit = Literal["user", "request"]
ListOrder = Literal["score", "rank", "order"]

USER_COLUMNS = ("user", "user_id", "userid", "uid", "qid", "query_id", "query", "topic")
REQUEST_COLUMNS = ("request_id", "request")
ITEM_COLUMNS = ("item", "item_id", "itemid", "iid", "docno", "docid", "doc_id", "document")
SCORE_COLUMNS = ("score", "scores", "prediction", "pred")
RANK_COLUMNS = ("rank", "position")
GAIN_COLUMNS = ("relevance", "relevant", "rel", "gain", "grade", "label")
"""Names of the relevance column, ignoring case; those of users and items are also as in `llmrec.data.read.words`."""

# Minimum weight of a column name to be accepted; see `llmrec.data.read.words`.
_MIN_WEIGHT = 0.9
_QRELS_ENDINGS = (".qrels", ".qrel")
_RUN_COLUMNS = ("user", "q0", "item", "rank", "score", "tag")
_QRELS_COLUMNS = ("user", "iteration", "item", "relevance")


@dataclass(frozen=True)
class RankedLists:
    """Ranked items of several lists, one item per row.

    Attributes:
        name: The file, for errors.
        unit: Whether users or requests have lists.
        frame: Columns ``key`` (of the user or request), ``item`` and ``score``; higher is better.
        empty: Keys of lists without items, such as those of failed requests.
        order: What defines the ranking: a score, a rank, or the order of the rows.
        where: Returns the location of a row of ``frame``.
        columns: Columns of the file.
    """

    name: str
    unit: ListUnit
    frame: pl.DataFrame
    empty: frozenset[str]
    order: ListOrder
    where: Callable[[int], Location]
    columns: Sequence[str]


@dataclass(frozen=True)
class GroundTruth:
    """Relevant items of several lists, one item per row.

    Attributes:
        name: The file, for errors.
        unit: Whether items are relevant to users or to requests.
        frame: Columns ``key``, ``owner`` (the user of a request, else the key), ``item`` and ``gain``, above 0.
        barren: Keys without relevant items; they are not evaluated.
        columns: Columns of the file.
    """

    name: str
    unit: ListUnit
    frame: pl.DataFrame
    barren: frozenset[str]
    columns: Sequence[str]


@dataclass(frozen=True)
class EntityColumns:
    """The user and item columns given as options; otherwise columns are recognised by name."""

    user: str | None = None
    item: str | None = None

    def find(self, columns: Sequence[str], what: Literal["user", "item"]) -> str | None:
        """Return the column of users or items, as given or recognised by its name."""
        name, default_names = (self.user, USER_COLUMNS) if what == "user" else (self.item, ITEM_COLUMNS)
        if name in columns:
            return name
        return _find_column(columns, default_names) or _column_by_meaning(tuple(columns), what)


@dataclass(frozen=True)
class _ListRecords:
    """Ranked lists stored as one record per list, in columns of lists."""

    name: str
    rows: Iterable[tuple[Location, Mapping[str, Any]]]
    columns: Sequence[str]


def read_truth(source: Any, entities: EntityColumns = EntityColumns(), *, by_user: bool = False) -> GroundTruth:
    """Read relevant items.

    Args:
        source: The path of a table or of TREC qrels, or a frame (see `llmrec.data.frames.as_arrow`). Columns: a user or
            a request, an item, and for graded relevance a relevance; without it all items are relevant.
        entities: Names of the columns.
        by_user: The rows are interactions: items are relevant to users, and repeated pairs count once.

    Raises:
        DataError: If it cannot be read, or a pair is repeated.
    """
    table = _open_source(source, "truth", _QRELS_ENDINGS, _QRELS_COLUMNS, entities)
    if isinstance(table, _ListRecords):
        raise DataError.at(
            table.name,
            "wrong-format",
            ": these are ranked lists instead of relevant items; provide a table with a user and an item in each row",
        )
    columns = table.frame.columns
    requests, users = None if by_user else _find_column(columns, REQUEST_COLUMNS), entities.find(columns, "user")
    key = requests or users
    if key is None:
        raise _missing_column_error(table, "user")
    item = _item_column(table, entities)
    gains = _find_column(columns, GAIN_COLUMNS)
    frame = pl.DataFrame(
        {
            "key": _unescaped_id_column(table, key),
            "owner": _unescaped_id_column(table, users or key),
            "item": _unescaped_id_column(table, item),
            "gain": typed.number_column(table, gains, "relevance")
            if gains
            else pl.repeat(1.0, table.frame.height, eager=True),
        }
    )
    if by_user:
        frame = frame.sort("gain", descending=True, maintain_order=True).unique(["key", "item"], maintain_order=True)
    _check_unique(frame, table.where, "the relevant items")
    kept = frame.filter(pl.col("gain") > 0)
    barren = frozenset(frame["key"].unique()) - frozenset(kept["key"].unique())
    if kept.is_empty():
        raise DataError.at(table.name, "empty", ": no row has a relevant item; check the relevance column", gains)
    return GroundTruth(table.name, "user" if requests is None else "request", kept, barren, columns)


def read_lists(source: Any, unit: ListUnit = "user", entities: EntityColumns = EntityColumns()) -> RankedLists:
    """Read ranked lists.

    Args:
        source: The path of a file or a frame; see the module. Without a score and a rank, the order of a user's rows is
            the ranking.
        unit: What a list belongs to; ``request`` requires a column of requests.
        entities: Names of the columns.

    Raises:
        DataError: If it cannot be read, an item is repeated in a list, or a score is not a finite number.
    """
    table = _open_source(source, "ranked", TREC_ENDINGS, _RUN_COLUMNS, entities)
    result = (
        _lists_from_records(table, unit, entities)
        if isinstance(table, _ListRecords)
        else _lists_from_rows(table, unit, entities)
    )
    _check_unique(result.frame, result.where, "the list")
    return result


# --------------------------------------------------------------------------- tables


def _lists_from_rows(table: Table, unit: ListUnit, names: EntityColumns) -> RankedLists:
    columns = table.frame.columns
    requests, users = _find_column(columns, REQUEST_COLUMNS), names.find(columns, "user")
    key = requests if unit == "request" else users or requests
    if key is None:
        raise _missing_column_error(table, unit)
    item = _item_column(table, names)
    score, rank = _find_column(columns, SCORE_COLUMNS), _find_column(columns, RANK_COLUMNS)
    table, failed = _split_failed_rows(table, key, item)
    if score is not None:
        order: ListOrder = "score"
        values = typed.number_column(table, score, "score")
    elif rank is not None:
        order, values = "rank", -typed.number_column(table, rank, "rank")
    else:
        order, values = "order", -pl.int_range(table.frame.height, eager=True).cast(pl.Float64)
    frame = pl.DataFrame(
        {"key": _unescaped_id_column(table, key), "item": _unescaped_id_column(table, item), "score": values}
    )
    empty = failed - frozenset(frame["key"].unique())
    return RankedLists(table.name, unit, frame, empty, order, table.where, columns)


def _split_failed_rows(table: Table, key: str, item: str) -> tuple[Table, frozenset[str]]:
    """Separate rows with an item from rows in which llmrec recorded why a list is missing."""
    if "error" not in table.frame.columns or table.parts:
        return table, frozenset()
    failed = (typed.text_column(table, "error").str.strip_chars() != "") & (
        typed.text_column(table, item).str.strip_chars() == ""
    )
    if not failed.any():
        return table, frozenset()
    owners = frozenset(typed.text_column(table, key).filter(failed).cast(pl.String).unique())
    return table.select_rows((~failed).arg_true()), owners


def _unescaped_id_column(table: Table, column: str) -> pl.Series:
    """Return a column of ids as texts, without the protection against spreadsheet formulas."""
    result = typed.id_column(table, column).cast(pl.String)
    delimited = {".csv", ".tsv", ".txt", ".psv"} & set(Path(table.name.lower()).suffixes)
    return unescape_cells(result) if delimited else result


def _find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the first of these names that is a column, ignoring case."""
    known = {column.strip().lower(): column for column in reversed(columns)}
    return next((known[name] for name in names if name in known), None)


@cache
def _column_by_meaning(columns: tuple[str, ...], what: str) -> str | None:
    """Return the column whose name means user or item, preferring ids; None if there are several."""
    meanings = {column: interpret_column_name(column) for column in columns}
    best = max((meaning.weight(what) for meaning in meanings.values()), default=0.0)
    results = [column for column, meaning in meanings.items() if meaning.weight(what) == best]
    ids = [column for column in results if meanings[column].is_id] or results
    return ids[0] if best >= _MIN_WEIGHT and len(ids) == 1 else None


def _item_column(table: Table, names: EntityColumns) -> str:
    result = names.find(table.frame.columns, "item")
    if result is None:
        raise _missing_column_error(table, "item")
    return result


def _missing_column_error(table: Table, what: Literal["user", "item", "request"]) -> DataError:
    columns = table.frame.columns
    name = {"user": USER_COLUMNS, "item": ITEM_COLUMNS, "request": REQUEST_COLUMNS}[what][0]
    fix = f"Rename it to {name!r}" if what == "request" else f"Name it with --{what} COLUMN"
    return DataError.at(
        table.name,
        "missing-column",
        f" has no {what} column{did_you_mean(name, columns)}; its columns are: {format_names(columns)}. {fix}",
        name,
    )


def _check_unique(frame: pl.DataFrame, where: Callable[[int], Location], what: str) -> None:
    """Reject items that occur twice in the same list."""
    repeated = frame.select(~pl.struct("key", "item").is_first_distinct())["key"].arg_true()
    if len(repeated):
        row = int(repeated[0])
        key, item = frame["key"][row], frame["item"][row]
        raise DataError.at(
            where(row),
            "duplicate",
            f": the item {format_value(item)} is repeated in {what} of {format_value(key)}; keep one",
            "item",
        )


# --------------------------------------------------------------------------- records written by llmrec


def _lists_from_records(records: _ListRecords, unit: ListUnit, entities: EntityColumns) -> RankedLists:
    keys: list[str] = []
    items: list[str] = []
    scores: list[float] = []
    locations: dict[str, Location] = {}
    scored = True
    for location, record in records.rows:
        key = _list_key(location, record, unit, entities)
        if (earlier := locations.setdefault(key, location)) is not location:
            raise DataError.at(
                location,
                "duplicate",
                f": {format_value(key)} already has a list in row {earlier.row}; for several lists per user, add a "
                "column request_id to the relevant items",
                "request_id" if unit == "request" else "user_id",
            )
        names, values = _items_and_scores(location, record)
        scored = scored and values is not None
        keys += [key] * len(names)
        items += names
        scores += [-float(n) for n in range(len(names))] if values is None else values
    if not locations:
        raise DataError.at(records.name, "empty", " contains no lists; write at least one list")
    frame = pl.DataFrame(
        {"key": keys, "item": items, "score": scores},
        schema={"key": pl.String, "item": pl.String, "score": pl.Float64},
    )
    order: ListOrder = "score" if scored else "order"
    empty = frozenset(locations.keys() - set(keys))
    return RankedLists(records.name, unit, frame, empty, order, lambda row: locations[keys[row]], records.columns)


def _list_key(location: Location, record: Mapping[str, Any], unit: ListUnit, entities: EntityColumns) -> str:
    """Return the key of a list: the user, or the request if there is no user."""
    user = entities.find(tuple(record), "user") if unit == "user" else None
    names = REQUEST_COLUMNS if unit == "request" else (*([user] if user else []), *USER_COLUMNS, *REQUEST_COLUMNS)
    for name in names:
        value = record.get(name)
        if value is not None and str(value).strip():
            return str(value)
    raise DataError.at(location, "missing-value", f": the list has no {names[0]}; add the {names[0]}", names[0])


def _items_and_scores(location: Location, record: Mapping[str, Any]) -> tuple[list[str], list[float] | None]:
    items, scores = _parse_list(location, "items", record.get("items")), record.get("scores")
    names = [_parse_item_id(location, item) for item in items]
    if scores is None:
        return names, None
    values = [_parse_score(location, value) for value in _parse_list(location, "scores", scores)]
    if len(values) != len(names):
        raise DataError.at(
            location, "mismatch", f": {len(names)} items but {len(values)} scores; write one score per item", "scores"
        )
    return names, values


def _parse_list(location: Location, column: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError) as error:
            raise DataError.at(
                location,
                "syntax",
                f": column {column!r} is not a JSON list ({format_error(error)}); write a JSON list",
                column,
            ) from None
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError.at(location, "bad-value", f": column {column!r} is not a list; write a list", column)
    return value


def _parse_item_id(location: Location, item: Any) -> str:
    if isinstance(item, bool) or not isinstance(item, str | int) or not str(item).strip():
        raise DataError.at(
            location, "bad-value", f": the item {format_value(item)} is not an id; write text or numbers", "items"
        )
    return str(item)


def _parse_score(location: Location, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError.at(
            location,
            "bad-value",
            f": the score {format_value(value)} is not a finite number; correct or drop the list",
            "scores",
        )
    return float(value)


# --------------------------------------------------------------------------- files and frames


def _open_source(
    source: Any, what: str, endings: Sequence[str], columns: Sequence[str], names: EntityColumns
) -> Table | _ListRecords:
    """Open a file or a data frame; TREC files are recognised by their extension or their first line."""
    if not isinstance(source, str | Path):
        return _convert_arrow_table(f"{what} frame", as_arrow(source, f"{what} frame"), names)
    path = Path(source).expanduser()
    name = str(path)
    if path.is_dir() or is_pattern(path):
        return strip_column_types(read_table(path))
    check_regular_file(path, "check the path", "the ranked lists" if what == "ranked" else "the file of relevant items")
    ending, _ = split_gz_ending(path)
    if ending in endings or (ending in ("", ".txt", *TREC_ENDINGS, *_QRELS_ENDINGS) and _is_trec(path, columns)):
        raw, sha256 = read_bytes(path)
        return _parse_trec(name, decode_file(name, raw), columns, sha256)
    if ending in PARQUET_ENDINGS:
        with open_parquet_file(name, read_bytes(path)[0]) as file:
            return _convert_arrow_table(name, file.read(), names)
    if ending in JSON_LINES_ENDINGS:
        rows = parse_json_records(name, read_bytes(path)[0])
        first = next(rows, None)
        if first is not None and isinstance(first[1].get("items"), list):
            return _ListRecords(name, chain([first], rows), tuple(first[1]))
    table = strip_column_types(read_table(path))
    known = table.frame.columns
    single = _find_column(known, ITEM_COLUMNS) or names.item in known
    return _records_from_cells(table, names) if _find_column(known, ("items",)) and not single else table


def _convert_arrow_table(name: str, table: Any, names: EntityColumns) -> Table | _ListRecords:
    if "items" not in table.column_names:
        return strip_column_types(table_from_arrow(name, table))
    wanted = _columns_to_read(table.column_names, names)

    records = (record for batch in table.select(wanted).to_batches() for record in batch.to_pylist())
    rows = ((Location(name, number), record) for number, record in enumerate(records, start=1))
    return _ListRecords(name, rows, table.column_names)


def _columns_to_read(columns: Sequence[str], names: EntityColumns) -> list[str]:
    """Return the columns to read of a table with one list per row."""
    known = {names.find(columns, "user"), *USER_COLUMNS, *REQUEST_COLUMNS, "items", "scores"}
    return [column for column in columns if column in known]


def _records_from_cells(table: Table, names: EntityColumns) -> _ListRecords:
    """Return the records of a table whose cells contain JSON lists."""
    columns = _columns_to_read(table.frame.columns, names)
    frame = table.frame.with_columns(unescape_cells(table.frame[n]) for n in columns if n not in ("items", "scores"))
    rows = enumerate(frame.select(columns).iter_rows(named=True))
    return _ListRecords(table.name, ((table.where(n), row) for n, row in rows), table.frame.columns)


def _is_trec(path: Path, columns: Sequence[str]) -> bool:
    """Whether a file without a known extension begins like a TREC run or qrels."""
    if path.suffix.lower() == ".gz":
        return False
    with path.open("rb") as stream:
        head = stream.readline(4096).decode("utf-8", "replace").split()
    if len(head) != len(columns):
        return False
    return head[1].upper() == "Q0" if columns is _RUN_COLUMNS else head[3].lstrip("-").isdigit()


def _parse_trec(name: str, text: str, columns: Sequence[str], sha256: str) -> Table:
    """Read lines whose fields are separated by white space."""
    rows: list[list[str]] = []
    lines: list[int] = []
    for line, cells in parse_rows(text, None, quoted=False):
        if not cells:
            continue
        if len(cells) != len(columns):
            raise DataError.at(
                Location(name, len(rows) + 1, line + 1),
                "ragged-row",
                f" has {len(cells)} fields instead of {len(columns)}: {' '.join(columns)}",
            )
        rows.append(cells)
        lines.append(line + 1)
    if not rows:
        raise DataError.at(name, "empty", " is empty; write the file again")
    frame = pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row")
    return Table(name, frame, sha256, lines)
