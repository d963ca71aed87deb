"""Generated parts of pages, between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""

from __future__ import annotations


def put(text: str, name: str, part: str) -> str:
    """Return a page with the content of a generated part replaced; unchanged if it has no such part."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(start)
    return f"{before}{start}\n\n{part}\n\n{end}{rest.partition(end)[2]}" if found else text
