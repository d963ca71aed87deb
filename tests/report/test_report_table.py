"""Markdown, CSV and console tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from llmrec.data.cells import escape_cell, unescape_cells
from llmrec.report.render import render_markdown_page
from llmrec.report.results import parse_results
from llmrec.report.table import CSV_COLUMNS, console_tables, csv_text
from tests.report.payloads import FORMULAS, HIDDEN_FORMULAS

STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
Hostile = Callable[[dict[str, Any], Sequence[str]], dict[str, Any]]


def _markdown(results: dict[str, Any]) -> str:
    return render_markdown_page(parse_results(results), {}, None, fix="llmrec audit runs/x")


def _lines(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_csv_numbers_equal_results(pages: dict[str, Path], results: dict[str, Any]) -> None:
    lines = _lines(pages["csv"].read_text("utf-8"))
    assert tuple(lines[0]) == CSV_COLUMNS
    result = {(line["row"], line["metric"]): line for line in lines}
    assert len(result) == len(lines) == sum(len(row["metrics"]) for row in results["rows"])
    for row in results["rows"]:
        for name, metric in row["metrics"].items():
            line = result[row["id"], name]
            assert all(float(line[key]) == metric[key] for key in ("value", "low", "high"))
            assert line["signature"] == metric["signature"]
            assert float(line["parse_rate"]) == row["parse_rate"] and float(line["tie_rate"]) == row["tie_rate"]
            assert int(line["n"]) == row["n"] and int(line["shots"]) == row["shots"]
            assert float(line["seconds"]) == row["cost"]["seconds"]
            assert int(line["prompt_tokens"]) == row["cost"]["prompt_tokens"]


def _columns_of_text(line: dict[str, str]) -> list[str]:
    numbers = ("value", "low", "high", "beats_zero_shot_p", "beats_best_baseline_p")
    return [value for key, value in line.items() if key not in numbers]


def test_escapes_formulas(results: dict[str, Any], hostile: Hostile) -> None:
    result: set[str] = set()
    # Rotated, so that each is in every kind of column.
    for start in range(0, len(FORMULAS), 5):
        lines = _lines(csv_text(parse_results(hostile(results, FORMULAS[start:] + FORMULAS[:start]))))
        cells = [value for line in lines for value in _columns_of_text(line)]
        assert not [value for value in cells if value.startswith(STARTS)]
        result |= set(cells)
    # Each of them is in the file, with an apostrophe before it.
    assert {"'" + payload.replace("\x00", "") for payload in FORMULAS} <= result
    plain = _lines(csv_text(parse_results(results)))
    assert {float(line["value"]) for line in lines} == {float(line["value"]) for line in plain}


def test_escapes_formulas_after_invisible_characters() -> None:
    for payload in HIDDEN_FORMULAS:
        assert escape_cell(payload) == f"'{payload}"
        assert escape_cell(f"a{payload}") == f"a{payload}"


def test_negative_numbers_stay_numbers(results: dict[str, Any]) -> None:
    results["rows"][0]["metrics"]["RMSE"].update(value=-0.25, low=-1.0, high=-1e-9)
    lines = {(line["row"], line["metric"]): line for line in _lines(csv_text(parse_results(results)))}
    line = lines[results["rows"][0]["id"], "RMSE"]
    assert (line["value"], line["low"], line["high"]) == ("-0.25", "-1.0", "-1e-09")


@given(st.one_of(st.text(), st.floats(allow_nan=False), st.integers(), st.none()))
def test_csv_cell_round_trip(value: str | float | int | None) -> None:
    text = escape_cell(value)
    if isinstance(value, str):
        assert not text.startswith(STARTS)
        assert unescape_cells(pl.Series([text]))[0] == value.replace("\x00", "")
    elif value is not None:
        assert type(value)(text) == value


# --------------------------------------------------------------------------- Markdown


def test_markdown_sorts_rows_and_marks_the_best(results: dict[str, Any]) -> None:
    text = _markdown(results)
    rating = text.split("### Rating prediction")[1].split("###")[0].splitlines()
    rows = [line for line in rating if line.startswith("| ") and "---" not in line][1:]
    assert rows[0].startswith("| user-item-bias (baseline) | **0.930** [0.865, 1.002]")
    assert rows[-1].startswith("| zero-shot · expected · half-stars | 1.310")
    assert sum("(baseline)" in row for row in rows) == 4
    assert "| rating/unseen-half-stars (unseen) |" in text
    assert "significantly worse" in text.split("## Comparisons")[1].split("## ")[0]


# --------------------------------------------------------------------------- console


def test_console_shows_rows_in_order_and_escapes_controls(results: dict[str, Any]) -> None:
    results["rows"][0]["predictor"] = "[red]\x1b[31mx\x07[/red]"
    tables = console_tables(parse_results(results))
    assert len(tables) == 5
    console = Console(width=140, record=True, file=io.StringIO(), force_terminal=True)
    console.print(*tables)
    text = console.export_text()
    assert "[red][U+001B][31mx[U+0007][/red]" in text
    assert text.index("user-item-bias") < text.index("item-mean") < text.index("global-mean")
    assert "0.930" in text and "[0.865, 1.002]" in text


def test_console_fits_eighty_columns(results: dict[str, Any]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*console_tables(parse_results(results)))
    assert max(len(line) for line in console.export_text().splitlines()) <= 80
