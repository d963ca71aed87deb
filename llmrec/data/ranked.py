"""Files of ranked lists, written in parts while a job runs and then merged into one table.

A table has one row per request, or in the long form one per ranked item; a TREC run has one line per ranked item.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.data.cells import write_rows
from llmrec.data.read.files import JSON_LINES_ENDINGS, PARQUET_ENDINGS, split_gz_ending
from llmrec.data.request_file import SEPARATORS, file_ending
from llmrec.durable import checksum, replace_atomically, write_text
from llmrec.errors import DataError, RecipeError
from llmrec.recipe.shared import Form

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_ROW_GROUP = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingRecord:
    """The ranked list of one request, or the reason why it failed.

    Attributes:
        request_id: None if it could not be read.
        user_id: As in the request.
        line: Position of the request in its file; see `llmrec.data.request_file.RequestRow`.
        items: Best first.
        scores: One per item.
        titles: One per item, as the model read it.
        error: Why there is no ranking; None if there is one.
        notes: Notes on dropped or changed content.
        prompt_tokens: Tokens of the prompt, or of all prompts if there were several.
        completion_tokens: Tokens scored or generated after the prompt.
        forwards: Model calls, as `llmrec.types.Cost` counts them.
        retrieved: The number of ranked items that a recommender retrieved; 0 if the candidates came with the request.
        profile: The user profile that two-step wrote; None without one.
        rationale: One sentence per item for the first few items; an empty text where none was written.
        rationale_prompt_tokens: Tokens of the prompts for the sentences.
        rationale_completion_tokens: Tokens of the sentences.
        rationale_forwards: Model calls for the sentences.
    """

    request_id: str | None
    user_id: str | None
    line: int
    items: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    titles: tuple[str, ...] = ()
    error: str | None = None
    notes: tuple[str, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    forwards: int = 0
    retrieved: int = 0
    profile: str | None = None
    rationale: tuple[str, ...] = ()
    rationale_prompt_tokens: int = 0
    rationale_completion_tokens: int = 0
    rationale_forwards: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionRecord:
    """The prediction for one request about an item.

    Attributes:
        request_id: None if it could not be read.
        user_id: As in the request.
        line: Position of the request in its file.
        item_id: The item of the request.
        value: A rating, or the probability of yes; None if the answer is a text.
        text: The generated text; None if the answer is a number.
        error: Why there is no answer; None if there is one.
        notes: Notes on dropped or changed content.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens scored or generated after the prompt.
    """

    request_id: str | None
    user_id: str | None
    line: int
    item_id: str | None = None
    value: float | None = None
    text: str | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0


PREDICTION_SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("value", pa.float64()),
        ("text", pa.string()),
        ("error", pa.string()),
    ]
)
"""Columns of a table of predictions."""
FORM_COLUMNS: Mapping[Form, tuple[str, str, str, str]] = {
    "long": ("user", "item", "rank", "score"),
    "rectools": ("user_id", "item_id", "rank", "score"),
    "recbole": ("user_id:token", "item_id:token", "rank:float", "score:float"),
}
"""Columns of the forms with one row per ranked item and a header."""
LIST_TABLE = "recommendations"
"""The table of ranked lists in a database."""
LIST_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("rank", pa.int64()),
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("score", pa.float64()),
        ("error", pa.string()),
    ]
)
"""Columns of a table of ranked lists: one row per item; a request without a list has one row with the error."""
LIST_INDEX = ("user_id", "rank")
"""The columns that identify a row of it."""
TREC_ENDINGS = (".trec", ".run")
"""Ending of files in TREC form."""
FORM_ENDINGS: Mapping[str, Form] = {**dict.fromkeys(TREC_ENDINGS, "trec"), ".inter": "recbole"}
"""Endings of files that can have one form only."""

# Text formats with a separator that the file extension does not determine.
_FORM_SEPARATORS: Mapping[Form, str] = {"trec": " ", "recbole": "\t"}
_FORM_TYPES = (pa.string(), pa.string(), pa.int64(), pa.float64())
_LIST_FIELDS = ("items", "scores", "titles", "notes", "rationale")


def _arrow_schema(kind: type[DataclassInstance]) -> Any:
    """Return the Arrow types of the columns of a record."""
    hints = get_type_hints(kind)
    known = {
        bool: pa.bool_(),
        int: pa.int64(),
        float | None: pa.float64(),
        tuple[float, ...]: pa.list_(pa.float64()),
        tuple[str, ...]: pa.list_(pa.string()),
    }
    return pa.schema([(column.name, known.get(hints[column.name], pa.string())) for column in fields(kind)])


# --------------------------------------------------------------------------- parts


def write_part(path: Path, records: Sequence[RankingRecord]) -> None:
    """Write the records of a part atomically, each line with its checksum."""
    lines = (_json_line(asdict(record)).rstrip("\n") for record in records)
    write_text(path, "".join(f"{line}\t{checksum(line.encode())}\n" for line in lines))


def read_part(path: Path, lines: Sequence[int] | None = None) -> list[RankingRecord] | None:
    """Return the records of a part; None if the file is missing or damaged, or belongs to other requests."""
    try:
        records = [_parse_checked_line(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return records if lines is None or [record.line for record in records] == list(lines) else None


def read_records(path: Path) -> Iterator[RankingRecord]:
    """Yield the records of a JSON Lines file that `write_records` wrote."""
    with path.open(encoding="utf-8") as stream:
        yield from (_parse_record(json.loads(line)) for line in stream)


def _parse_checked_line(line: str) -> RankingRecord:
    # JSON contains tabs only in escaped form.
    text, _, digest = line.partition("\t")
    if checksum(text.encode()) != digest:
        raise ValueError("the line was modified")
    return _parse_record(json.loads(text))


def _parse_record(stored: Mapping[str, Any]) -> RankingRecord:
    values: dict[str, Any] = {name: tuple(value) if name in _LIST_FIELDS else value for name, value in stored.items()}
    return RankingRecord(**values)


def _json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


# --------------------------------------------------------------------------- the table


def resolve_form(path: Path, requested: str) -> Form:
    """Return the format of a file of ranked lists, as given or by its extension.

    Raises:
        RecipeError: If the two contradict each other.
        DataError: If the ending is unknown.
    """
    ending, _ = split_gz_ending(path)
    implied = FORM_ENDINGS.get(ending)
    if implied is not None and requested not in ("auto", implied):
        raise RecipeError(
            f"--form {requested}: {path} ends in {ending}, which means --form {implied}; choose another file name, or "
            "drop --form",
            kind="contradiction",
            column="--form",
        )
    known: tuple[Form, ...] = get_args(Form)
    form: Form = implied if implied is not None else next((form for form in known if form == requested), "records")
    if form not in _FORM_SEPARATORS:
        file_ending(path)
    return form


def write_lists(path: Path, records: Iterable[RankingRecord], form: Form, tag: str = "llmrec") -> None:
    """Write ranked lists atomically; in formats with one row per item, failed requests have no row.

    Args:
        path: The file.
        records: Consumed one at a time.
        form: See `Form`.
        tag: Name of the system in a TREC run.

    Raises:
        DataError: If an id contains the separator of a TREC run or of RecBole's form.
    """
    if form == "records":
        write_records(path, records)
        return
    rows = (
        (record_key(record), item, index, score)
        for record in records
        for index, (item, score) in enumerate(zip(record.items, record.scores, strict=True), start=1)
    )
    if form in _FORM_SEPARATORS:
        with replace_atomically(path) as draft, _open_text_file(draft, packed=split_gz_ending(path)[1]) as stream:
            stream.writelines(_separated_lines(path, rows, form, tag))
    else:
        _write_table(path, pa.schema(list(zip(FORM_COLUMNS[form], _FORM_TYPES, strict=True))), rows)


def to_arrow_table(records: Iterable[RankingRecord]) -> pa.Table:
    """Return ranked lists as a table with the columns `LIST_SCHEMA`."""
    rows: list[tuple[Any, ...]] = []
    for record in records:
        key = record_key(record)
        if record.error is not None:
            rows.append((key, None, None, None, None, record.error))
        lists = zip(record.items, record.titles, record.scores, strict=True)
        rows += [(key, rank, item, title, score, None) for rank, (item, title, score) in enumerate(lists, start=1)]
    columns = zip(*rows, strict=True) if rows else [()] * len(LIST_SCHEMA)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, LIST_SCHEMA, strict=True)], schema=LIST_SCHEMA
    )


def record_key(record: RankingRecord) -> str:
    """Return the id of a record in formats with one id: the user, or else the request."""
    return record.user_id or record.request_id or str(record.line)


def _separated_lines(path: Path, rows: Iterable[tuple[str, str, int, float]], form: Form, tag: str) -> Iterator[str]:
    """Yield the lines of a TREC run or a RecBole file, where ids cannot be quoted."""
    trec = form == "trec"
    if not trec:
        yield "\t".join(FORM_COLUMNS[form]) + "\n"
    for user, item, rank, score in rows:
        for what, value in (("user", user), ("item", item)):
            if not value or any(mark.isspace() and (trec or mark != " ") for mark in value):
                name, separator = ("a TREC run", "spaces") if trec else ("RecBole", "tabs")
                raise DataError.at(
                    path,
                    "bad-value",
                    f": {name} separates columns by {separator}, but the {what} {value[:60]!r} contains this "
                    "character; use --form long",
                    what,
                )
        cells = (user, "Q0", item, str(rank), repr(score), tag) if trec else (user, item, str(rank), repr(score))
        yield _FORM_SEPARATORS[form].join(cells) + "\n"


def write_records(
    path: Path, records: Iterable[DataclassInstance], kind: type[DataclassInstance] = RankingRecord
) -> None:
    """Write all records atomically as Parquet, JSON Lines, CSV or TSV, with optional gzip for text formats.

    Records are consumed one at a time, and equal records give equal bytes.

    Args:
        path: The file.
        records: Frozen dataclasses of one type.
        kind: Their type.

    Raises:
        DataError: If the ending is unknown.
    """
    schema = _arrow_schema(kind)
    _write_table(path, schema, (tuple(getattr(record, name) for name in schema.names) for record in records))


def _write_table(path: Path, schema: pa.Schema, rows: Iterator[tuple[Any, ...]]) -> None:
    """Write rows in the format of the file's ending, one at a time or in groups."""
    columns, suffix = schema.names, file_ending(path)
    with replace_atomically(path) as draft:
        if suffix in PARQUET_ENDINGS:
            with pq.ParquetWriter(draft, schema) as writer:
                while group := [dict(zip(columns, row, strict=True)) for row in islice(rows, _ROW_GROUP)]:
                    writer.write_table(pa.Table.from_pylist(group, schema=schema))
            return
        with _open_text_file(draft, packed=split_gz_ending(path)[1]) as stream:
            if suffix in JSON_LINES_ENDINGS:
                stream.writelines(_json_line(dict(zip(columns, row, strict=True))) for row in rows)
            else:
                write_rows(stream, columns, rows, separator=SEPARATORS[suffix])


@contextmanager
def _open_text_file(path: Path, *, packed: bool) -> Iterator[TextIO]:
    with path.open("wb") as raw:
        # The header has no name and no time, so that equal records give equal bytes.
        stream: Any = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) if packed else raw
        with io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
            yield text
