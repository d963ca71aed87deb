"""Codes created by other programs, read from a file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmrec.data.read.files import read_bytes, user_path
from llmrec.data.read.limits import enumerated, reason, require_file, shown
from llmrec.data.read.table import read_table
from llmrec.data.read.text import decode
from llmrec.errors import DataError, ErrorKind, Location
from llmrec.guard import clean, is_item_token, without_item_tokens
from llmrec.index.table import LETTERS, Embed, ItemIndex, token
from llmrec.recipe.schema import IndexSection
from llmrec.types import Item

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset

Kind = Literal["tokens", "numbers", "text"]
Pieces = tuple[str, ...]

# The JSON Lines reader joins lists of texts by commas.
_TOKENS = re.compile(r"\s*(?:<[^<>\s]+>[\s,]*)+")
_NUMBERS = re.compile(r"[0-9]+(?:[-\s]+[0-9]+)*")
_MOST = 9  # digits of a number
_ITEM, _CODE = "item_id", "code"
_FORMS = "a list of numbers, a list of item tokens such as <a_3>, or text"


class External:
    """Codes read from a file.

    The file is a JSON object with item ids as keys, or a table with the columns ``item_id`` and ``code``. A code is a
    list of numbers, one per level (in a table separated by spaces or hyphens), concatenated item tokens, or text. Codes
    of items that are not in the data are kept in the settings, so that `extend` can use them.
    """

    @staticmethod
    def build(section: IndexSection, data: SplitDataset, *, seed: int, embed: Embed | None = None) -> ItemIndex:
        """Assign codes to items; see `Scheme`.

        Raises:
            DataError: If the file cannot be read, a code is malformed, two items share one, a code is a prefix of
                another, or an item of the data has none.
        """
        path = user_path(section.path or "")
        require_file(path, "check index.path")
        rows, sha256 = _object(path) if path.suffix.lower() == ".json" else _table(path)
        kind = _kind(rows)
        codes = {row.item: _pieces(row, kind) for row in rows}
        _check_distinct(rows, codes, kind)
        items = sorted(data.dataset.items)
        missing = [item for item in items if item not in codes]
        if missing:
            raise DataError(
                f"{path}: {len(missing)} of {len(items)} items have no code, such as {enumerated(missing[:3])}; add "
                "codes for these items, or drop them from the data",
                kind="missing-value",
                at=path,
                column=_CODE,
            )
        known = {item: codes[item] for item in items}
        spare = {item: list(codes[item]) for item in sorted(codes.keys() - known.keys())}
        tokens = {piece for pieces in known.values() for piece in pieces} if kind != "text" else set()
        return ItemIndex(
            "external",
            known,
            tokens=tuple(sorted(tokens, key=_token_order)),
            settings={"kind": kind, "sha256": sha256, "spare": spare},
            figures={"spare": float(len(spare)), "longest": float(max(map(len, known.values()), default=0))},
        )

    @staticmethod
    def extend(index: ItemIndex, items: Mapping[str, Item], *, embed: Embed | None = None) -> ItemIndex:
        """Add items with their codes from the file; see `Scheme`.

        Tokens that no earlier item has are added; a trained model has not learned them.

        Raises:
            DataError: If the file has no code for an item.
        """
        spare: Mapping[str, Sequence[str]] = index.settings["spare"]
        missing = [item for item in sorted(items) if item not in spare]
        if missing:
            raise DataError(
                f"index external: the file of codes has no code for {len(missing)} new items, such as "
                f"{enumerated(missing[:3])}; add codes to the file and build the index again",
                kind="missing-value",
            )
        codes = {item: tuple(spare[item]) for item in sorted(items)}
        tokens = {piece for pieces in codes.values() for piece in pieces} if index.tokens else set()
        left = {item: list(pieces) for item, pieces in spare.items() if item not in codes}
        return index.adding(codes, sorted(tokens, key=_token_order), spare=left)


@dataclass(frozen=True)
class _Row:
    """A code in the file: text as in a table, or a list."""

    location: Location
    item: str
    code: str | list[object]

    @property
    def where(self) -> str:
        return f"{self.location}, item {shown(self.item)}"

    def error(self, kind: ErrorKind, problem: str) -> DataError:
        return DataError(f"{self.where}: {problem}", kind=kind, at=self.location, column=_CODE)


# --------------------------------------------------------------------------- files


def _object(path: Path) -> tuple[list[_Row], str]:
    raw, sha256 = read_bytes(path)
    rows: list[_Row] = []

    def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if repeated:
            raise DataError(
                f"{path}: the item {shown(repeated[0])} is repeated; keep one entry",
                kind="duplicate",
                at=path,
                column=_ITEM,
            )
        return dict(pairs)

    try:
        result = json.loads(decode(str(path), raw), object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not JSON ({reason(error)}); write one object of lists by item id", kind="syntax", at=path
        ) from error
    if not isinstance(result, dict) or not result:
        raise DataError(
            f"{path} is not a JSON object of codes; write one object of lists by item id", kind="wrong-format", at=path
        )
    for item, code in result.items():
        row = _Row(Location(str(path)), item, code)
        if not isinstance(code, str | list):
            raise row.error("bad-value", f"{shown(code)} is not a code; write {_FORMS}")
        rows.append(row)
    return rows, sha256


def _table(path: Path) -> tuple[list[_Row], str]:
    table = read_table(path)
    for column in (_ITEM, _CODE):
        if column in table.unusable:
            raise DataError(
                f"{path}: the column {column} is of type {table.unusable[column]}; write numbers separated by "
                "spaces, lists of item tokens, or a JSON object of lists",
                kind="bad-value",
                at=path,
                column=column,
            )
        if column not in table.frame.columns:
            raise DataError(
                f"{path}: a table of codes requires the columns {_ITEM} and {_CODE}, but there is no {column} among "
                f"{enumerated(table.frame.columns)}; rename a column",
                kind="missing-column",
                at=path,
                column=column,
            )
    first: dict[str, int] = {}
    rows: list[_Row] = []
    for number, (item, code) in enumerate(table.frame.select(_ITEM, _CODE).iter_rows()):
        location = table.where(number)
        if item is None or not str(item).strip():
            raise DataError(
                f"{location}: the {_ITEM} is missing; add the {_ITEM}, or remove the row",
                kind="missing-value",
                at=location,
                column=_ITEM,
            )
        row = _Row(location, str(item), code if isinstance(code, list) else "" if code is None else str(code))
        if row.item in first:
            raise DataError(
                f"{row.where} is also in row {first[row.item] + 1}; keep one row",
                kind="duplicate",
                at=location,
                column=_ITEM,
            )
        first[row.item] = number
        rows.append(row)
    return rows, table.sha256


# --------------------------------------------------------------------------- codes


def _kind(rows: Sequence[_Row]) -> Kind:
    """Return the type that all codes of a file have."""
    kinds = [_kind_of(row) for row in rows]
    result = dict.fromkeys(kinds)
    lone = all(
        isinstance(row.code, str) and row.code.strip().isdecimal()
        for row, k in zip(rows, kinds, strict=True)
        if k == "numbers"
    )
    if lone and result.keys() == {"numbers", "text"}:
        return "text"
    if len(result) > 1:
        other = next(index for index, kind in enumerate(kinds) if kind != kinds[0])
        raise rows[other].error(
            "contradiction",
            f"the code {shown(rows[other].code)} consists of {kinds[other]}, but the code of item "
            f"{shown(rows[0].item)} of {kinds[0]}; use the same format for all codes of a file",
        )
    return kinds[0]


def _kind_of(row: _Row) -> Kind:
    code = row.code
    if not (code.strip() if isinstance(code, str) else code):
        entry = "row" if isinstance(code, str) else "item"
        raise row.error("missing-value", f"the code is empty; add a code, or remove the {entry}")
    if isinstance(code, str):
        if _TOKENS.fullmatch(code):
            return "tokens"
        return "numbers" if _NUMBERS.fullmatch(code.strip()) else "text"
    if all(isinstance(piece, int) and not isinstance(piece, bool) for piece in code):
        return "numbers"
    if not all(isinstance(piece, str) for piece in code):
        raise row.error("bad-value", f"{shown(code)} is not a code; write {_FORMS}")
    return "tokens" if all(_TOKENS.fullmatch(str(piece)) for piece in code) else "text"


def _pieces(row: _Row, kind: Kind) -> Pieces:
    code = row.code
    text = code if isinstance(code, str) else "".join(map(str, code))
    if kind == "text":
        return (_line(row, text),)
    if kind == "tokens":
        pieces = re.findall(r"<[^<>\s]+>", text)
        wrong = next((piece for piece in pieces if not is_item_token(piece)), None)
        if wrong is not None:
            raise row.error(
                "bad-value", f"{shown(wrong)} is not an item token; write it as {token(0, 12)} or <item_12>"
            )
        return tuple(pieces)
    numbers = re.findall("[0-9]+", code) if isinstance(code, str) else [str(number) for number in code]
    wrong = next((n for n in numbers if not n.isdecimal() or len(n) > _MOST), None)
    if wrong is not None:
        raise row.error("bad-value", f"{shown(wrong)} is not a token number; use 0 to {10**_MOST - 1}")
    if len(numbers) > len(LETTERS):
        raise row.error("too-large", f"the code has {len(numbers)} levels, more than {len(LETTERS)}; shorten it")
    return tuple(token(level, int(number)) for level, number in enumerate(numbers))


def _line(row: _Row, text: str) -> str:
    line = clean(text, len(text))
    if not line or len(text.strip().splitlines()) != 1:
        raise row.error("bad-value", f"the code {shown(text)} is not a single line; rewrite it")
    if without_item_tokens(line) != line:
        raise row.error("bad-value", f"the code {shown(text)} mixes item tokens and text; use either")
    return line


def _check_distinct(rows: Sequence[_Row], codes: Mapping[str, Pieces], kind: Kind) -> None:
    """Check that codes are unique, and that no token code is a prefix of another."""
    first: dict[Pieces, str] = {}
    for row in rows:
        # White space in text codes is ignored when they are decoded.
        pieces = tuple(" ".join(piece.split()) for piece in codes[row.item])
        other = first.setdefault(pieces, row.item)
        if other != row.item:
            raise row.error(
                "duplicate",
                f"the code {shown(''.join(codes[row.item]))} is also the code of item {shown(other)}; make the codes "
                "unique, for example with an additional number",
            )
    if kind == "text":
        return
    for row in rows:
        pieces = codes[row.item]
        shorter = next((pieces[:n] for n in range(1, len(pieces)) if pieces[:n] in first), None)
        if shorter is not None:
            raise row.error(
                "duplicate",
                f"the code {''.join(pieces)} begins with the code {''.join(shorter)} of item "
                f"{shown(first[shorter])}, so codes are ambiguous; lengthen the shorter code",
            )


def _token_order(piece: str) -> tuple[int, str, int, str]:
    """Return the sort key of a token by level and number, with item tokens last."""
    name, _, number = piece[1:-1].rpartition("_")
    return len(name), name, int(number), number
