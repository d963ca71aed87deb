"""The check of rendered pages, on pages with one planted error each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.site.browser import Browser, executable
from docs.site.rendered import looks

pytestmark = pytest.mark.skipif(executable() is None, reason="no chromium on PATH")

DOT = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/%3E"
TABLE = "<table width=2000><td>1</table>"
HEAD = (
    '<!doctype html><meta name="viewport" content="width=device-width">'
    "<style>:root { color-scheme: light dark } body { margin: 0; background: Canvas; color: CanvasText }</style>"
)
EVERY = {"desktop, light", "desktop, dark", "phone, light", "phone, dark"}
PAGES = {
    "fine": (f'<p>text</p><img src="{DOT}" alt="a dot"><div style="overflow: auto">{TABLE}</div>', "", set[str]()),
    "pale": ('<p style="color: #999">pale</p>', "contrast 2.85", {"desktop, light", "phone, light"}),
    "wide": ('<div style="width: 800px">wide</div>', "pixels wide", {"phone, light", "phone, dark"}),
    "nameless": (f'<img src="{DOT}">', "no alternative text", EVERY),
    "lost": ('<img src="lost.png" alt="lost">', "not shown: lost.png", EVERY),
    "console": ("<script>console.error('told')</script>", "told", {"console"}),
    "thrown": ("<script>nothing.here</script>", "nothing is not defined", {"console"}),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.mark.parametrize("name", PAGES)
def test_finds_each_fault_in_its_views(name: str, browser: Browser, tmp_path: Path) -> None:
    body, expected, views = PAGES[name]
    (tmp_path / "page.html").write_text(HEAD + body, encoding="utf-8")
    result = list(looks(browser, tmp_path / "page.html"))
    assert {view for view, problem in result if expected and expected in problem} == views
    assert expected or not result
