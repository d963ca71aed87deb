"""Reads Markdown as a page that lets everything through would: HTML, and links of any kind."""

from __future__ import annotations

from markdown_it import MarkdownIt


def parser() -> MarkdownIt:
    """Return a parser that refuses nothing, not even a link to a script."""
    found = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found.validateLink = lambda url: True  # type: ignore[method-assign]
    return found


def blocks(text: str) -> list[str]:
    """Return the kinds of all tokens of a Markdown page, of which none may be HTML, a link or an image."""
    kinds = [child.type for token in parser().parse(text) for child in (token, *(token.children or ()))]
    assert not {"html_block", "html_inline", "link_open", "image"} & set(kinds)
    # How often text is cut at an escape says nothing, and a hash stands in a code span where it can.
    return [kind for kind in kinds if kind not in ("text", "text_special", "softbreak", "code_inline")]
