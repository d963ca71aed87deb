"""Parses ranking requests of users: a history and candidates, with items given by catalogue id or by text.

All request content is parsed by `parse_request`: rows of files as well as bodies of server requests.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import lru_cache
from itertools import pairwise
from typing import TypeGuard

from llmrec.data.read.limits import ID_LIMIT, has_invalid_characters
from llmrec.display import format_name_list, shorten_text
from llmrec.errors import DataError, did_you_mean
from llmrec.guard import TITLE_LIMIT, clean
from llmrec.types import Event, Item

REQUEST_KEYS = ("id", "user_id", "history", "candidates", "item", "profile")
"""Keys of a request: ``candidates`` are ranked; ``item`` is the item to predict."""
USER_FIELDS = "user_fields"
"""The key of `RankRequest.context` for the fields of a user."""
CANDIDATES_IGNORED = "candidates: ignored, since all items are ranked"
"""The note on a request that has candidates although the whole catalogue is ranked."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_ITEM_KEYS = frozenset({"item_id", "title", "rating", "timestamp", "text"})
_MAX_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PastEvent:
    """A past interaction in a request, with the text given for its item."""

    item: Item
    rating: float | None = None
    timestamp: float | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRequest:
    """A parsed ranking request, in which every item has a text.

    Attributes:
        id: Unique within a file.
        candidates: Unique items to rank; their order has no meaning. Empty: the whole catalogue, or candidates that are
            still to be retrieved.
        history: Oldest first; empty for a cold-start user.
        user_id: As in the request, or None.
        profile: The request's text about the user; may be empty.
        notes: Notes on dropped or changed content while reading.
        titled: Generated ids of items that were given only by title.
        retrieved: The number of candidates that a recommender retrieved: all or 0.
        context: Further values for the task by name, such as the review to predict for, or the user's fields as
            JSON (`USER_FIELDS`).
        barred: Ids that are excluded when the whole catalogue is ranked, in addition to those of the history.
        keep_seen: Items of the history may be ranked when the whole catalogue is ranked.
        unknown_user: The request names a user who is not stored, and has no history.
        unknown_items: Unknown ids of the history, which were left out.
    """

    id: str
    candidates: tuple[Item, ...]
    history: tuple[PastEvent, ...] = ()
    user_id: str | None = None
    profile: str = ""
    notes: tuple[str, ...] = ()
    titled: frozenset[str] = frozenset()
    retrieved: int = 0
    context: Mapping[str, str] = field(default_factory=dict)
    barred: frozenset[str] = frozenset()
    keep_seen: bool = False
    unknown_user: bool = False
    unknown_items: tuple[str, ...] = ()


@dataclass
class _RequestNotes:
    """Lists of changed or ignored items, from which the notes about a request are written."""

    skipped: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    conflicting: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    titled: set[str] = field(default_factory=set)

    def notes(self) -> list[str]:
        remarks = (
            ("history: ignored unknown items without a title", self.skipped),
            ("candidates: repeated items are ranked once", self.repeated),
            ("candidates: an item is repeated with another text; only the first is ranked", self.conflicting),
            (f"cut to {TITLE_LIMIT} characters, the title of", self.cut),
        )
        return [f"{what}: {format_few_names(names)}" for what, names in remarks if names]


class _UnknownItem(Exception):
    """An item whose text is unknown."""

    def __init__(self, item_id: str) -> None:
        super().__init__(item_id)
        self.item_id = item_id


def parse_request(
    record: Mapping[str, object],
    row: int,
    catalogue: Mapping[str, Item] | None,
    *,
    whole: bool = False,
    retrieves: bool = False,
) -> RankRequest:
    """Parse a request and add the text of every item.

    Args:
        record: Keys are `REQUEST_KEYS`; entries of ``history`` and ``candidates`` are texts, integers or objects.
        row: Row number from 1; replaces a missing id.
        catalogue: Items by id. Without a catalogue, an entry that is a text is a title.
        whole: The whole catalogue is ranked, and the request's candidates are ignored.
        retrieves: A request may have no candidates, or an empty list: they are retrieved for it.

    Raises:
        DataError: If it cannot be ranked; the message describes the problem, not the position of the request.
    """
    request_id = _parse_optional_id("id", record.get("id")) or str(row)
    user_id = _parse_optional_id("user_id", record.get("user_id"))
    remarks = _RequestNotes()
    lacks = retrieves and record.get("candidates") in (None, [], ())
    candidates = () if whole or lacks else _parse_candidates(record, catalogue, remarks)
    history = _parse_history(record, catalogue, remarks)
    profile, fields = _parse_profile(record.get("profile"))
    notes = [f"{key!r} was ignored{hint}" for key in record if (hint := _misspelling_hint(key))] + remarks.notes()
    times = [past.timestamp for past in history if past.timestamp is not None]
    if any(later < earlier for earlier, later in pairwise(times)):
        notes.append("history: the timestamps are not in ascending order; the given order was used")
    if not history:
        notes.append("no history")
    if whole and record.get("candidates") is not None:
        notes.append(CANDIDATES_IGNORED)
    if _is_too_long(profile):
        notes.append(f"profile: cut to {TITLE_LIMIT} characters")
    return RankRequest(
        id=request_id,
        candidates=candidates,
        history=history,
        user_id=user_id,
        profile=clean(profile),
        notes=tuple(notes),
        titled=frozenset(remarks.titled),
        unknown_items=tuple(dict.fromkeys(remarks.skipped)),
        context={USER_FIELDS: json.dumps(fields)} if fields else {},
    )


