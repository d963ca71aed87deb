"""Test all functions of a running service's chat page in a real Chromium.

    python -m tests.serve.page.drive_chat http://127.0.0.1:8000/ SHOTS [CHROMIUM] [--seconds 60] [--key KEY]

It needs ``pip install playwright``, an installed Chromium and a service whose items have two fields with values that
items share, such as one over ``recipes/made/classic.yaml``. It asserts after every step. The script simulates
failures of the service and hostile answers; the titles of the service's items may be hostile too.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.serve.page.drive import HOSTILE, Drive, arguments, catalogue, driving

_READY = "#say button:not([disabled])"
_ITEM = {"item_id": "x", "title": "A plain title", "fields": {}}


def _turn(page: Any) -> Any:
    return page.locator("#lines .turn").last


def _say(page: Any, text: str) -> dict[str, Any]:
    """Type a message as a user does, and return the response of the service."""
    page.fill("#text", text)
    return _answered(page, lambda: page.keyboard.press("Enter"))


def _answered(page: Any, act: Callable[[], Any]) -> dict[str, Any]:
    """Return the response of the service to an action."""
    with page.expect_response(lambda answer: answer.url.endswith("/v1/chat")) as told:
        act()
    said = told.value
    assert said.status == 200 and said.headers["content-type"].startswith("text/event-stream"), said.status
    text = said.text()
    page.wait_for_selector(_READY)
    assert page.locator("#failed").is_hidden() and page.locator("#text").input_value() == ""
    assert "event: call" in text, text
    found = json.loads(text.split("event: done")[1].split("data:")[1])
    assert isinstance(found, dict)
    shown = page.locator("#profile bdi").all_text_contents()
    assert shown == [line.split(". ", 1)[1] for line in found["profile"]], (shown, found["profile"])
    return found


def _shared(items: list[dict[str, Any]]) -> tuple[str, str, str, str]:
    """Return a field and a value that many items share, and another field with a value that some of these have."""
    counts = Counter((name, value) for item in items for name, value in item["fields"].items() if value.isalpha())
    for (field, value), _ in counts.most_common():
        having = [item for item in items if item["fields"].get(field) == value]
        others = Counter(
            (name, other)
            for item in having
            for name, other in item["fields"].items()
            if name != field and other.isalpha() and counts[name, other] > 1
        )
        for (name, other), among in others.most_common():
            if len(having) - among > 1:
                return field, value, name, other
    raise AssertionError("no two fields share values; serve recipes/made/classic.yaml")


def _begin(drive: Drive, page: Any) -> None:
    assert page.locator("#lines").text_content() == "" and page.locator("#clear").is_disabled()
    drive.check(page, "1-first")
    with_focus = []
    for _ in range(3):
        page.keyboard.press("Tab")
        with_focus.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert with_focus == ["A", "text", "BUTTON"], with_focus
    page.focus("#text")
    page.keyboard.press("Enter")
    assert page.locator("#lines .turn").count() == 0


def _wishes(drive: Drive, page: Any, items: list[dict[str, Any]]) -> None:
    field, value, other, banned = _shared(items)
    found = _say(page, f"I'd like {value}, but not {banned}")
    assert found["items"]
    for item in found["items"]:
        assert item["fields"][field] == value and item["fields"].get(other) != banned, item
    titles = _turn(page).locator("ol > li .title:first-child bdi").all_text_contents()
    assert titles == [item["title"] for item in found["items"]], titles
    said = page.locator("#profile bdi").all_text_contents()
    assert any(value in line for line in said) and any(banned in line and "not" in line for line in said), said
    drive.check(page, "2-list")

    why = _answered(page, _turn(page).get_by_role("button", name="Why? Item 1").click)
    assert found["items"][0]["title"] in why["text"] and not _turn(page).locator("ol").count(), why["text"]
    drive.check(page, "3-why")
    like = _answered(page, page.get_by_role("button", name="More like it Item 2").last.click)
    assert all(item["fields"].get(other) != banned for item in like["items"]), like["items"]
    if like["items"]:
        assert page.locator(".found").first.locator("button:not([disabled])").count() == 0
    drive.check(page, "4-like")

    _say(page, f"{banned} is fine again")
    assert not any(banned in line for line in page.locator("#profile bdi").all_text_contents())
    before = page.locator("#profile li").count()
    page.locator("#profile button").first.click()
    assert page.locator("#profile li").count() == before - 1
    found = _say(page, "what do you know about me?")
    assert len(found["profile"]) == before - 1, found["profile"]
    drive.check(page, "5-profile")


def _forgets(drive: Drive, page: Any) -> None:
    page.click("#clear")
    assert page.locator("#lines").text_content() == "" and not page.locator("#profile li").count()
    assert page.evaluate("document.activeElement.id") == "text"
    with page.expect_request(lambda request: request.url.endswith("/v1/chat")) as asked:
        page.fill("#text", "hello")
        page.keyboard.press("Enter")
    assert "state" not in asked.value.post_data_json
    page.wait_for_selector(_READY)
    # A response that arrives after the conversation was cleared restores nothing.
    held: list[Any] = []
    page.route("**/v1/chat", lambda route: held.append(route))
    page.fill("#text", "something nice")
    page.keyboard.press("Enter")
    page.wait_for_timeout(100)
    page.click("#clear")
    held[0].continue_()
    page.wait_for_selector(_READY)
    page.wait_for_timeout(100)
    page.unroute("**/v1/chat")
    assert page.locator("#lines").text_content() == "" and not page.locator("#profile li").count()
    drive.check(page, "6-forgotten")


def _stream(*events: tuple[str, Any]) -> dict[str, Any]:
    body = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    return {"status": 200, "content_type": "text/event-stream", "body": body}


def _failures(drive: Drive, page: Any) -> None:
    failing = {
        "503": {"status": 503, "json": {"error": {"message": "The engine <b>restarts</b>; ask again."}}},
        "429": {"status": 429, "json": {"error": {"message": "Too many questions wait; ask again in 2 s."}}},
        "no-json": {"status": 502, "body": "<h1>Bad gateway</h1>"},
        "broken": _stream(("call", {"tool": "show"})),
        "late": _stream(("call", {"tool": "show"}), ("error", {"error": {"message": "The engine was lost."}})),
        "offline": None,
    }
    for name, answer in failing.items():
        drive.failing = True
        page.route("**/v1/chat", lambda route, *, told=answer: route.abort() if told is None else route.fulfill(**told))
        turns = page.locator("#lines .turn").count()
        page.fill("#text", "hello again")
        page.keyboard.press("Enter")
        page.wait_for_selector("#failed:visible")
        page.wait_for_selector(_READY)
        said = page.locator("#failed").inner_text()
        assert said and "undefined" not in said, name
        assert page.locator("#lines .turn").count() == turns and page.locator("#text").input_value() == "hello again"
        drive.check(page, f"7-{name}")
        page.unroute("**/v1/chat")
        drive.failing = False
    _answered(page, lambda: page.keyboard.press("Enter"))
    # Without an API key where one is required.
    drive.failing = True
    page.route("**/v1/chat", lambda route: route.fulfill(status=401, json={"error": {"message": "Name an API key."}}))
    page.fill("#text", "and again")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key:visible")
    drive.check(page, "8-key")
    page.unroute("**/v1/chat")
    drive.failing = False
    page.fill("#key-text", drive.key or "a key")
    page.keyboard.press("Enter")
    assert page.locator("#key").is_hidden() and page.locator("#text").input_value() == "and again"
    with page.expect_request(lambda request: request.url.endswith("/v1/chat")) as asked:
        page.keyboard.press("Enter")
    assert asked.value.headers["authorization"] == f"Bearer {drive.key or 'a key'}"
    page.wait_for_selector(_READY)


def _hostile(drive: Drive, page: Any) -> None:
    for at, text in enumerate(HOSTILE):
        items = [{"item_id": text, "title": text, "fields": {text: text}}, _ITEM]
        plain = " ".join(text.split())
        lines = [plain, "How about:", f"1. {plain}", f"2. {_ITEM['title']}", plain]
        done = {
            "text": "\n".join(lines),
            "items": items,
            "calls": [],
            "profile": [f"1. {text}"],
            "state": {"profile": [{"field": text}], "turn": 1},
            "milliseconds": 1.0,
        }
        answer = _stream(("call", {"tool": text}), ("done", done))
        page.route("**/v1/chat", lambda route, *, told=answer: route.fulfill(**told))
        page.fill("#text", text if len(text) < 900 and "\n" not in text else "hello")
        page.keyboard.press("Enter")
        page.wait_for_selector(_READY)
        assert page.locator("#lines .turn").count() == at + 1, text
        assert _turn(page).locator("bdi").first.text_content() == text
        assert page.locator("#profile bdi").first.text_content() == text
        page.unroute("**/v1/chat")
    drive.check(page, "9-hostile")


def _looks(drive: Drive, value: str) -> None:
    for name, width, height in (("phone", 390, 844), ("small", 320, 568), ("wide", 1920, 1080)):
        for dark in (False, True):
            other = drive.open("chat", width=width, height=height, dark=dark)
            for line in (f"I'd like {value}", "why the first one?", "more"):
                _say(other, line)
            # The text input stays in view.
            box = other.locator("#text").bounding_box()
            assert box is not None and box["y"] >= 0 and box["y"] + box["height"] <= height, (name, box)
            drive.check(other, f"10-{name}-{'dark' if dark else 'light'}")
            other.context.close()


def main() -> None:
    """Run all steps."""
    with driving(arguments("Drive the page of a conversation.").parse_args()) as drive:
        drive.ready = _READY
        page = drive.open("chat")
        items = catalogue(drive, page)
        _begin(drive, page)
        _wishes(drive, page, items)
        _forgets(drive, page)
        _failures(drive, page)
        page.context.close()
        _looks(drive, _shared(items)[1])
        _hostile(drive, drive.open("chat"))
    sys.stdout.write("all is well\n")


if __name__ == "__main__":
    main()
