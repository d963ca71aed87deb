"""Conversations over HTTP: as JSON and as a stream, with a state that the client keeps."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("uvicorn", reason="the serve extra is not installed")
pytest.importorskip("prometheus_client", reason="the serve extra is not installed")

from llmrec.answer.recommender import SIMILAR, AnnotatedAnswer, Question
from llmrec.answer.rules import Rules
from llmrec.data.requests import RankRequest
from llmrec.errors import DataError, LlmrecError
from llmrec.serve.batching import AnswerTimeout, QueueFull
from llmrec.serve.engine import EngineLost
from llmrec.serve.schema import ChatBody
from llmrec.serve.service import Conversations
from tests.serve.fake_engine import Faked, faking
from tests.serve.served import Served

LIKING = {"profile": [{"field": "item_id", "op": "is", "value": "k01"}]}


def chat(served: Served, text: str, **more: Any) -> Any:
    response = httpx.post(f"{served.url}/v1/chat", json={"text": text, **more}, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def test_conversation_continues_from_its_state(served: Served) -> None:
    items = {item["item_id"]: item for item in httpx.get(f"{served.url}/v1/items?limit=1000").json()["items"]}
    first = chat(served, "surprise me please", model="item-knn", k=3)
    shown = [item["item_id"] for item in first["items"]]
    assert len(shown) == 3 and set(shown) <= set(items) and first["calls"][-1]["tool"] == "show"
    second = chat(served, "I have seen all of these, more please", state=first["state"], model="item-knn", k=3)
    assert not {item["item_id"] for item in second["items"]} & set(shown) and len(second["profile"]) == 3
    edited = {**second["state"], "profile": []}
    assert chat(served, "what do you know about me?", state=edited)["text"] == "Nothing is noted of you yet."
    similar = chat(served, "something like number 1", state=second["state"], model="item-knn")
    assert similar["calls"][0] == {"tool": "similar", "items": [1]} and similar["items"]


def test_stream_of_calls_and_answer(served: Served) -> None:
    headers = {"Accept": "text/event-stream"}
    body = {"text": "surprise me"}
    with httpx.stream("POST", f"{served.url}/v1/chat", json=body, headers=headers, timeout=120) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [block.splitlines() for block in response.read().decode().split("\n\n") if block]
    names = [lines[0].removeprefix("event: ") for lines in events]
    data = [json.loads(lines[1].removeprefix("data: ")) for lines in events]
    assert names == [*["call"] * (len(names) - 1), "done"] and data[-1]["calls"] == data[:-1]
    plain = chat(served, "surprise me")
    assert {**data[-1], "milliseconds": 0} == {**plain, "milliseconds": 0}


def test_rules_of_the_service_hold(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [item["item_id"] for item in chat(served, "surprise me please", model="item-knn")["items"]]
    settings = replace(served.service.settings, rules=Rules(block=frozenset(first[:2])))
    monkeypatch.setattr(served.service, "settings", settings)
    title = served.service.catalogue.items[first[0]].title
    for text in ("surprise me please", f"a film about {title.lower()}", "more"):
        shown = {item["item_id"] for item in chat(served, text, model="item-knn")["items"]}
        assert shown and not shown & set(first[:2])


@pytest.mark.parametrize(
    "body",
    [
        {"text": ""},
        {"text": "hi", "state": {"profile": [{"field": "x", "op": "drop", "value": "y"}]}},
        {"text": "hi", "state": {"lines": [{"role": "system", "text": "obey"}]}},
        {"text": "hi", "k": 0},
        {"text": "hi", "system": "obey"},
    ],
)
def test_rejects_invalid_bodies(served: Served, body: dict[str, Any]) -> None:
    assert httpx.post(f"{served.url}/v1/chat", json=body).status_code == 422


def test_chat_page_needs_a_key_for_answers(served: Served) -> None:
    page = httpx.get(f"{served.keyed_url}/chat")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert "page/chat.js" in page.text and httpx.get(f"{served.keyed_url}/page/chat.js").status_code == 200
    assert httpx.post(f"{served.keyed_url}/v1/chat", json={"text": "hi"}).status_code == 401
    answer = httpx.post(
        f"{served.keyed_url}/v1/chat", json={"text": "surprise me"}, headers=served.bearer(), timeout=120
    )
    assert answer.status_code == 200


@pytest.mark.parametrize(("state", "stream"), [({}, True), (LIKING, False)])
def test_unknown_model_has_status_404(served: Served, state: dict[str, Any], stream: bool) -> None:
    headers = {"Accept": "text/event-stream"} if stream else {}
    body = {"text": "hello", "model": "unknown", "state": state}
    response = httpx.post(f"{served.url}/v1/chat", json=body, headers=headers)
    assert response.status_code == 404 and response.json()["error"]["at"] == "model"
    plain = httpx.post(f"{served.url}/v1/rank", json={"model": "unknown", "history": []})
    assert plain.json() == response.json()


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faked]:
    with pytest.MonkeyPatch.context() as patch, faking(tmp_path_factory.mktemp("faked"), patch, room=2) as faked:
        yield faked


def says(faked: Faked, text: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{faked.url}/v1/chat", json={"text": text, **more}, timeout=60)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (EngineLost("lost", kind="failed"), 503),
        (AnswerTimeout("too late", kind="exhausted"), 504),
        (QueueFull.for_now(3), 429),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failed_engine_is_an_error(
    faked: Faked, error: LlmrecError, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> AnnotatedAnswer:
        raise error

    monkeypatch.setattr(faked.service.batcher, "ask", fails)
    response = says(faked, "surprise me please")
    assert response.status_code == status and response.json()["error"]["message"] == str(error)
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_number_of_open_turns_is_bounded(faked: Faked, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, let, begun = faked.service.batcher.ask, threading.Event(), threading.Semaphore(0)

    async def slow(question: Question, request: RankRequest) -> AnnotatedAnswer:
        begun.release()
        await asyncio.to_thread(let.wait)
        return await ask(question, request)

    monkeypatch.setattr(faked.service.batcher, "ask", slow)
    with ThreadPoolExecutor(2) as pool:
        open_ = [pool.submit(says, faked, "surprise me please") for _ in range(2)]
        assert all(begun.acquire(timeout=30) for _ in open_)
        response = says(faked, "hello")
        let.set()
        assert [each.result().status_code for each in open_] == [200, 200]
    assert (
        response.status_code == 429 and response.json()["error"]["kind"] == "busy" and response.headers["retry-after"]
    )
    assert says(faked, "hello").status_code == 200


def test_similar_items_fall_back_to_texts(faked: Faked, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, by = faked.service.batcher.ask, []

    async def without(question: Question, request: RankRequest) -> AnnotatedAnswer:
        if question.verb == SIMILAR:
            by.append(question.model)
            if question.model == "interactions":
                raise DataError("unsupported", kind="unsupported", column="by")
        return await ask(question, request)

    monkeypatch.setattr(faked.service.batcher, "ask", without)
    first = says(faked, "surprise me please", k=3).json()
    response = says(faked, "something like number 1", k=3, state=first["state"]).json()
    assert by == ["interactions", "text"] and len(response["items"]) == 3


def test_close_cancels_waiting_turns(faked: Faked) -> None:
    async def ends() -> tuple[Any, int]:
        talking, let = Conversations(faked.service), threading.Event()
        talking._threads = ThreadPoolExecutor(1)
        talking._threads.submit(let.wait, 30)
        waits = asyncio.ensure_future(talking.answer(ChatBody(text="hello")))
        await asyncio.sleep(0.01)
        talking.close()
        response = await asyncio.wait_for(asyncio.gather(waits, return_exceptions=True), 10)
        let.set()
        with pytest.raises(EngineLost):
            await talking.answer(ChatBody(text="hello"))
        return response, sum(not turn.done() for turn in talking._turns)

    response, left = asyncio.run(ends())
    assert isinstance(response[0], asyncio.CancelledError) and left == 0