def history_entry(event: Event) -> dict[str, object]:
    """Return an interaction as an entry in the ``history`` of a request."""
    return {"item_id": event.item_id, "rating": event.rating, "timestamp": event.timestamp}


def first_untitled_id(record: Mapping[str, object]) -> str | None:
    """Return the first item that a request gives only by its id; None if all items have a title."""
    for key in ("history", "candidates"):
        entries = record.get(key)
        for entry in entries if isinstance(entries, list | tuple) else ():
            named = entry if isinstance(entry, Mapping) else {"item_id": entry}
            if named.get("item_id") is not None and not named.get("title"):
                return str(named["item_id"])
    return None


def request_identity(record: Mapping[str, object] | None, row: int) -> tuple[str | None, str | None]:
    """Return the id and user of a request, if valid, to identify a failed line."""
    if record is None:
        return None, None
    values: list[str | None] = []
    for key, default in (("id", str(row)), ("user_id", None)):
        try:
            values.append(_parse_optional_id(key, record.get(key)) or default)
        except DataError:
            values.append(None)
    return values[0], values[1]


# --------------------------------------------------------------------------- lists of items


def _parse_candidates(
    record: Mapping[str, object], catalogue: Mapping[str, Item] | None, remarks: _RequestNotes
) -> tuple[Item, ...]:
    if record.get("candidates") is None:
        others = [key for key in record if key not in REQUEST_KEYS]
        raise DataError(
            f"there are no 'candidates'{did_you_mean('candidates', others)}; give a list of items to rank",
            kind="missing-key",
            column="candidates",
        )
    entries = _parse_list("candidates", record["candidates"])
    if not entries:
        raise DataError("'candidates' is empty; give at least one item to rank", kind="empty", column="candidates")
    items: dict[str, Item] = {}
    unknown: dict[str, None] = {}
    for index, entry in enumerate(entries, start=1):
        try:
            item = _parse_item(f"candidates, entry {index}", entry, catalogue, remarks)
        except _UnknownItem as gap:
            unknown.setdefault(gap.item_id)
            continue
        if (first := items.get(item.item_id)) is None:
            items[item.item_id] = item
        else:
            (remarks.repeated if first == item else remarks.conflicting).append(item.item_id)
    if unknown:
        where = "there is no catalogue" if catalogue is None else "they are not in the catalogue"
        example = f'{{"item_id": {json.dumps(next(iter(unknown))[:60], ensure_ascii=False)}, "title": ...}}'
        raise DataError(
            f"candidates without a title: {format_few_names(list(unknown))}; {where}: write each candidate as "
            f"{example}, or give a table of items with --items",
            kind="unknown-name",
            column="candidates",
        )
    return tuple(items.values())


def _parse_history(
    record: Mapping[str, object], catalogue: Mapping[str, Item] | None, remarks: _RequestNotes
) -> tuple[PastEvent, ...]:
    if record.get("history") is None:
        return ()
    events: list[PastEvent] = []
    for index, entry in enumerate(_parse_list("history", record["history"]), start=1):
        where = f"history, entry {index}"
        try:
            item = _parse_item(where, entry, catalogue, remarks)
        except _UnknownItem as gap:
            remarks.skipped.append(gap.item_id)
            continue
        if not isinstance(entry, Mapping):
            events.append(PastEvent(item=item))
            continue
        text = entry.get("text")
        events.append(
            PastEvent(
                item=item,
                rating=_parse_number(f"{where}: rating", entry.get("rating")),
                timestamp=_parse_timestamp(f"{where}: timestamp", entry.get("timestamp")),
                text=None if text is None else _parse_text(f"{where}: text", text),
            )
        )
    return tuple(events)


