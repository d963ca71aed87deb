"""Items that nobody had chosen: the page says what they read like and who gets them, and no title is markup."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrec.report.page import write
from tests.report.payloads import SCRIPTS

Save = Callable[[dict[str, Any]], Path]


def _newcomer(results: dict[str, Any], text: str) -> dict[str, Any]:
    rows = [row["id"] for row in results["rows"] if row["task"] == "sequential"]
    visit = {"user": {"id": "u1", "name": text}, "latest": [text, "Alien"], "place": 3, "wanted": True}
    return {
        "task": "sequential", "item": {"id": "i1", "title": text, "fields": {text: text}}, "wanted": 4,
        "neighbours": [{"title": text, "cosine": 0.625}], "lists": dict.fromkeys(rows, 0) | {rows[0]: 12},
        "visits": {rows[0]: [visit]},
    }  # fmt: skip


def _page(save: Save, results: dict[str, Any], *found: dict[str, Any]) -> str:
    return write(save(results | {"newcomers": list(found)}))["html"].read_text(encoding="utf-8")


def test_a_new_item_stands_with_its_neighbours_and_its_users(save: Save, results: dict[str, Any]) -> None:
    page = _page(save, results, _newcomer(results, "A quiet film"))
    part = page[page.index('id="newcomers"') : page.index("</section>", page.index('id="newcomers"'))]
    assert part.count("A quiet film") >= 6 and "(0.62)" in part and "in 12 top-10 lists: rank 3" in part
    assert "who chose it" in part and "Chosen by 4" in part and part.count("Not recommended by") == 1
    assert '<a href="#newcomers">' in page


def test_no_title_of_it_is_markup(save: Save, results: dict[str, Any]) -> None:
    page = _page(save, results, *(_newcomer(results, text) for text in SCRIPTS))
    assert not any(text in page for text in SCRIPTS if "<" in text)
    assert page.lower().count("<script") == 0 and page.count("<img") == 0


def test_a_run_without_cold_items_has_no_such_part(save: Save, results: dict[str, Any]) -> None:
    assert "newcomers" not in _page(save, results)
