"""Texts on their way out, each form by its worst cases; what the tables do with them is tested beside the tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.report.escape import cell, code, flat
from tests.report.reading import blocks, parser


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- item", "\\- item"),
        ("+1", "\\+1"),
        ("---", "\\---"),
        ("===", "\\==="),
        (": definition", "\\: definition"),
        ("1. Alien", "1\\. Alien"),
        ("12) Alien", "12\\) Alien"),
        ("1.5 stars", "1.5 stars"),
        ("1984", "1984"),
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
def test_a_cell_is_one_paragraph_of_text(text: str) -> None:
    said = cell(text)
    kinds = blocks(said)
    assert kinds == (["paragraph_open", "inline", "paragraph_close"] if said else [])
    shown = "".join(child.content for token in parser().parse(said) for child in token.children or ())
    assert shown == flat(text)


@given(st.text() | _MARKS)
def test_a_cell_fills_one_cell(text: str) -> None:
    kinds = blocks(f"| a | b |\n|---|---|\n| {cell(text)} | x |\n")
    assert kinds == blocks("| a | b |\n|---|---|\n| a | x |\n")


@given(st.text() | _MARKS)
def test_code_is_text_in_a_span_or_text(text: str) -> None:
    said = code(text)
    children = [child for token in parser().parse(f"see {said}") for child in token.children or ()]
    assert {child.type for child in children} <= {"text", "text_special", "code_inline"}
    assert "".join(child.content for child in children).strip() == f"see {flat(text)}".strip()
    assert blocks(f"see {said}") == ["paragraph_open", "inline", "paragraph_close"]
