"""Removes HTML from titles and texts, as found in shop exports and scraped pages."""

from __future__ import annotations

import html
import re
from html.entities import html5

_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Inline tags, and tags that separate words or lines.
_INLINE = "a|abbr|b|big|em|font|i|nobr|small|span|strike|strong|sub|sup|tt|u|wbr"
_BLOCK = (
    "article|blockquote|body|br|center|dd|div|dl|dt|figure|h[1-6]|head|hr|html|img|input|li|ol|p|pre|section|table|"
    "tbody|td|tfoot|th|thead|tr|ul"
)
# Elements whose content is not text.
_CODE = "iframe|link|meta|script|style"
_TAG = re.compile(rf"</?(?:({_INLINE})|{_BLOCK})(?:\s[^<>]*)?/?>|<!--[^<>]*-->", re.IGNORECASE)
# A tag, complete or truncated at either end.
_MARKUP = re.compile(
    rf"</?(?:{_INLINE}|{_BLOCK}|{_CODE})(?:\s[^<>]*)?(?:/?>|$)|\b(?:class|href|id|src|style|data-[\w-]+|aria-\w+)=[\"']",
    re.IGNORECASE,
)


def has_markup(text: str) -> bool:
    """Whether a text contains HTML, even after `remove_markup` has removed complete tags."""
    return ("<" in text or "=" in text) and _MARKUP.search(text) is not None


def remove_markup(text: str) -> str:
    """Return a text without HTML tags and with entities decoded once: ``<p>A &amp; B</p>`` becomes ``A & B``.

    ``AT&T``, ``<3`` and tags unknown to HTML stay. Tags written as entities are removed too, because feeds of shops
    have them. A block tag separates words; where tags were removed, white space becomes single spaces.
    """
    if "&" not in text and "<" not in text:
        return text
    return _remove_tags(_ENTITY.sub(_decode_entity, _remove_tags(text)))


def _remove_tags(text: str) -> str:
    result, count = _TAG.subn(lambda tag: "" if tag[1] else " ", text) if "<" in text else (text, 0)
    return " ".join(result.split()) if count else text


def _decode_entity(match: re.Match[str]) -> str:
    # Python also decodes entities without a semicolon, which may be the beginning of an ordinary word.
    decoded = html.unescape(match[0]) if match[0][1] == "#" else html5.get(match[0][1:], match[0])
    return decoded.replace("\xa0", " ")  # a no-break space
