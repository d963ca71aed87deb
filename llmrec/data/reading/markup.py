"""HTML in texts of scraped pages: entities are decoded, and what is a page's own markup is told."""

from __future__ import annotations

import html
import re
from html.entities import html5

_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Tags of HTML, whole or cut off, and what is left of a tag whose beginning was cut off.
_TAGS = "a|b|br|div|em|font|h[1-6]|i|img|input|li|link|meta|p|script|span|strong|style|table|tbody|td|th|tr|u|ul"
_MARKUP = re.compile(
    rf"</?(?:{_TAGS})(?:\s[^<>]*)?(?:/?>|$)|\b(?:class|href|id|src|style|data-[\w-]+|aria-\w+)=[\"']", re.IGNORECASE
)


def has_markup(text: str) -> bool:
    """Whether a text holds HTML, as scraped pages leave it where a title should be."""
    return ("<" in text or "=" in text) and _MARKUP.search(text) is not None


def plain(text: str) -> str:
    """Return a text with its HTML entities decoded, once: ``&amp;`` becomes ``&``, ``AT&T`` stays."""
    return _ENTITY.sub(_meant, text) if "&" in text else text


def _meant(found: re.Match[str]) -> str:
    # The library also decodes names without a semicolon, and so the start of a longer word.
    return html.unescape(found[0]) if found[0][1] == "#" else html5.get(found[0][1:], found[0])
