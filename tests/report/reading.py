"""Parses Markdown without any filter: HTML and links of any kind are allowed."""

from __future__ import annotations

from markdown_it import MarkdownIt


def parser() -> MarkdownIt:
    """Return a parser that allows everything, even a link to a script."""
    result = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    result.validateLink = lambda url: True  # type: ignore[method-assign]
    return result


def blocks(text: str) -> list[str]:
    """Return the kinds of all tokens of a Markdown page; none may be HTML, a link or an image."""
    kinds = [child.type for token in parser().parse(text) for child in (token, *(token.children or ()))]
    assert not {"html_block", "html_inline", "link_open", "image"} & set(kinds)
    # Escapes split texts, and a hash is a code span where possible.
    return [kind for kind in kinds if kind not in ("text", "text_special", "softbreak", "code_inline")]
