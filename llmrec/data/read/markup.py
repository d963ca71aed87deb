"""HTML in titles and texts, as shops and scraped pages write it: what is decoded, left out, and no title at all."""

from __future__ import annotations

import html
import re
from html.entities import html5

_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Tags within a word or a line, and those that part two of them.
_INLINE = "a|abbr|b|big|em|font|i|nobr|small|span|strike|strong|sub|sup|tt|u|wbr"
_BLOCK = (
    "article|blockquote|body|br|center|dd|div|dl|dt|figure|h[1-6]|head|hr|html|img|input|li|ol|p|pre|section|table|"
    "tbody|td|tfoot|th|thead|tr|ul"
)
# What stands between these is no text.
_CODE = "iframe|link|meta|script|style"
_TAG = re.compile(rf"</?(?:({_INLINE})|{_BLOCK})(?:\s[^<>]*)?/?>|<!--[^<>]*-->", re.IGNORECASE)
# A tag, whole or cut off, and what is left of one whose beginning was cut off.
_MARKUP = re.compile(
    rf"</?(?:{_INLINE}|{_BLOCK}|{_CODE})(?:\s[^<>]*)?(?:/?>|$)|\b(?:class|href|id|src|style|data-[\w-]+|aria-\w+)=[\"']",
    re.IGNORECASE,
)


def has_markup(text: str) -> bool:
    """Whether a text holds HTML; where it does after `plain`, a scraped page was cut off, and it is no title."""
    return ("<" in text or "=" in text) and _MARKUP.search(text) is not None


def plain(text: str) -> str:
    """Return a text without HTML tags and with its entities decoded, once: ``<p>A &amp; B</p>`` becomes ``A & B``.

    ``AT&T``, ``<3`` and tags that are not of HTML stay. Tags that were written as entities go too, as feeds of shops
    have them. A tag of a block parts words; where tags went, white space becomes single spaces.
    """
    if "&" not in text and "<" not in text:
        return text
    return _untagged(_ENTITY.sub(_meant, _untagged(text)))


def _untagged(text: str) -> str:
    result, count = _TAG.subn(lambda tag: "" if tag[1] else " ", text) if "<" in text else (text, 0)
    return " ".join(result.split()) if count else text


def _meant(found: re.Match[str]) -> str:
    # The library also decodes names without a semicolon, and so the start of a longer word.
    meant = html.unescape(found[0]) if found[0][1] == "#" else html5.get(found[0][1:], found[0])
    return meant.replace("\xa0", " ")  # a space that only says where no line may end
