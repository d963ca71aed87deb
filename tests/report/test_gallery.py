"""Features beside what they were written from: every text stands on the page, and none of them is markup."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrec.report.page import write
from tests.report.payloads import SCRIPTS

Save = Callable[[dict[str, Any]], Path]


def _exhibit(results: dict[str, Any], text: str) -> dict[str, Any]:
    rows = [row["id"] for row in results["rows"] if row["task"] == "rating"]
    return {
        "task": "rating", "request_id": "r", "user": {"id": "u1", "name": text},
        "item": {"id": "i1", "title": text, "fields": {text: text}}, "store": text, "read": [text, "Alien"],
        "events": 7, "profile": text, "described": text, "truth": text, "answers": {rows[0]: text, rows[1]: "0.250"},
    }  # fmt: skip


def _page(save: Save, results: dict[str, Any], *exhibits: dict[str, Any]) -> str:
    return write(save(results | {"gallery": list(exhibits)}))["html"].read_text(encoding="utf-8")


def test_texts_stand_beside_what_they_were_written_from(save: Save, results: dict[str, Any]) -> None:
    page = _page(save, results, _exhibit(results, "prefers quiet films"))
    part = page[page.index('id="gallery"') : page.index("</section>", page.index('id="gallery"'))]
    assert part.count("prefers quiet films") >= 9 and "and 5 more" in part and "0.250" in part
    assert '<a href="#gallery">' in page


def test_no_text_of_it_is_markup(save: Save, results: dict[str, Any]) -> None:
    page = _page(save, results, *(_exhibit(results, text) for text in SCRIPTS))
    for text in SCRIPTS:
        if "<" in text:
            assert text not in page
    assert page.lower().count("<script") == 0 and page.count("<img") == 0


def test_a_run_without_features_has_no_such_part(save: Save, results: dict[str, Any]) -> None:
    assert "gallery" not in _page(save, results)
