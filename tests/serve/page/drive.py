"""Test all functions of a running service's page in a real Chromium.

    python tests/serve/page/drive.py http://127.0.0.1:8000/ SHOTS [CHROMIUM] [--user ID]... [--seconds 60] [--key KEY]

It needs ``pip install playwright`` and an installed Chromium, and asserts after every step. The script simulates
failures of the service (401, 429, 503, no network), so any service will do. `HOSTILE` has texts that would run, load or
break something if the page treated them as markup. If items of the service have them as titles, the script shows all
of these; it injects them itself as notes, prompts, rationales, fields, errors and explanations.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from llmrec.metrics.stats import wilson_interval

_RUN = "window.__hit=1;alert(1)"
_TAGS = (
    f"<script>{_RUN}</script>",
    f"<img src=x onerror={_RUN}>",
    f"<svg onload={_RUN}>",
    f"<svg><animate onbegin={_RUN} attributeName=x dur=1s>",
    f"<iframe srcdoc='<script>parent.{_RUN}</script>'></iframe>",
    f"<a href=javascript:{_RUN} autofocus onfocus={_RUN} tabindex=1>x</a>",
    f"<input autofocus onfocus={_RUN}>",
    f"<details open ontoggle={_RUN}>",
    f"<video><source onerror={_RUN}></video>",
    f"<style>@import '//x.invalid';*{{background:url(javascript:{_RUN})}}</style>",
    f"<meta http-equiv=refresh content='0;url=javascript:{_RUN}'>",
    f"<math><mi xlink:href='javascript:{_RUN}'>x",
    f"<object data=javascript:{_RUN}></object>",
    "<base href=//x.invalid/>",
    "<link rel=stylesheet href=//x.invalid/x.css>",
    f"<form action=javascript:{_RUN}><button autofocus>x</button></form>",
)
_BEFORE = ("", '">', "'>", "</title>", "</textarea></script>", "-->]]>")
HOSTILE: tuple[str, ...] = (
    *(before + tag for before in _BEFORE for tag in _TAGS),
    f"javascript:{_RUN}",
    f"data:text/html,<script>{_RUN}</script>",
    f"';{_RUN}//",
    f"${{{_RUN}}}",
    f"{{{{constructor.constructor('{_RUN}')()}}}}",
    f"&lt;img src=x onerror={_RUN}&gt;",
    "__proto__",
    "constructor",
    "%3Cscript%3E",
    "A" * 3000,
    "word " * 600,
    "\u202egnp.exe \u2066",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd (1995)",
    "\u0645\u0631\u062d\u0628\u0627 abc 123",
    "Z" + "\u0335\u0300\u0301\u0310" * 200,
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u200b\u200d\ufeff",
    "line\nbreak\ttab",
)
"""At least 100 titles."""

IMAGES = "https://images.example.com"
"""The address of the images of items, which this script serves."""
_PICTURE = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="80" height="80"><rect width="80" height="80" fill="#7a9"/>'
    '<circle cx="40" cy="40" r="24" fill="#fff"/></svg>'
)

_CONTRAST = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => {
    const part = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility({ visibilityProperty: true }) || node.closest(":disabled, .sr")) continue;
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push(`${node.tagName}.${node.className} ${ratio.toFixed(2)}`);
  }
  return bad;
}"""
_NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, summary, [role]")]
  .filter((node) => !node.closest("[role=option], [role=status], [role=alert]") && !(node.labels?.length
    || node.textContent.trim() || node.getAttribute("aria-label") || node.getAttribute("aria-labelledby")))
  .map((node) => node.outerHTML)"""


@dataclass
class Drive:
    """A browser for a service's pages, and the errors that occurred in it."""

    browser: Any
    base: str
    shots: Path
    seconds: float
    key: str | None
    ready: str = "#welcome:visible, #columns:visible"
    """What is visible once the page can be used."""
    bad: list[str] = field(default_factory=list)
    failing: bool = False
    """Whether this script fails requests now, for which the browser logs errors."""

    @property
    def headers(self) -> dict[str, str]:
        """Headers of requests that the page does not send."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def open(self, where: str = "", *, width: int = 1280, height: int = 800, dark: bool = False) -> Any:
        """Open a page of the service in a new browser context."""
        phone = width < 700
        context = self.browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            has_touch=phone,
            is_mobile=phone,
            reduced_motion="reduce",
        )
        context.set_default_timeout(self.seconds * 1000)
        context.add_init_script(
            "window.__violations = [];"
            "addEventListener('securitypolicyviolation', (e) => __violations.push(e.violatedDirective + e.blockedURI));"
        )
        context.route(f"{IMAGES}/**", self._picture)
        if self.key:
            context.add_init_script(f"sessionStorage.setItem('llmrec-key', {json.dumps(self.key)})")
        page = context.new_page()
        page.on("dialog", lambda dialog: (self.bad.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: self.bad.append(f"error {error}"))
        page.on("console", self._heard)
        page.on("request", lambda request: self._asked(request.url))
        page.goto(self.base + where)
        page.wait_for_selector(self.ready)
        return page

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning") and not (self.failing and "Failed to load resource" in message.text):
            self.bad.append(f"console {message.type} {message.text}")

    def _asked(self, url: str) -> None:
        if urlsplit(url).netloc not in ("", urlsplit(self.base).netloc) and not url.startswith(f"{IMAGES}/"):
            self.bad.append(f"request to {url}")

    def _picture(self, route: Any) -> None:
        if "referer" in route.request.headers:
            self.bad.append(f"referrer {route.request.headers['referer']}")
        route.fulfill(content_type="image/svg+xml", body=_PICTURE)

    def check(self, page: Any, name: str, *, whole: bool = True) -> None:
        """Assert that no error occurred, and that the page fits and is readable; save a screenshot."""
        page.screenshot(path=self.shots / f"{name}.png", full_page=whole)
        assert page.evaluate("window.__hit") is None, f"{name}: a payload ran"
        assert page.evaluate("window.__violations") == [], (name, page.evaluate("window.__violations"))
        assert self.bad == [], (name, self.bad)
        wide, room = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide <= room, f"{name}: {wide} px in {room}"
        assert page.evaluate(_CONTRAST) == [], (name, page.evaluate(_CONTRAST))
        assert page.evaluate(_NAMELESS) == [], (name, page.evaluate(_NAMELESS))
        sys.stdout.write(f"ok {name}\n")
        sys.stdout.flush()


def _settle(page: Any) -> None:
    """Wait until both lists are complete."""
    page.wait_for_timeout(450)
    page.wait_for_selector(".ranked[aria-busy]", state="detached")
    page.wait_for_timeout(350)


def _titles(page: Any, side: int) -> list[str]:
    return list(page.locator(f"#list-{side} > li .title").all_text_contents())


def _events(page: Any) -> list[str]:
    return list(page.locator("#events bdi").all_text_contents())


def _body(page: Any, act: Callable[[], Any], side: int = 0) -> Any:
    """Return the body of the request for one list that an action triggers."""
    model = page.locator(f"#model-{side}").input_value()
    _settle(page)  # a request for an earlier change
    with page.expect_request(lambda r: r.url.endswith("/v1/rank") and r.post_data_json["model"] == model) as asked:
        act()
    body = asked.value.post_data_json
    _settle(page)
    return body


# --------------------------------------------------------------------------- the steps


def _begin(drive: Drive, page: Any) -> None:
    assert page.locator("#welcome").is_visible() and page.locator("#columns").is_hidden()
    drive.check(page, "1-first")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "lists-title" and "lists" not in page.url
    page.click("#example")
    page.wait_for_selector("#list-0 > li")
    _settle(page)
    assert len(_events(page)) == 3 and _titles(page, 0)
    assert page.locator("#welcome").is_hidden() and "ms" in page.locator("#meta-0").inner_text()
    if page.locator("#model-1").input_value():
        assert "in both lists" in page.locator("#shared").inner_text() + page.locator("#said").inner_text()
        marks = page.locator("#list-0 > li .marks .sr").all_text_contents()
        assert len(marks) == len(_titles(page, 0)) and all("the other list" in mark for mark in marks)
    drive.check(page, "2-example")


def _search(drive: Drive, page: Any) -> None:
    before, query = _events(page), _titles(page, 0)[0][:8].strip()
    page.fill("#search", query)
    page.wait_for_selector("#found [role=option]")
    page.keyboard.press("ArrowDown")
    active = page.locator("#search").get_attribute("aria-activedescendant")
    assert page.locator(f"#{active}").get_attribute("aria-selected") == "true"
    assert page.locator("#search").get_attribute("aria-expanded") == "true"
    drive.check(page, "3-search")
    page.keyboard.press("Escape")
    assert page.locator("#pop").is_hidden() and page.locator("#search").get_attribute("aria-expanded") == "false"
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#found [role=option]")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert len(_events(page)) == len(before) + 1 and page.evaluate("document.activeElement.id") == "search"
    page.fill("#search", "no title holds this, surely")
    page.wait_for_selector("#found-note:has-text('No matching')")
    page.keyboard.press("Escape")
    _settle(page)


def _reorder(page: Any) -> None:
    first, second, *rest = _events(page)
    page.locator("#events > li:nth-child(1) [data-verb=down]").focus()
    page.keyboard.press("Enter")
    assert _events(page) == [second, first, *rest]
    assert page.evaluate("document.activeElement.closest('li').querySelector('bdi').textContent") == first
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert _events(page) == [second, *rest]
    assert page.evaluate("document.activeElement.dataset.verb") == "remove"
    _settle(page)


def _controls(drive: Drive, page: Any) -> None:
    assert _body(page, lambda: page.fill("#k", "5"))["k"] == 5
    assert len(_titles(page, 0)) <= 5
    page.fill("#k", "0")
    _settle(page)
    assert page.locator("#k").get_attribute("aria-invalid") == "true" and page.locator("#list-0 > li").count() <= 5
    page.fill("#k", "10")
    assert _body(page, lambda: page.uncheck("#seen"))["exclude_seen"] is False
    page.check("#seen")
    page.click("#rules summary")
    page.fill("#quota-field", "no-such-field")
    page.keyboard.press("Tab")
    body = _body(page, lambda: (page.fill("#quota-most", "3"), page.keyboard.press("Tab")))
    assert body["rules"]["quotas"] == [{"field": "no-such-field", "most": 3}]
    page.fill("#quota-most", "")
    page.locator("#diversity").focus()
    assert _body(page, lambda: page.keyboard.press("ArrowRight"))["rules"]["diversity"] == 0.05
    page.fill("#without", "no-such-field = x = y\nno rule")
    body = _body(page, lambda: page.keyboard.press("Tab"))
    assert body["rules"]["without"] == {"no-such-field": ["x = y"]}
    assert page.locator("#without").get_attribute("aria-invalid") == "true"
    page.fill("#without", "")
    page.keyboard.press("Tab")
    _settle(page)
    assert page.locator("#rules-count").inner_text() == "(1)"
    # A service rejects rules on fields that no item has, and the console logs this.
    drive.bad = [each for each in drive.bad if "status of 422" not in each]
    drive.check(page, "4-controls")


def _one_item(drive: Drive, page: Any, cards: dict[str, Any]) -> None:
    card = cards[page.locator("#model-0").input_value()]
    wants = 3 if card["kind"] == "language model" else 0
    assert _body(page, lambda: page.check("#why"))["rationale"] == wants
    row = page.locator("#list-0 > li").first
    row.locator(".open").focus()
    page.keyboard.press("Enter")
    assert row.locator(".open").get_attribute("aria-expanded") == "true"
    names = {"rating": "Rate", "ctr": "Will they like it?", "explanation": "Explain"}
    shown = row.locator(".verbs button").all_text_contents()
    assert [n for v, n in names.items() if v in card["answers"]] == [n for n in names.values() if n in shown]
    asked = [name for name in shown if name not in ("Add to the history", "Block")]
    for name in asked:
        row.locator(".verbs button", has_text=name).click()
    page.wait_for_selector(".answers [aria-busy]", state="detached")
    assert row.locator(".answers section").count() == len(asked)
    assert row.locator(".answers .error").all_text_contents() == []
    if page.locator("#foot-0 summary").count():
        page.click("#foot-0 summary")
        assert page.locator("#foot-0 pre").inner_text().strip()
    drive.check(page, "5-item")
    blocked = _titles(page, 0)[0]
    body = _body(page, lambda: row.locator(".verbs button", has_text="Block").click())
    assert len(body["rules"]["block"]) == 1 and blocked not in _titles(page, 0)[:1]
    assert page.evaluate("document.activeElement.className") == "open"


def _shows(drive: Drive, items: list[dict[str, Any]]) -> None:
    """Check images, prices, categories, scores and similar items of the history; rows do not move as they load."""
    pictured = [item for item in items if item["fields"].get("image_url", "").startswith(f"{IMAGES}/")]
    past = [item["item_id"] for item in (pictured or items)[:3]]
    link = "#" + "&".join(f"h={quote(each, safe='')}" for each in past) + "&b="
    page = _unmoved(drive, link, 390, 844)
    page.context.close()
    page = _unmoved(drive, link, 1280, 800)
    rows = page.locator("#list-0 > li").all()
    listed = _ranked(drive, page, past, page.locator("#model-0").input_value())
    assert len(rows) == len(listed)
    titles = {item["item_id"]: item["title"] for item in items}
    scores = [item["score"] for item in listed]
    for row, item in zip(rows, listed, strict=True):
        share = 1 if max(scores) == min(scores) else (item["score"] - min(scores)) / (max(scores) - min(scores))
        assert abs(int(row.locator(".number").inner_text()) - 100 * share) <= 0.5 + 1e-9, item
        told = row.locator(".score").get_attribute("title").removeprefix("Score of the model: ")
        assert abs(float(told.replace(",", "")) - item["score"]) <= 1e-3 * abs(item["score"])
        text = row.locator(".because").text_content()
        names = row.locator(".because bdi").all_text_contents()
        body = {"item_ids": [item["item_id"]], "candidates": past, "k": 3}
        alike = page.request.post(f"{drive.base}v1/similar", headers=drive.headers, data=body).json()
        by_users = [each["title"] for each in alike.get("items", []) if each["score"] > 1e-6]
        if "error" not in alike:
            assert names == by_users and text.startswith("Because of" if by_users else "No similar item"), (text, names)
        assert 0 <= len(names) <= 3 and set(names) <= {titles[each] for each in past}
        if pictured and item["image"]:
            image = row.locator(".open img")
            assert image.get_attribute("alt") == item["title"] and image.get_attribute("src") == item["image"]
            assert image.get_attribute("referrerpolicy") == "no-referrer" and image.get_attribute("loading") == "lazy"
        for name in ("price", "category"):
            if value := item["fields"].get(name):
                assert row.locator(f".{name} bdi").text_content() == value
    if pictured:
        page.wait_for_function("() => document.querySelector('#list-0 .open img')?.naturalWidth > 0")
    rows[0].locator(".open").click()
    assert "score of the model" in rows[0].locator(".detail").inner_text()
    drive.check(page, "14-shows")
    page.context.close()
    _explains(drive, link)
    _foreign(drive, link)


def _unmoved(drive: Drive, link: str, width: int, height: int) -> Any:
    """Return a page with a list whose rows stay in place when images and similar items arrive."""
    page = drive.open(width=width, height=height)
    held: list[Any] = []
    for path in ("**/v1/similar/batch", f"{IMAGES}/**"):
        page.route(path, lambda route: held.append(route))
    page.goto(drive.base + link)
    page.wait_for_selector("#list-0 > li")
    _settle(page)
    tops = "() => [...document.querySelectorAll('#list-0 > li')].map((row) => row.getBoundingClientRect().top)"
    before = page.evaluate(tops)
    for route in held:
        route.fallback()
    for path in ("**/v1/similar/batch", f"{IMAGES}/**"):
        page.unroute(path)
    page.wait_for_selector("#list-0 .because:not(:empty)")
    _settle(page)
    assert page.evaluate(tops) == before, "rows moved"
    return page


def _explains(drive: Drive, link: str) -> None:
    """Check explanations by texts, without a similar item, and after an error of the service."""
    page = drive.open()
    other: list[str] = []

    def play(route: Any) -> None:
        requests = route.request.post_data_json["requests"]
        assert all(len(each["item_ids"]) == 1 and each["candidates"] for each in requests)
        unsupported = {"error": {"kind": "unsupported", "message": "no interactions"}}
        near = [{"item_id": f"near{at}", "title": f"Near {at}", "score": 1.0 - at / 10} for at in range(4)]
        found = [{"items": []}, *({"items": near} for _ in requests[1:])]
        other.append(requests[0]["by"])
        route.fulfill(json={"answers": [unsupported] * len(requests) if requests[0]["by"] == "interactions" else found})

    page.route("**/v1/similar/batch", play)
    page.goto(drive.base + link)
    page.wait_for_selector("#list-0 .because:not(:empty)")
    told = page.locator("#list-0 .because").all_text_contents()
    assert told[0] == "No similar item in the history", told
    assert set(told[1:]) == {"Because of Near 0 · Near 1 · Near 2 (most similar texts)"} and "text" in other
    page.unroute("**/v1/similar/batch")
    drive.failing = True
    page.route("**/v1/similar/batch", lambda route: route.fulfill(status=500, json={"error": {"message": "x"}}))
    page.fill("#k", "4")
    _settle(page)
    assert page.locator("#list-0 .because").all_text_contents() == [""] * page.locator("#list-0 > li").count()
    drive.failing = False
    page.context.close()


def _foreign(drive: Drive, link: str) -> None:
    """No image is loaded from a host that the catalogue does not name, or from anything but a web address."""
    page = drive.open()
    urls = [
        "https://evil.example.org/x.png",
        "data:image/png;base64,AAAA",
        f"javascript:{_RUN}",
        "x.png",
        "//x.invalid/",
    ]

    def play(route: Any) -> None:
        answer = route.fetch()
        body = answer.json()
        for at, item in enumerate(body["items"]):
            item["image"] = urls[at % len(urls)]
        route.fulfill(response=answer, json=body)

    drive.failing = True
    reached: list[Any] = []
    page.route("https://evil.example.org/**", lambda route: (reached.append(route), route.abort()))
    page.route("**/v1/rank", play)
    page.goto(drive.base + link)
    page.wait_for_selector("#list-0 > li")
    _settle(page)
    # The content security policy blocks the first image, which is then removed; the page rejects the others.
    assert page.locator("#list-0 img").count() == 0
    violations = page.evaluate("window.__violations")
    assert violations and all(each.startswith("img-srchttps://evil.example.org/") for each in violations), violations
    assert all("evil.example.org" in each for each in drive.bad), drive.bad
    assert reached == []
    drive.bad.clear()
    drive.failing = False
    page.context.close()


# The page shows the lists of the next user, without a vote yet.
_NEXT = "() => !document.querySelector('#ballot [aria-pressed=true], #ballot [aria-disabled=true]')"
_VOTE = {0: "left", 1: "right", None: "none"}


def _blind(drive: Drive, items: list[dict[str, Any]], users: list[str]) -> None:
    """Test the first and the last model blindly: always vote for the first, and check the tally."""
    page = drive.open()
    names = page.locator("#model-0 option").all_text_contents()
    if len(names) < 2:
        return
    models = [names[0], names[-1]]
    page.context.close()
    pasts = [[item["item_id"] for item in items[at : at + 3]] for at in range(0, 33, 3)]
    links = [
        "#"
        + "&".join(f"h={quote(each, safe='')}" for each in past)
        + "&"
        + urlencode(dict(zip("ab", models, strict=True)))
        for past in pasts
    ]
    page = drive.open(links[0])
    # The models swap sides for every second user.
    page.evaluate("() => { let n = 0; crypto.getRandomValues = (array) => array.fill(n++); }")
    _settle(page)
    page.locator("#blind-start").focus()
    page.keyboard.press("Enter")
    _settle(page)
    assert page.evaluate("document.activeElement.id") == "blind-title"
    sides: list[int | None] = []
    for at, (past, link) in enumerate(zip(pasts[:10], links, strict=False)):
        if at:
            page.evaluate("(link) => { location.hash = link }", link)
            _settle(page)
        page.wait_for_function(_NEXT)
        shown = page.locator("#lists").inner_text()
        assert not any(name in shown for name in models), shown
        assert page.locator("#list-0 .score, #list-0 .mark, #foot-0 *").count() == 0
        expected = [[item["title"] for item in _ranked(drive, page, past, model)] for model in models]
        now = [_titles(page, side) for side in (0, 1)]
        assert sorted(now) == sorted(expected), (now, expected)
        side = None if now[0] == now[1] else now.index(expected[0])
        sides.append(side)
        choice = page.locator(f"[data-vote={_VOTE[side]}]")
        choice.focus()
        page.keyboard.press("Enter")
        assert (
            choice.get_attribute("aria-pressed") == "true"
            and page.evaluate("document.activeElement.dataset.vote") == _VOTE[side]
        )
        if at == 0:
            drive.check(page, "15-blind")
    assert {0, 1} <= set(sides), sides
    page.wait_for_selector("#tally p")
    mine = sum(side is not None for side in sides)
    low, high = (round(100 * end) for end in wilson_interval(1.0, mine))
    assert page.locator("#tally dd").all_text_contents() == [str(mine), "0", str(10 - mine)]
    sentence = page.locator("#tally p").inner_text()
    assert f"100% prefer {models[0]}" in sentence and f"interval {low}% to {high}%" in sentence, sentence
    drive.check(page, "15-blind-names")
    with page.expect_download() as loading:
        page.click("#votes-save")
    votes = json.loads(Path(loading.value.path()).read_text(encoding="utf-8"))
    assert [vote["preferred"] for vote in votes] == [_VOTE[side] for side in sides]
    for vote, past in zip(votes, pasts, strict=False):
        assert {vote["left"], vote["right"]} == set(models) and set(vote["signatures"]) == {"left", "right"}
        assert json.loads(vote["whom"]) == ["", *past]
        for place in ("left", "right"):
            assert vote["lists"][place] == [item["item_id"] for item in _ranked(drive, page, past, vote[place])]
    _blind_again(drive, page, links, users)


def _blind_again(drive: Drive, page: Any, links: list[str], users: list[str]) -> None:
    """Votes of a tab survive a reload, and can be replaced and deleted; names are shown on request."""
    page.reload()
    page.wait_for_selector(drive.ready)
    _settle(page)
    page.click("#blind-start")
    _settle(page)
    assert sum(map(int, page.locator("#tally dd").all_text_contents())) == 10
    page.click("[data-vote=none]")
    assert sum(map(int, page.locator("#tally dd").all_text_contents())) == 10
    page.click("#votes-clear")
    assert page.locator("#tally").inner_text().startswith("0 votes")
    assert page.evaluate("document.activeElement.id") == "blind-title"
    # The lists appear together, and no vote counts before that.
    held: list[Any] = []
    page.route("**/v1/rank", lambda route: held.append(route))
    page.evaluate("(link) => { location.hash = link }", links[10])
    while len(held) < 2:
        page.wait_for_timeout(50)
    held[0].continue_()
    page.wait_for_timeout(500)
    assert page.locator(".ranked[aria-busy]").count() == 2
    page.locator("[data-vote=left]").evaluate("(node) => node.click()")
    held[1].continue_()
    page.unroute("**/v1/rank")
    _settle(page)
    assert page.locator("#tally").inner_text().startswith("0 votes")
    page.click("[data-vote=right]")
    assert page.locator("#tally").inner_text().startswith("1 vote.")
    page.click("#reveal")
    page.wait_for_selector("#tally p")
    assert page.locator("#tally dd").all_text_contents()[2] == "0"
    if users:
        page.fill("#queue", "\n".join(users))
        page.click("#next")
        seen = []
        for _ in users:
            page.wait_for_function(_NEXT)
            seen.append(page.locator("#whom bdi").inner_text())
            page.click("[data-vote=none]")
        assert sorted(seen) == sorted(users), seen
        assert page.locator("#next").get_attribute("aria-disabled") == "true"
    page.click("#blind-end")
    _settle(page)
    assert page.evaluate("document.activeElement.id") == "blind-start" and page.locator("#model-0").is_visible()
    assert page.locator("#ballot").is_hidden() and page.locator("#list-0 .score").count()
    page.context.close()
    # Another tab has no votes.
    page = drive.open(links[0], width=390, height=844)
    _settle(page)
    page.click("#blind-start")
    _settle(page)
    assert page.locator("#tally").inner_text().startswith("0 votes")
    box = page.locator("#ballot").bounding_box()
    assert box is not None and box["y"] + box["height"] <= 844, box
    drive.check(page, "15-blind-phone")
    page.context.close()


def _ranked(drive: Drive, page: Any, past: list[str], model: str) -> list[dict[str, Any]]:
    body = {"history": past, "model": model}
    found: list[dict[str, Any]] = page.request.post(f"{drive.base}v1/rank", headers=drive.headers, data=body).json()[
        "items"
    ]
    return found


def _link(drive: Drive, page: Any) -> None:
    other = drive.open(urlsplit(page.url).fragment and "#" + urlsplit(page.url).fragment)
    _settle(other)
    assert _events(other) == _events(page)
    assert _titles(other, 0) == _titles(page, 0) and other.locator("#why").is_checked()
    other.context.close()
    odd = {"k": "99999", "h": "\x00", "a": "nobody", "diversity": "1e9", "most.x": "-1", "open.7": "x", "<b>": "<i>"}
    other = drive.open("#" + urlencode(odd))
    assert other.locator("#notice").is_visible() and other.locator("#k").input_value() == "10"
    drive.check(other, "6-odd-link")
    other.context.close()


def _users(drive: Drive, page: Any, user: str | None) -> None:
    drive.failing = True
    page.fill("#user", "nobody has <this> id")
    page.keyboard.press("Enter")
    page.wait_for_selector("#known-note .error")
    drive.failing = False
    if user is not None:
        page.fill("#user", user)
        body = _body(page, lambda: page.keyboard.press("Enter"))
        assert body["user_id"] == user and "history" not in body and "User" in page.locator("#whom").inner_text()
        body = _body(page, lambda: page.locator("#events > li [data-verb=remove]").first.click())
        assert body["user_id"] == user and "edited" in page.locator("#whom").inner_text()
        assert len(body.get("history", [])) == len(_events(page)) or not _events(page)
        drive.check(page, "7-user")
    page.click("#clear")
    page.wait_for_selector("#welcome:visible")
    assert page.evaluate("document.activeElement.id") == "search"
    _settle(page)


def _failures(drive: Drive) -> None:
    page = drive.open()
    drive.failing = True
    told: list[Any] = []
    text = HOSTILE[1]

    def play(route: Any) -> None:
        status, headers = told.pop(0) if told else (0, {})
        if not status:
            return route.continue_()
        if status < 0:
            return route.abort()
        error = {"error": {"kind": "x", "message": text, "at": HOSTILE[0]}}
        return route.fulfill(status=status, headers=headers, json=error)

    page.route("**/v1/rank", play)
    told += [(429, {"Retry-After": "2"})] * 2
    page.click("#example")
    page.wait_for_selector("#state-0:has-text('Retrying in 2 s')")
    page.wait_for_selector("#list-0 > li")
    _settle(page)
    for status, words in ((503, text), (500, text), (-1, "cannot be reached")):
        told += [(status, {})] * 2
        page.fill("#k", str(5 + len(words) % 7 + status % 5))
        page.wait_for_selector("#state-0 .error")
        page.wait_for_selector("#state-1 .error") if page.locator("#model-1").input_value() else told.clear()
        assert words in page.locator("#state-0 .error").inner_text()
        drive.check(page, f"8-failed-{abs(status)}")
        page.click("#state-0 button")
        page.wait_for_selector("#list-0 > li")
        _settle(page)
    told += [(401, {})] * 2
    page.fill("#k", "4")
    page.wait_for_selector("#key:visible")
    drive.check(page, "8-key")
    told.clear()
    page.fill("#key-text", drive.key or "made-up-key")
    body_key = page.expect_request(lambda r: r.url.endswith("/v1/models"))
    with body_key as asked:
        page.keyboard.press("Enter")
    assert asked.value.headers["authorization"].startswith("Bearer ") and page.locator("#key").is_hidden()
    assert page.evaluate("localStorage.length") == 0
    _settle(page)
    drive.failing = False
    page.context.close()


def _aborts(drive: Drive) -> None:
    page = drive.open()
    page.click("#example")
    page.wait_for_selector("#list-0 > li")
    _settle(page)
    ended: list[str] = []
    page.on("requestfailed", lambda request: ended.append(request.failure))
    held: list[Any] = []
    page.route("**/v1/rank", lambda route: held.append(route))
    page.fill("#k", "3")
    page.wait_for_selector(".ranked[aria-busy]")
    page.wait_for_timeout(100)
    first = len(held)
    page.fill("#k", "4")
    page.wait_for_timeout(500)
    assert first and ended.count("net::ERR_ABORTED") == first, ended
    for route in held[first:]:
        route.continue_()
    _settle(page)
    assert page.locator("#list-0 > li").count() <= 4
    drive.check(page, "9-after-aborts")
    for route in held[:first]:
        route.abort()
    page.context.close()


def _hostile(drive: Drive, items: list[dict[str, Any]]) -> None:
    """Show every item of the catalogue, and hostile texts in all fields that the service writes."""
    page = drive.open()
    for start in range(0, min(len(items), 300), 150):
        ids = [item["item_id"] for item in items[start : start + 150]]
        page.goto(drive.base + "#" + "&".join(f"h={quote(each, safe='')}" for each in ids) + "&seen=0&k=400")
        page.wait_for_selector("#list-0 > li")
        _settle(page)
        assert len(_events(page)) == len(ids)
        for row in page.locator("#list-0 > li .open").all()[:160]:
            row.evaluate("(node) => node.click()")
    for query in ("<", '"', "javascript", "&"):
        page.fill("#search", query)
        page.wait_for_timeout(400)
        page.wait_for_selector("#found-note:has-text('Searching…')", state="detached")
    page.keyboard.press("Escape")
    drive.check(page, "10-hostile-catalogue", whole=False)
    some = iter(HOSTILE * 100)

    def poison(route: Any) -> None:
        answer = route.fetch()
        if answer.status != 200:
            return route.fulfill(response=answer)
        if "event-stream" in answer.headers.get("content-type", ""):
            events = [*({"text": text} for text in HOSTILE[:40]), {"error": {"message": HOSTILE[0]}}]
            return route.fulfill(response=answer, body="".join(f"data: {json.dumps(event)}\n\n" for event in events))
        body = answer.json()
        for item in body.get("items", []):
            item |= {"title": next(some), "rationale": next(some), "fields": {next(some)[:200]: next(some)}}
            item |= {"image": next(some)}
        return route.fulfill(response=answer, json=body | {"notes": list(HOSTILE), "prompt": "\n".join(HOSTILE)})

    def alike(route: Any) -> None:
        count = len(route.request.post_data_json["requests"])
        found = [{"item_id": next(some), "title": next(some), "score": 1.0} for _ in range(3)]
        route.fulfill(json={"answers": [{"items": found}] * count})

    page.route("**/v1/similar/batch", alike)
    page.route("**/v1/*", lambda r: poison(r) if r.request.method == "POST" else r.continue_())
    page.goto(drive.base + "#" + "&".join(f"h={quote(item['item_id'], safe='')}" for item in items[:3]) + "&k=50")
    page.wait_for_selector("#list-0 > li")
    _settle(page)
    for summary in page.locator("#lists summary").all():
        summary.click()
    page.locator("#list-0 > li .open").first.click()
    for button in page.locator("#list-0 .verbs button").all()[:-2]:
        button.click()
    page.wait_for_selector(".answers [aria-busy]", state="detached")
    drive.check(page, "11-hostile-answers", whole=False)
    page.set_viewport_size({"width": 320, "height": 740})
    drive.check(page, "12-hostile-320", whole=False)
    page.context.close()


def _looks(drive: Drive, page: Any) -> None:
    fragment = "#" + urlsplit(page.url).fragment
    sizes = (("desktop", 1280, 800), ("tablet", 820, 1100), ("phone", 360, 740), ("small", 320, 640))
    for name, width, height in sizes:
        for dark in (False, True):
            other = drive.open(fragment, width=width, height=height, dark=dark)
            _settle(other)
            other.locator("#list-0 > li .open").nth(1).click()
            other.locator("#list-0 .verbs button").first.click()
            other.wait_for_selector(".answers [aria-busy]", state="detached")
            drive.check(other, f"13-{name}-{'dark' if dark else 'light'}")
            other.context.close()


def catalogue(drive: Drive, page: Any) -> list[dict[str, Any]]:
    """Return all items that the service has."""
    items: list[dict[str, Any]] = []
    while True:
        url = f"{drive.base}v1/items?limit=1000&offset={len(items)}"
        found = page.request.get(url, headers=drive.headers).json()["items"]
        if not found:
            return items
        items += found


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the command-line parser of a script that drives a page."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("base", help="address of the service, such as http://127.0.0.1:8000/")
    parser.add_argument("shots", type=Path, help="folder for screenshots")
    parser.add_argument("chromium", nargs="?", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--key", help="an API key, where the service asks for one")
    parser.add_argument("--seconds", type=float, default=60.0, help="longest wait for an answer")
    return parser


@contextmanager
def driving(given: argparse.Namespace) -> Iterator[Drive]:
    """Yield a browser for the service, and assert at the end that no error occurred."""
    from playwright.sync_api import sync_playwright

    given.shots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        drive = Drive(browser, given.base.rstrip("/") + "/", given.shots, given.seconds, given.key)
        yield drive
        browser.close()
    assert drive.bad == [], drive.bad


def main() -> None:
    """Run all steps."""
    parser = arguments("Drive the page of a running service.")
    parser.add_argument("--user", action="append", default=[], help="id of a known user with at least two events")
    given = parser.parse_args()
    with driving(given) as drive:
        page = drive.open()
        known = page.request.get(drive.base + "v1/models", headers=drive.headers).json()["models"]
        items = catalogue(drive, page)
        hostile = [item for item in items if item["title"] in HOSTILE]
        _begin(drive, page)
        _search(drive, page)
        _reorder(page)
        _controls(drive, page)
        _one_item(drive, page, {card["name"]: card for card in known})
        _link(drive, page)
        _looks(drive, page)
        _users(drive, page, given.user[0] if given.user else None)
        _shows(drive, [item for item in items if item not in hostile])
        _blind(drive, [item for item in items if item not in hostile], given.user)
        _failures(drive)
        _aborts(drive)
        _hostile(drive, [*hostile, *items[:20]])
    sys.stdout.write(f"all is well; {len(hostile)} of the items had hostile titles\n")


if __name__ == "__main__":
    main()
