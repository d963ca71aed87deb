"""Escaping of texts in Markdown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.display import single_line
from llmrec.report.escape import code_span, escape_cell
from tests.report.reading import blocks, parser


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- item", "\\- item"),
        ("12) Alien", "12\\) Alien"),
        ("1.5 stars", "1.5 stars"),
        ("# x", "\\# x"),
        ("a_b _c_", "a_b \\_c\\_"),
        ("[x](y) [x][y] [x]: y", "[x\\](y) [x\\][y] [x\\]: y"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
    ],
)
def test_cells_by_hand(text: str, expected: str) -> None:
    assert escape_cell(text) == expected


_MARKS = st.text("-+=:.)(0123 #*_`~$|\\<>&[]!\"'ab\n\t", max_size=16)


@given(st.text() | _MARKS)
def test_cell_is_one_paragraph_and_one_cell(text: str) -> None:
    escaped = escape_cell(text)
    assert blocks(escaped) == (["paragraph_open", "inline", "paragraph_close"] if escaped else [])
    shown = "".join(child.content for token in parser().parse(escaped) for child in token.children or ())
    assert shown == single_line(text)
    table = "| a | b |\n|---|---|\n| {} | x |\n"
    assert blocks(table.format(escaped)) == blocks(table.format("a"))


@given(st.text() | _MARKS)
def test_code_is_text(text: str) -> None:
    escaped = code_span(text)
    children = [child for token in parser().parse(f"see {escaped}") for child in token.children or ()]
    assert {child.type for child in children} <= {"text", "text_special", "code_inline"}
    assert "".join(child.content for child in children).strip() == f"see {single_line(text)}".strip()
    assert blocks(f"see {escaped}") == ["paragraph_open", "inline", "paragraph_close"]
