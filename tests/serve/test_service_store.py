"""A service whose store is locked, moved or read by others; notes on unknown names; times."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("uvicorn", reason="the serve extra is not installed")

from llmrec.serve import service as module
from llmrec.serve.schema import MAX_EVENTS, MAX_TEXT_LENGTH
from llmrec.serve.store import IN_LOG_NOTE
from tests.serve.fake_engine import Faked, faking
from tests.serve.served import until

# Timeout in seconds; no result depends on it.
PATIENCE = 120.0
EVENT = {"user_id": "ann", "item_id": "i1"}


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faked]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ERASURE_RETRY_SECONDS", 0.05)
        # Only writes have a short timeout.
        patch.setattr(module, "STORE_WAIT_FRACTION", 0.01)
        patch.setattr(module, "_WRITE_WAIT_FRACTION", 0.02)
        with faking(tmp_path_factory.mktemp("store"), patch) as faked:
            yield faked


def ask(faked: Faked, path: str, method: str = "POST", **body: Any) -> httpx.Response:
    more = {"json": body} if method in ("POST", "PUT") else {}
    return httpx.request(method, f"{faked.url}{path}", timeout=PATIENCE, **more)


def known(faked: Faked, user: str) -> list[dict[str, Any]]:
    response = ask(faked, f"/v1/users/{user}", "GET")
    return response.json()["history"] if response.status_code == 200 else []


@contextmanager
def held(faked: Faked, how: str) -> Iterator[None]:
    with closing(sqlite3.connect(faked.folder / "store.sqlite", isolation_level=None)) as other:
        other.execute(how)
        other.execute("SELECT count(*) FROM llmrec_events").fetchone()
        yield
        other.execute("ROLLBACK")


def test_locked_store_rejects_only_writes(faked: Faked) -> None:
    ask(faked, "/v1/events", events=[EVENT])
    with ThreadPoolExecutor(16) as pool, held(faked, "BEGIN IMMEDIATE"):
        # More writes than can wait one after the other within a timeout.
        writes = [pool.submit(ask, faked, "/v1/events", events=[EVENT] * 3) for _ in range(12)]
        writes += [
            pool.submit(ask, faked, "/v1/items", "PUT", items=[{"item_id": "held", "title": "Held"}]),
            pool.submit(ask, faked, "/v1/items/i7", "DELETE"),
            pool.submit(ask, faked, "/v1/users/ann", "DELETE"),
        ]
        for body in ({"history": ["i0"]}, {"user_id": "ann"}, {}):
            assert ask(faked, "/v1/rank", **body).status_code == 200, body
        assert len(known(faked, "ann")) == 1
        for each in writes:
            refused = each.result()
            assert refused.status_code == 503 and refused.headers["retry-after"], refused.text
    # Rejected changes are never stored.
    assert len(known(faked, "ann")) == 1
    assert [ask(faked, f"/v1/items/{name}", "GET").status_code for name in ("held", "i7")] == [404, 200]
    assert ask(faked, "/v1/events", events=[EVENT]).json() == {"stored": 1}
    assert ask(faked, "/v1/users/ann", "DELETE").json()["events"] == 2


def test_delayed_erasure_is_reported_and_finished(faked: Faked) -> None:
    name = "annabel-the-erased"

    def left() -> list[str]:
        return [path.name for path in faked.folder.iterdir() if name.encode() in path.read_bytes()]

    ask(faked, "/v1/events", events=[{"user_id": name, "item_id": "i1"}])
    with held(faked, "BEGIN"):
        response = ask(faked, f"/v1/users/{name}", "DELETE").json()
        assert response["events"] == 1 and response["remains"] == [IN_LOG_NOTE] and left()
    until(lambda: not left())
    assert ask(faked, f"/v1/users/{name}", "DELETE").json()["remains"] == []


def test_moved_store_rejects_requests_that_need_it(faked: Faked) -> None:
    file = faked.folder / "store.sqlite"
    file.rename(file.with_name("away.sqlite"))
    try:
        for path, body in (("/v1/events", {"events": [EVENT]}), ("/v1/rank", {"user_id": "ann"})):
            assert ask(faked, path, **body).status_code == 503
        assert ask(faked, "/v1/rank", history=["i0"]).status_code == 200
    finally:
        file.with_name("away.sqlite").rename(file)
    assert ask(faked, "/v1/events", events=[EVENT]).json() == {"stored": 1}
    assert ask(faked, "/v1/users/ann", "DELETE").json()["events"] == 1


def test_timeout_includes_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with faking(tmp_path, monkeypatch, patience=1.0) as slow:
        read = slow.service.store.events_of
        monkeypatch.setattr(slow.service.store, "events_of", lambda *args: time.sleep(0.7) or read(*args))
        assert ask(slow, "/v1/rank", user_id="old", profile="sleep 0.7").status_code in (503, 504)


def test_last_events_of_a_long_history_are_read(faked: Faked) -> None:
    for n in (0, 1):
        events = [{"user_id": "busy", "item_id": f"i{n}", "timestamp": 10 * n} for _ in range(MAX_EVENTS)]
        assert ask(faked, "/v1/events", events=events).status_code == 200
    assert {each["item_id"] for each in known(faked, "busy")} == {"i1"}
    assert ask(faked, "/v1/users/busy", "DELETE").json()["events"] == 2 * MAX_EVENTS


def test_notes_name_unknown_users(faked: Faked) -> None:
    for path, body in (("/v1/rank", {}), ("/v1/rank", {"candidates": ["i1", "i2"]})):
        notes = ask(faked, path, user_id="unknown", **body).json()["notes"]
        assert "unknown user 'unknown'" in notes
        assert not any("unknown user" in note for note in ask(faked, path, user_id="old", **body).json()["notes"])
        # A history of the request replaces the stored one.
        notes = ask(faked, path, user_id="unknown", history=["i0"], **body).json()["notes"]
        assert not any("unknown user" in note for note in notes)


def test_notes_name_unknown_items(faked: Faked) -> None:
    rules = {"block": ["i1", "gone", "lost"]}
    for path, body in (("/v1/rank", {"history": ["i0", "no-such"]}), ("/v1/similar", {"item_ids": ["i0"]})):
        notes = ask(faked, path, rules=rules, **body).json()["notes"]
        assert "rules.block: not in the catalogue: 'gone', 'lost'" in notes
        assert any("'no-such'" in note for note in notes) is (path == "/v1/rank")


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("2024-01-06T13:28:00Z", 1704547680.0),
        ("2024-01-06T14:28:00+01:00", 1704547680.0),
        ("2024-01-06 13:28:00.5", 1704547680.5),
        ("2024-01-06", 1704499200.0),
        (1704547680, 1704547680.0),
    ],
)
def test_times_are_numbers_or_iso_8601(faked: Faked, written: Any, seconds: float) -> None:
    event = {"user_id": "timed", "item_id": "i1", "timestamp": written}
    assert ask(faked, "/v1/events", events=[event]).json() == {"stored": 1}
    assert [each["timestamp"] for each in known(faked, "timed")] == [seconds]
    ask(faked, "/v1/users/timed", "DELETE")
    past = [{"item_id": "i0", "timestamp": seconds}, {"item_id": "i1", "timestamp": written}]
    assert not ask(faked, "/v1/rank", history=past).json()["notes"]
    past = [{"item_id": "i0", "timestamp": seconds + 1}, {"item_id": "i1", "timestamp": written}]
    assert any("ascending order" in note for note in ask(faked, "/v1/rank", history=past).json()["notes"])


@pytest.mark.parametrize("written", ["1704547680", "2024-13-01", "", True, []])
def test_rejects_invalid_times(faked: Faked, written: Any) -> None:
    refused = ask(faked, "/v1/events", events=[{**EVENT, "timestamp": written}])
    assert refused.status_code == 422 and refused.json()["error"]["at"] == "events.0.timestamp"


def test_rerank_warns_of_cut_texts(faked: Faked) -> None:
    texts = ["x" * 400 + "1", "x" * 400 + "2", "short"]
    for documents in (texts, [{"text": text} for text in texts]):
        response = ask(faked, "/v2/rerank", query="Item 1", documents=documents).json()
        assert len(response["results"]) == 3
        assert any("cut to 300 characters" in warning for warning in response["meta"]["warnings"])
    assert ask(faked, "/v2/rerank", query="Item 1", documents=["short", "other"]).json()["meta"]["warnings"] == []


def test_rerank_limits_texts_and_histories(faked: Faked) -> None:
    long = "x" * (MAX_TEXT_LENGTH + 1)
    for documents in ([long], [{"text": long}], [{"title": long}]):
        assert ask(faked, "/v2/rerank", query="Item 1", documents=documents).status_code == 422
    lines = "\n".join("a" for _ in range(MAX_EVENTS + 1))
    refused = ask(faked, "/v2/rerank", query=lines, documents=["short"])
    assert refused.status_code == 422 and refused.json()["error"]["at"] == "query"
    assert ask(faked, "/v2/rerank", query=lines[2:], documents=["short"]).status_code == 200
