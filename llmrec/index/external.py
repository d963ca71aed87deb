"""Codes created by other programs, read from a file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmrec.data.read.files import expand_path, read_bytes
from llmrec.data.read.limits import check_regular_file, format_error, format_names, format_value
from llmrec.data.read.table import read_table
from llmrec.data.read.text import decode_file
from llmrec.errors import DataError, ErrorKind, Location
from llmrec.guard import break_item_tokens, clean, is_item_token
from llmrec.index.table import LETTERS, Embed, ItemIndex, level_token
from llmrec.recipe.schema import IndexSection
from llmrec.types import Item

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset

CodeKind = Literal["tokens", "numbers", "text"]
Pieces = tuple[str, ...]

# The JSON Lines reader joins lists of texts by commas.
_TOKENS = re.compile(r"\s*(?:<[^<>\s]+>[\s,]*)+")
_NUMBERS = re.compile(r"[0-9]+(?:[-\s]+[0-9]+)*")
_MAX_DIGITS = 9  # digits of a number
_ITEM_COLUMN, _CODE_COLUMN = "item_id", "code"
_CODE_FORMATS = "a list of numbers, a list of item tokens such as <a_3>, or text"


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
        path = expand_path(section.path or "")
        check_regular_file(path, "check index.path")
        rows, sha256 = _read_json_codes(path) if path.suffix.lower() == ".json" else _read_code_table(path)
        kind = _common_code_kind(rows)
        codes = {row.item: _parse_pieces(row, kind) for row in rows}
        _check_distinct(rows, codes, kind)
        items = sorted(data.dataset.items)
        missing = [item for item in items if item not in codes]
        if missing:
            raise DataError(
                f"{path}: {len(missing)} of {len(items)} items have no code, such as {format_names(missing[:3])}; add "
                "codes for these items, or drop them from the data",
                kind="missing-value",
                at=path,
                column=_CODE_COLUMN,
            )
        known = {item: codes[item] for item in items}
        spare = {item: list(codes[item]) for item in sorted(codes.keys() - known.keys())}
        tokens = {piece for pieces in known.values() for piece in pieces} if kind != "text" else set()
        return ItemIndex(
            "external",
            known,
            tokens=tuple(sorted(tokens, key=_token_sort_key)),
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
                f"{format_names(missing[:3])}; add codes to the file and build the index again",
                kind="missing-value",
            )
        codes = {item: tuple(spare[item]) for item in sorted(items)}
        tokens = {piece for pieces in codes.values() for piece in pieces} if index.tokens else set()
        left = {item: list(pieces) for item, pieces in spare.items() if item not in codes}
        return index.adding(codes, sorted(tokens, key=_token_sort_key), spare=left)


@dataclass(frozen=True)
class _CodeRow:
    """A code in the file: text as in a table, or a list."""

    location: Location
    item: str
    code: str | list[object]

    @property
    def where(self) -> str:
        return f"{self.location}, item {format_value(self.item)}"

    def error(self, kind: ErrorKind, problem: str) -> DataError:
        return DataError(f"{self.where}: {problem}", kind=kind, at=self.location, column=_CODE_COLUMN)


# --------------------------------------------------------------------------- files


def _read_json_codes(path: Path) -> tuple[list[_CodeRow], str]:
    raw, sha256 = read_bytes(path)
    rows: list[_CodeRow] = []

    def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if repeated:
            raise DataError(
                f"{path}: the item {format_value(repeated[0])} is repeated; keep one entry",
                kind="duplicate",
                at=path,
                column=_ITEM_COLUMN,
            )
        return dict(pairs)

    try:
        result = json.loads(decode_file(str(path), raw), object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not JSON ({format_error(error)}); write one object of lists by item id", kind="syntax", at=path
        ) from error
    if not isinstance(result, dict) or not result:
        raise DataError(
            f"{path} is not a JSON object of codes; write one object of lists by item id", kind="wrong-format", at=path
        )
    for item, code in result.items():
        row = _CodeRow(Location(str(path)), item, code)
        if not isinstance(code, str | list):
            raise row.error("bad-value", f"{format_value(code)} is not a code; write {_CODE_FORMATS}")
        rows.append(row)
    return rows, sha256


def _read_code_table(path: Path) -> tuple[list[_CodeRow], str]:
    table = read_table(path)
    for column in (_ITEM_COLUMN, _CODE_COLUMN):
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
                f"{path}: a table of codes requires the columns {_ITEM_COLUMN} and {_CODE_COLUMN}, but there is no "
                f"{column} among {format_names(table.frame.columns)}; rename a column",
                kind="missing-column",
                at=path,
                column=column,
            )
    first: dict[str, int] = {}
    rows: list[_CodeRow] = []
    for number, (item, code) in enumerate(table.frame.select(_ITEM_COLUMN, _CODE_COLUMN).iter_rows()):
        location = table.where(number)
        if item is None or not str(item).strip():
            raise DataError(
                f"{location}: the {_ITEM_COLUMN} is missing; add the {_ITEM_COLUMN}, or remove the row",
                kind="missing-value",
                at=location,
                column=_ITEM_COLUMN,
            )
        row = _CodeRow(location, str(item), code if isinstance(code, list) else "" if code is None else str(code))
        if row.item in first:
            raise DataError(
                f"{row.where} is also in row {first[row.item] + 1}; keep one row",
                kind="duplicate",
                at=location,
                column=_ITEM_COLUMN,
            )
        first[row.item] = number
        rows.append(row)
    return rows, table.sha256


# --------------------------------------------------------------------------- codes


def _common_code_kind(rows: Sequence[_CodeRow]) -> CodeKind:
    """Return the type that all codes of a file have."""
    kinds = [_code_kind(row) for row in rows]
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
            f"the code {format_value(rows[other].code)} consists of {kinds[other]}, but the code of item "
            f"{format_value(rows[0].item)} of {kinds[0]}; use the same format for all codes of a file",
        )
    return kinds[0]


def _code_kind(row: _CodeRow) -> CodeKind:
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
        raise row.error("bad-value", f"{format_value(code)} is not a code; write {_CODE_FORMATS}")
    return "tokens" if all(_TOKENS.fullmatch(str(piece)) for piece in code) else "text"


def _parse_pieces(row: _CodeRow, kind: CodeKind) -> Pieces:
    code = row.code
    text = code if isinstance(code, str) else "".join(map(str, code))
    if kind == "text":
        return (_parse_text_code(row, text),)
    if kind == "tokens":
        pieces = re.findall(r"<[^<>\s]+>", text)
        wrong = next((piece for piece in pieces if not is_item_token(piece)), None)
        if wrong is not None:
            raise row.error(
                "bad-value",
                f"{format_value(wrong)} is not an item token; write it as {level_token(0, 12)} or <item_12>",
            )
        return tuple(pieces)
    numbers = re.findall("[0-9]+", code) if isinstance(code, str) else [str(number) for number in code]
    wrong = next((n for n in numbers if not n.isdecimal() or len(n) > _MAX_DIGITS), None)
    if wrong is not None:
        raise row.error("bad-value", f"{format_value(wrong)} is not a token number; use 0 to {10**_MAX_DIGITS - 1}")
    if len(numbers) > len(LETTERS):
        raise row.error("too-large", f"the code has {len(numbers)} levels, more than {len(LETTERS)}; shorten it")
    return tuple(level_token(level, int(number)) for level, number in enumerate(numbers))


def _parse_text_code(row: _CodeRow, text: str) -> str:
    line = clean(text, len(text))
    if not line or len(text.strip().splitlines()) != 1:
        raise row.error("bad-value", f"the code {format_value(text)} is not a single line; rewrite it")
    if break_item_tokens(line) != line:
        raise row.error("bad-value", f"the code {format_value(text)} mixes item tokens and text; use either")
    return line


def _check_distinct(rows: Sequence[_CodeRow], codes: Mapping[str, Pieces], kind: CodeKind) -> None:
    """Check that codes are unique, and that no token code is a prefix of another."""
    first: dict[Pieces, str] = {}
    for row in rows:
        # White space in text codes is ignored when they are decoded.
        pieces = tuple(" ".join(piece.split()) for piece in codes[row.item])
        other = first.setdefault(pieces, row.item)
        if other != row.item:
            raise row.error(
                "duplicate",
                f"the code {format_value(''.join(codes[row.item]))} is also the code of item {format_value(other)}; "
                "make the codes unique, for example with an additional number",
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
                f"{format_value(first[shorter])}, so codes are ambiguous; lengthen the shorter code",
            )


def _token_sort_key(piece: str) -> tuple[int, str, int, str]:
    """Return the sort key of a token by level and number, with item tokens last."""
    name, _, number = piece[1:-1].rpartition("_")
    return len(name), name, int(number), number