def _parse_item(where: str, entry: object, catalogue: Mapping[str, Item] | None, remarks: _RequestNotes) -> Item:
    """Return an item with its text, from the request or else from the catalogue."""
    if isinstance(entry, Mapping):
        item_id = _parse_optional_id(f"{where}: item_id", entry.get("item_id"))
        raw_title = entry.get("title")
        title = "" if raw_title is None else _parse_text(f"{where}: title", raw_title)
        fields = _parse_fields(where, entry)
    elif catalogue is None:
        item_id, fields = None, {}
        title = str(entry) if is_integer(entry) else _parse_text(where, entry)
    else:
        item_id, title, fields = _parse_optional_id(where, entry), "", {}
    known = None if catalogue is None or item_id is None else catalogue.get(item_id)
    if not clean(title) and known is not None:
        title = known.title
        if title and clean(title) == title and not fields:
            return known
    if not clean(title):
        if item_id is None:
            raise DataError(
                f"{where} has neither an item_id nor a title; add one of them", kind="missing-value", column=where
            )
        raise _UnknownItem(item_id)
    name = item_id or clean(title)
    if item_id is None:
        remarks.titled.add(name)
    if _is_too_long(title):
        remarks.cut.append(name)
    return Item(item_id=name, title=clean(title), fields=fields if known is None else {**known.fields, **fields})


def _parse_fields(where: str, entry: Mapping[object, object]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for key, value in entry.items():
        if key in _ITEM_KEYS:
            continue
        name = _parse_text(f"{where}: a key", key)
        if value is None:
            continue
        if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            value = ", ".join(value)
        elif isinstance(value, int | float | Decimal | date):
            value = str(value)
        fields[name] = _parse_text(f"{where}: {name}", value)
    return fields


# --------------------------------------------------------------------------- single values


def _parse_list(key: str, value: object) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise DataError(f"{key!r} is {_describe_type(value)}; give a list of items", kind="bad-value", column=key)
    return value


def _parse_text(what: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is {_describe_type(value)}; give a text", kind="bad-value", column=what)
    if has_invalid_characters(value):
        raise DataError(
            f"{what} contains an invalid character (NUL, or half of a surrogate pair); remove it",
            kind="encoding",
            column=what,
        )
    return value


def _parse_profile(profile: object) -> tuple[str, dict[str, str]]:
    """Parse the text about a user, given as one text or as fields by name, such as an age."""
    if not isinstance(profile, Mapping):
        return ("" if profile is None else _parse_text("profile", profile)), {}
    # missing values of data frames are NaN
    known = {name: value for name, value in profile.items() if value is not None and value == value}
    values = {clean(_parse_text("profile", name)): value for name, value in known.items()}
    fields = {
        name: str(int(value) if is_integer(value) else value)
        for name, value in values.items()
        if _is_text_or_number(value)
    }
    if len(fields) < len(values):
        name = next(name for name in values if name not in fields)
        message = f"profile: {name[:60]!r} is {_describe_type(values[name])}; give a text or a number"
        raise DataError(message, kind="bad-value", column="profile")
    return "", {name: clean(_parse_text("profile", value)) for name, value in fields.items()}


def _is_text_or_number(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _parse_optional_id(what: str, value: object) -> str | None:
    """Return an id as text; integers are valid ids, even if a library converted them to floats."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if is_integer(value):
        return str(int(value))
    if not isinstance(value, str):
        raise DataError(
            f"{what} is {_describe_type(value)}; give a text or a whole number", kind="bad-value", column=what
        )
    if len(value) > ID_LIMIT:
        raise DataError(
            f"{what} is {len(value)} characters long, more than the {ID_LIMIT} of an id; shorten it",
            kind="too-large",
            column=what,
        )
    if not value.isprintable() and (has_invalid_characters(value) or _CONTROL.search(value)):
        raise DataError(f"{what} contains a control character; remove it", kind="bad-value", column=what)
    return value if value.strip() else None


def is_integer(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is an integer; ids may be integers."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def _parse_number(what: str, value: object) -> float | None:
    if value is None:
        return None
    try:
        result = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise DataError(
            f"{what} is {_describe_type(value)} that is not a finite number; write a number, or remove the key",
            kind="bad-value",
            column=what,
        )
    return result


def _parse_timestamp(what: str, value: object) -> float | None:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            return _parse_number(what, value)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return _parse_number(what, value)


def _describe_type(value: object) -> str:
    names = {
        str: "a text",
        bytes: "bytes instead of text",
        bool: "true or false",
        dict: "an object",
        list: "a list",
        int: "a number",
        float: "a number",
    }
    return "missing" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _is_too_long(text: str) -> bool:
    return len(text) > TITLE_LIMIT and clean(text) != clean(text, len(text))


def format_few_names(names: Sequence[str]) -> str:
    """Return the first few names as one text."""
    return format_name_list([repr(shorten_text(name, 60)) for name in names], _MAX_NAMED)


@lru_cache(maxsize=1024)  # all rows of a table have the same keys
def _misspelling_hint(key: str) -> str:
    return "" if key in REQUEST_KEYS else did_you_mean(key, REQUEST_KEYS)
