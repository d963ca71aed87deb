"""Tables that are not UTF-8: UTF-16 with its mark, and Windows-1252 where nothing else is likely; both are told."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from llmrec.data.read.limits import shown
from llmrec.errors import DataError
from llmrec.terminal import logger

log = logger(__name__)

Read = TypeVar("Read")

_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# UTF-32 begins like UTF-16 with a NUL character.
_NO_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_BEYOND = re.compile(rb"[\x80-\xff]+")
# Letters that stand alone between plain ones, as in Western languages; elsewhere whole words are beyond ASCII.
_LONGEST_RUN = 1.5
_LOOKED_AT = 200_000
# What texts of Western languages are written with; of what is beyond ASCII, nearly all of it has to be.
_LETTERS = "äáàâãåæçéèêëíìîïñóòôöõøœúùûüßýžšðþ"
_USUAL = frozenset(_LETTERS + _LETTERS.upper() + "‘’‚“”„–—…•·«»‹›°ºª¡¿€£¥§©®™\xa0´²³½¼")
_LEAST = 0.9


def in_any_encoding(name: str, raw: bytes, read: Callable[[bytes], Read]) -> Read:
    """Read a table as UTF-8, or else in the encoding that it seems to have, with a warning that says which.

    Args:
        name: What messages call it.
        raw: The bytes.
        read: Reads UTF-8.

    Raises:
        DataError: As ``read``, where no other encoding is likely.
    """
    try:
        return read(raw)
    except DataError as error:
        again = None if error.kind != "encoding" else _other(raw)
        if again is None:
            raise
    encoding, text = again
    odd = Counter(mark for mark in text if mark > "\x7f")
    log.warning(
        "%s is no UTF-8 and was read as %s: %d characters are beyond ASCII, such as %s; if they look wrong, save the "
        "file as UTF-8",
        *(name, encoding, sum(odd.values()), ", ".join(shown(mark) for mark, _ in odd.most_common(5)) or "none"),
    )
    return read(text.encode())


def _other(raw: bytes) -> tuple[str, str] | None:
    """Return the name of an encoding and the text; None if none is likely."""
    if raw.startswith(_MARKS) and not raw.startswith(_NO_MARKS):
        try:
            return "UTF-16", raw.decode("utf-16")
        except UnicodeDecodeError:
            return None
    runs = [len(run) for run in _BEYOND.findall(raw[: 100 * _LOOKED_AT])[:_LOOKED_AT]]
    if b"\0" in raw or not runs or sum(runs) / len(runs) > _LONGEST_RUN:
        return None
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        pass
    else:
        return None  # what is wrong with it is no matter of its encoding
    try:
        text = raw.decode("cp1252")
    except UnicodeDecodeError:
        return None
    odd = Counter(mark for mark in text if mark > "\x7f")
    usual = sum(count for mark, count in odd.items() if mark in _USUAL)
    return ("Windows-1252", text) if usual >= _LEAST * sum(odd.values()) else None
