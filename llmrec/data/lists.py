"""Reads ranked lists and ground truth of any system, with one row per ranked or relevant item.

Lists are llmrec's own records, a table with one row per item (RecBole's too), or a TREC run; ground truth is such a
table or TREC qrels. Tables are frames in memory or files that `llmrec.data.read.table` reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import polars as pl

from llmrec.data.cells import unguarded
from llmrec.data.frames import as_arrow
from llmrec.data.ranked import TREC
from llmrec.data.read import typed
from llmrec.data.read.delimited import fields
from llmrec.data.read.files import read_bytes
from llmrec.data.read.limits import enumerated, reason, require_file, shown
from llmrec.data.read.objects import json_records
from llmrec.data.read.parquet import from_arrow, parquet_file
from llmrec.data.read.table import is_pattern, read_table, without_kinds
from llmrec.data.read.tables import Table
from llmrec.data.read.text import decode
from llmrec.data.read.words import named
from llmrec.data.request_file import JSON_LINES, PARQUET
from llmrec.errors import DataError, Location, did_you_mean

Unit = Literal["user", "request"]
Order = Literal["score", "rank", "order"]

USERS = ("user", "user_id", "userid", "uid", "qid", "query_id", "query", "topic")
REQUESTS = ("request_id", "request")
ITEMS = ("item", "item_id", "itemid", "iid", "docno", "docid", "doc_id", "document")
SCORES = ("score", "scores", "prediction", "pred")
RANKS = ("rank", "position")
GAINS = ("relevance", "relevant", "rel", "gain", "grade", "label")
"""Names of the relevance column, ignoring case; those of users and items are also as in `llmrec.data.read.words`."""

# Minimum weight of a column name to be accepted; see `llmrec.data.read.words`.
_MIN_WEIGHT = 0.9
_QRELS = (".qrels", ".qrel")
_RUN_COLUMNS = ("user", "q0", "item", "rank", "score", "tag")
_QRELS_COLUMNS = ("user", "iteration", "item", "relevance")


@dataclass(frozen=True)
class Lists:
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
    unit: Unit
    frame: pl.DataFrame
    empty: frozenset[str]
    order: Order
    where: Callable[[int], Location]
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Truth:
    """Relevant items of several lists, one item per row.

    Attributes:
        name: The file, for errors.
        unit: Whether items are relevant to users or to requests.
        frame: Columns ``key``, ``owner`` (the user of a request, else the key), ``item`` and ``gain``, above 0.
        barren: Keys without relevant items; they are not evaluated.
        columns: Columns of the file.
    """

    name: str
    unit: Unit
    frame: pl.DataFrame
    barren: frozenset[str]
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Entities:
    """The user and item columns given as options; otherwise columns are recognised by name."""

    user: str | None = None
    item: str | None = None

    def find(self, columns: Sequence[str], what: Literal["user", "item"]) -> str | None:
        """Return the column of users or items, as given or recognised by its name."""
        name, default_names = (self.user, USERS) if what == "user" else (self.item, ITEMS)
        if name in columns:
            return name
        return _first_column(columns, default_names) or _meaning(tuple(columns), what)


@dataclass(frozen=True)
class _Records:
    """Ranked lists stored as one record per list, in columns of lists."""

    name: str
    rows: Iterable[tuple[Location, Mapping[str, Any]]]
    columns: Sequence[str] = ()


def read_truth(source: Any, entities: Entities = Entities(), *, by_user: bool = False) -> Truth:
    """Read relevant items.

    Args:
        source: The path of a table or of TREC qrels, or a frame (see `llmrec.data.frames.as_arrow`). Columns: a user or
            a request, an item, and for graded relevance a relevance; without it all items are relevant.
        entities: Names of the columns.
        by_user: The rows are interactions: items are relevant to users, and repeated pairs count once.

    Raises:
        DataError: If it cannot be read, or a pair is repeated.
    """
    table = _open(source, "truth", _QRELS, _QRELS_COLUMNS, entities)
    if isinstance(table, _Records):
        raise DataError.at(
            table.name,
            "wrong-format",
            ": these are ranked lists instead of relevant items; provide a table with a user and an item in each row",
        )
    columns = table.frame.columns
    requests, users = None if by_user else _column(table, REQUESTS), entities.find(columns, "user")
    key = requests or users
    if key is None:
        raise _missing_column(table, "user")
    item = _item_column(table, entities)
    gains = _column(table, GAINS)
    frame = pl.DataFrame(
        {
            "key": _ids(table, key),
            "owner": _ids(table, users or key),
            "item": _ids(table, item),
            "gain": typed.numbers(table, gains, "relevance")
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
    return Truth(table.name, "user" if requests is None else "request", kept, barren, columns)


def read_lists(source: Any, unit: Unit = "user", entities: Entities = Entities()) -> Lists:
    """Read ranked lists.

    Args:
        source: The path of a file or a frame; see the module. Without a score and a rank, the order of a user's rows is
            the ranking.
        unit: What a list belongs to; ``request`` requires a column of requests.
        entities: Names of the columns.

    Raises:
        DataError: If it cannot be read, an item is repeated in a list, or a score is not a finite number.
    """
    table = _open(source, "ranked", TREC, _RUN_COLUMNS, entities)
    result = _of_records(table, unit, entities) if isinstance(table, _Records) else _of_rows(table, unit, entities)
    _check_unique(result.frame, result.where, "the list")
    return replace(result, columns=table.columns if isinstance(table, _Records) else table.frame.columns)


# --------------------------------------------------------------------------- tables


def _of_rows(table: Table, unit: Unit, names: Entities) -> Lists:
    requests, users = _column(table, REQUESTS), names.find(table.frame.columns, "user")
    key = requests if unit == "request" else users or requests
    if key is None:
        raise _missing_column(table, unit)
    item, score, rank = _item_column(table, names), _column(table, SCORES), _column(table, RANKS)
    table, failed = _without_failures(table, key, item)
    if score is not None:
        order: Order = "score"
        values = typed.numbers(table, score, "score")
    elif rank is not None:
        order, values = "rank", -typed.numbers(table, rank, "rank")
    else:
        order, values = "order", -pl.int_range(table.frame.height, eager=True).cast(pl.Float64)
    frame = pl.DataFrame({"key": _ids(table, key), "item": _ids(table, item), "score": values})
    return Lists(table.name, unit, frame, failed - frozenset(frame["key"].unique()), order, table.where)


def _without_failures(table: Table, key: str, item: str) -> tuple[Table, frozenset[str]]:
    """Separate rows with an item from rows in which llmrec recorded why a list is missing."""
    if "error" not in table.frame.columns or table.parts:
        return table, frozenset()
    failed = (typed.texts(table, "error").str.strip_chars() != "") & (typed.texts(table, item).str.strip_chars() == "")
    if not failed.any():
        return table, frozenset()
    rows = (~failed).arg_true().to_list()
    owners = frozenset(typed.texts(table, key).filter(failed).cast(pl.String).unique())
    lines = [table.line(row) for row in rows]
    return replace(table, frame=table.frame[rows], lines=lines, rows=rows), owners


def _ids(table: Table, column: str) -> pl.Series:
    """Return a column of ids as texts, without the protection against spreadsheet formulas."""
    result = typed.ids(table, column).cast(pl.String)
    return unguarded(result) if _is_delimited(table.name) else result


def _is_delimited(name: str) -> bool:
    return any(ending in (".csv", ".tsv", ".txt", ".psv") for ending in Path(name).suffixes)


def _column(table: Table, names: Sequence[str]) -> str | None:
    """Return the first of these names that is a column."""
    return _first_column(table.frame.columns, names)


def _first_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    known = {column.strip().lower(): column for column in reversed(columns)}
    return next((known[name] for name in names if name in known), None)


@cache
def _meaning(columns: tuple[str, ...], what: str) -> str | None:
    """Return the column whose name means user or item, preferring ids; None if there are several."""
    meanings = {column: named(column) for column in columns}
    best = max((meaning.weight(what) for meaning in meanings.values()), default=0.0)
    results = [column for column, meaning in meanings.items() if meaning.weight(what) == best]
    ids = [column for column in results if meanings[column].is_id] or results
    return ids[0] if best >= _MIN_WEIGHT and len(ids) == 1 else None


def _item_column(table: Table, names: Entities) -> str:
    result = names.find(table.frame.columns, "item")
    if result is None:
        raise _missing_column(table, "item")
    return result


def _missing_column(table: Table, what: Literal["user", "item", "request"]) -> DataError:
    columns = table.frame.columns
    name = {"user": USERS, "item": ITEMS, "request": REQUESTS}[what][0]
    fix = f"Rename it to {name!r}" if what == "request" else f"Name it with --{what} COLUMN"
    return DataError.at(
        table.name,
        "missing-column",
        f" has no {what} column{did_you_mean(name, columns)}; its columns are: {enumerated(columns)}. {fix}",
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
            f": the item {shown(item)} is repeated in {what} of {shown(key)}; keep one",
            "item",
        )


# --------------------------------------------------------------------------- records written by llmrec


def _of_records(records: _Records, unit: Unit, entities: Entities) -> Lists:
    keys: list[str] = []
    items: list[str] = []
    scores: list[float] = []
    rows: list[int] = []
    locations: list[Location] = []
    first: dict[str, Location] = {}
    empty: set[str] = set()
    scored = True
    for location, record in records.rows:
        key = _key(location, record, unit, entities)
        if (earlier := first.setdefault(key, location)) is not location:
            raise DataError.at(
                location,
                "duplicate",
                f": {shown(key)} already has a list in row {earlier.row}; for several lists per user, add a column "
                "request_id to the relevant items",
                "request_id" if unit == "request" else "user_id",
            )
        names, values = _items_and_scores(location, record)
        scored = scored and values is not None
        if not names:
            empty.add(key)
        keys += [key] * len(names)
        items += names
        scores += [-float(n) for n in range(len(names))] if values is None else values
        rows += [len(locations)] * len(names)
        locations.append(location)
    if not locations:
        raise DataError.at(records.name, "empty", " contains no lists; write at least one list")
    frame = pl.DataFrame(
        {"key": keys, "item": items, "score": scores},
        schema={"key": pl.String, "item": pl.String, "score": pl.Float64},
    )
    order: Order = "score" if scored else "order"
    return Lists(records.name, unit, frame, frozenset(empty), order, lambda row: locations[rows[row]])


def _key(location: Location, record: Mapping[str, Any], unit: Unit, entities: Entities) -> str:
    """Return the key of a list: the user, or the request if there is no user."""
    user = entities.find(tuple(record), "user") if unit == "user" else None
    names = REQUESTS if unit == "request" else (*([user] if user else []), *USERS, *REQUESTS)
    for name in names:
        value = record.get(name)
        if value is not None and str(value).strip():
            return str(value)
    raise DataError.at(location, "missing-value", f": the list has no {names[0]}; add the {names[0]}", names[0])


def _items_and_scores(location: Location, record: Mapping[str, Any]) -> tuple[list[str], list[float] | None]:
    items, scores = _list(location, "items", record.get("items")), record.get("scores")
    names = [_name(location, item) for item in items]
    if scores is None:
        return names, None
    values = [_finite(location, value) for value in _list(location, "scores", scores)]
    if len(values) != len(names):
        raise DataError.at(
            location, "mismatch", f": {len(names)} items but {len(values)} scores; write one score per item", "scores"
        )
    return names, values


def _list(location: Location, column: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError) as error:
            raise DataError.at(
                location,
                "syntax",
                f": column {column!r} is not a JSON list ({reason(error)}); write a JSON list",
                column,
            ) from None
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError.at(location, "bad-value", f": column {column!r} is not a list; write a list", column)
    return value


def _name(location: Location, item: Any) -> str:
    if isinstance(item, bool) or not isinstance(item, str | int) or not str(item).strip():
        raise DataError.at(
            location, "bad-value", f": the item {shown(item)} is not an id; write text or numbers", "items"
        )
    return str(item)


def _finite(location: Location, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError.at(
            location,
            "bad-value",
            f": the score {shown(value)} is not a finite number; correct or drop the list",
            "scores",
        )
    return float(value)


# --------------------------------------------------------------------------- files and frames


def _open(source: Any, what: str, endings: Sequence[str], columns: Sequence[str], names: Entities) -> Table | _Records:
    """Open a file or a data frame; TREC files are recognised by their extension or their first line."""
    if not isinstance(source, str | Path):
        return _of_arrow(f"{what} frame", as_arrow(source, f"{what} frame"), names)
    path = Path(source).expanduser()
    name = str(path)
    if path.is_dir() or is_pattern(path):
        return without_kinds(read_table(path))
    require_file(path, "check the path", "the ranked lists" if what == "ranked" else "the file of relevant items")
    ending = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if ending in endings or (ending in ("", ".txt", *TREC, *_QRELS) and _is_trec(path, columns)):
        raw, sha256 = read_bytes(path)
        return _trec_table(name, decode(name, raw), columns, sha256)
    if ending in PARQUET:
        with parquet_file(name, read_bytes(path, text=False)[0]) as file:
            return _of_arrow(name, file.read(), names)
    if ending in JSON_LINES:
        rows = json_records(name, read_bytes(path)[0])
        first = next(rows, None)
        if first is not None and isinstance(first[1].get("items"), list):
            return _Records(name, chain([first], rows), tuple(first[1]))
    table = without_kinds(read_table(path))
    single = _column(table, ITEMS) or names.item in table.frame.columns
    return _with_lists(table, names) if _column(table, ("items",)) and not single else table


def _of_arrow(name: str, table: Any, names: Entities) -> Table | _Records:
    if "items" not in table.column_names:
        return without_kinds(from_arrow(name, table))
    wanted = _of_lists(table.column_names, names)

    def rows() -> Iterator[tuple[Location, Mapping[str, Any]]]:
        number = 0
        for batch in table.select(wanted).to_batches():
            for record in batch.to_pylist():
                number += 1
                yield Location(name, number), record

    return _Records(name, rows(), table.column_names)


def _of_lists(columns: Sequence[str], names: Entities) -> list[str]:
    """Return the columns to read of a table with one list per row."""
    known = {names.find(columns, "user"), *USERS, *REQUESTS, "items", "scores"}
    return [column for column in columns if column in known]


def _with_lists(table: Table, names: Entities) -> _Records:
    """Return the records of a table whose cells contain JSON lists."""
    columns = _of_lists(table.frame.columns, names)
    frame = table.frame.with_columns(unguarded(table.frame[n]) for n in columns if n not in ("items", "scores"))
    rows = enumerate(frame.select(columns).iter_rows(named=True))
    return _Records(table.name, ((table.where(n), row) for n, row in rows), table.frame.columns)


def _is_trec(path: Path, columns: Sequence[str]) -> bool:
    """Whether a file without a known extension begins like a TREC run or qrels."""
    if path.suffix.lower() == ".gz":
        return False
    with path.open("rb") as stream:
        head = stream.readline(4096).decode("utf-8", "replace").split()
    if len(head) != len(columns):
        return False
    return head[1].upper() == "Q0" if columns is _RUN_COLUMNS else head[3].lstrip("-").isdigit()


def _trec_table(name: str, text: str, columns: Sequence[str], sha256: str) -> Table:
    """Read lines whose fields are separated by white space."""
    rows: list[list[str]] = []
    lines: list[int] = []
    for line, cells in fields(text, None, quoted=False):
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
