"""Escaping of texts in Markdown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.display import flat
from llmrec.report.escape import cell, code
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
    assert cell(text) == expected


_MARKS = st.text("-+=:.)(0123 #*_`~$|\\<>&[]!\"'ab\n\t", max_size=16)


@given(st.text() | _MARKS)
def test_cell_is_one_paragraph_and_one_cell(text: str) -> None:
    escaped = cell(text)
    assert blocks(escaped) == (["paragraph_open", "inline", "paragraph_close"] if escaped else [])
    shown = "".join(child.content for token in parser().parse(escaped) for child in token.children or ())
    assert shown == flat(text)
    table = "| a | b |\n|---|---|\n| {} | x |\n"
    assert blocks(table.format(escaped)) == blocks(table.format("a"))


@given(st.text() | _MARKS)
def test_code_is_text(text: str) -> None:
    escaped = code(text)
    children = [child for token in parser().parse(f"see {escaped}") for child in token.children or ()]
    assert {child.type for child in children} <= {"text", "text_special", "code_inline"}
    assert "".join(child.content for child in children).strip() == f"see {flat(text)}".strip()
    assert blocks(f"see {escaped}") == ["paragraph_open", "inline", "paragraph_close"]
