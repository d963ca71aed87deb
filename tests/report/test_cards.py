"""Cards of generated texts and of new items: their content, and that it is escaped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrec.report.page import write_report
from tests.report.payloads import SCRIPTS

Save = Callable[[dict[str, Any]], Path]


def _exhibit(results: dict[str, Any], text: str) -> dict[str, Any]:
    rows = [row["id"] for row in results["rows"] if row["task"] == "rating"]
    return {
        "task": "rating", "request_id": "r", "user": {"id": "u1", "name": text},
        "item": {"id": "i1", "title": text, "fields": {text: text}}, "store": text, "read": [text, "Alien"],
        "events": 7, "profile": text, "described": text, "truth": text, "answers": {rows[0]: text, rows[1]: "0.250"},
    }  # fmt: skip


def _newcomer(results: dict[str, Any], text: str) -> dict[str, Any]:
    rows = [row["id"] for row in results["rows"] if row["task"] == "sequential"]
    visit = {"user": {"id": "u1", "name": text}, "latest": [text, "Alien"], "place": 3, "wanted": True}
    return {
        "task": "sequential", "item": {"id": "i1", "title": text, "fields": {text: text}}, "wanted": 4,
        "neighbours": [{"title": text, "cosine": 0.625}], "lists": dict.fromkeys(rows, 0) | {rows[0]: 12},
        "visits": {rows[0]: [visit]},
    }  # fmt: skip


CARDS = {"gallery": _exhibit, "newcomers": _newcomer}


def _page(save: Save, results: dict[str, Any], part: str, *texts: str) -> str:
    cards = [CARDS[part](results, text) for text in texts]
    return write_report(save(results | {part: cards}))["html"].read_text(encoding="utf-8")


def _section(page: str, part: str) -> str:
    assert f'<a href="#{part}">' in page
    return page[page.index(f'id="{part}"') : page.index("</section>", page.index(f'id="{part}"'))]


def test_card_of_a_text_shows_its_inputs(save: Save, results: dict[str, Any]) -> None:
    part = _section(_page(save, results, "gallery", "prefers quiet films"), "gallery")
    assert part.count("prefers quiet films") >= 9 and "and 5 more" in part and "0.250" in part


def test_card_of_a_new_item_shows_neighbours_and_users(save: Save, results: dict[str, Any]) -> None:
    part = _section(_page(save, results, "newcomers", "A quiet film"), "newcomers")
    assert part.count("A quiet film") >= 6 and "(0.62)" in part and "in 12 top-10 lists: rank 3" in part
    assert "who chose it" in part and "Chosen by 4" in part and part.count("Not recommended by") == 1


@pytest.mark.parametrize("part", CARDS)
def test_escapes_texts_of_cards(save: Save, results: dict[str, Any], part: str) -> None:
    page = _page(save, results, part, *SCRIPTS)
    assert not any(text in page for text in SCRIPTS if "<" in text)
    assert page.lower().count("<script") == 0 and page.count("<img") == 0


def test_report_without_cards(pages: dict[str, Path]) -> None:
    page = pages["html"].read_text(encoding="utf-8")
    assert not any(part in page for part in CARDS)
