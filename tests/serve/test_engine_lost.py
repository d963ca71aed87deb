"""Engines that are killed, hang, fail to start or are replaced, over HTTP with a fake engine."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("uvicorn", reason="the serve extra is not installed")
pytest.importorskip("prometheus_client", reason="the serve extra is not installed")

from llmrec.answer.known import Histories, KnownEntities
from llmrec.answer.language_model import LanguageModel
from llmrec.errors import LlmrecError
from llmrec.serve import engine
from llmrec.serve.app import make_app
from llmrec.serve.batching import AnswerTimeout, QueueFull
from llmrec.serve.engine import EngineLost
from llmrec.serve.gates import Auth
from llmrec.serve.service import Service, Settings
from llmrec.serve.store import ServiceStore
from tests.serve.fake_engine import ITEMS, Faked, configure, fake_engines, faking
from tests.serve.served import failure, listening, until, wait_ready

# Timeout in seconds; no result depends on it.
_LONG = 600.0


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_STOP_TIMEOUT", 1.0)
        yield patch


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Iterator[Faked]:
    with faking(tmp_path_factory.mktemp("faked"), patch, window=0.0, batch=4, patience=_LONG) as faked:
        yield faked


def ask(faked: Faked, profile: str = "", **body: Any) -> httpx.Response:
    body = {"history": [{"title": "x"}], "profile": profile, "k": 8, **body}
    return httpx.post(f"{faked.url}/v1/rank", json=body, timeout=_LONG)


def working(faked: Faked) -> None:
    """Wait until the engine is busy."""
    until(lambda: bool(faked.service.batcher._batch), "the engine is idle")


def make(folder: Path, options: Any) -> Service:
    store = ServiceStore.open(str(folder / "store.sqlite"))
    return Service(Settings(options=options), KnownEntities(ITEMS, Histories.none()), store)


def listed(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def kill(faked: Faked) -> int:
    """Kill the engine as the kernel does when memory runs out."""
    pid = faked.service.engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def test_killed_engine_restarts_and_keeps_events(faked: Faked) -> None:
    def event(n: int) -> None:
        body = {"events": [{"user_id": "killed", "item_id": f"i{n}"}]}
        assert httpx.post(f"{faked.url}/v1/events", json=body).json() == {"stored": 1}

    event(0)
    configure(faked.folder, seconds=1.0)
    pid = kill(faked)
    until(lambda: not faked.service.engine.ready, "the engine is not missed")
    # The body is not read, also with a wrong value.
    for refused in (ask(faked), ask(faked, k="x")):
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
        assert failure(refused)["kind"] == "failed"
    assert httpx.get(f"{faked.url}/ready").status_code == 503
    assert "llmrec_engine_up 0.0" in httpx.get(f"{faked.url}/metrics").text
    # Other endpoints answer, and items can be changed meanwhile.
    event(1)
    put_item(faked, "between")
    assert httpx.get(f"{faked.url}/v1/items/i3").json()["title"] == "Item 3"
    assert httpx.get(f"{faked.url}/health").json() == {"status": "ok"}
    wait_ready(faked.url)
    configure(faked.folder)
    assert faked.service.engine.pid != pid
    results = httpx.get(f"{faked.url}/v1/users/killed").json()["history"]
    assert [each["item_id"] for each in results] == ["i0", "i1"]
    expected = ["i2", "i3", "i4", "i5", "i6", "i7", "between"]
    assert listed(ask(faked, history=None, user_id="killed")) == expected
    remove_item(faked, "between")


def test_waiting_questions_of_a_killed_engine_fail(faked: Faked) -> None:
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(ask, faked, "sleep 1000")
        working(faked)
        rest = [pool.submit(ask, faked, profile) for profile in ["sleep 0.01"] * 8]
        until(lambda: faked.service.batcher.load.waiting == 8, "they do not wait")
        kill(faked)
        results = [each.result() for each in (first, *rest)]
    assert [each.status_code for each in results] == [503] * 9
    assert all(each.headers["Retry-After"] and failure(each) for each in results)
    wait_ready(faked.url)
    assert listed(ask(faked)) == list(ITEMS)


def test_failed_question_affects_no_other(faked: Faked, tmp_path: Path) -> None:
    pid, go = faked.service.engine.pid, tmp_path / "go"
    with ThreadPoolExecutor(5) as pool:
        slow = pool.submit(ask, faked, f"wait {go}")
        working(faked)
        together = [pool.submit(ask, faked, each) for each in ("", "defect", "refuse", "")]
        until(lambda: faked.service.batcher.load.waiting == 4, "they are no batch")
        go.touch()
        results = [each.result() for each in (slow, *together)]
    assert [each.status_code for each in results] == [200, 200, 500, 422, 200]
    assert [failure(each)["kind"] for each in results[2:4]] == ["defect", "bad-value"]
    assert faked.service.engine.pid == pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_engine_ignores_signals_to_the_process_group(faked: Faked, tmp_path: Path, number: signal.Signals) -> None:
    """A stopping service needs the engine for pending questions."""
    pid, go = faked.service.engine.pid, tmp_path / "go"
    assert pid is not None
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, faked, f"wait {go}")
        working(faked)
        os.kill(pid, number)
        go.touch()
        assert listed(slow.result()) == list(ITEMS)
    assert faked.service.engine.pid == pid


def test_failed_call_leaves_the_engine_alive(faked: Faked, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = faked.service.engine.pid
    with pytest.raises(LlmrecError) as caught:
        faked.service.engine.call("prompt", "no question", None)
    assert caught.value.kind == "defect" and faked.service.engine.pid == pid
    assert listed(ask(faked)) == list(ITEMS)


@pytest.mark.slow
def test_reload_drops_no_question(faked: Faked) -> None:
    before, stop = faked.service.engine.pid, threading.Event()

    def client(n: int) -> list[int]:
        statuses = []
        while not stop.is_set():
            statuses.append(ask(faked, "sleep 0.01" if n % 2 else "").status_code)
        return statuses

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(client, n) for n in range(8)]
        try:
            for _ in range(3):
                assert httpx.post(f"{faked.url}/v1/reload", timeout=_LONG).status_code == 200
        finally:
            stop.set()
        statuses = [status for each in asking for status in each.result()]
    assert set(statuses) == {200} and len(statuses) > 24
    assert faked.service.engine.pid != before


def test_failed_reload_keeps_the_old_engine(faked: Faked) -> None:
    pid, models = faked.service.engine.pid, httpx.get(f"{faked.url}/v1/models").json()
    configure(faked.folder, fails=True)
    try:
        answer = httpx.post(f"{faked.url}/v1/reload", timeout=_LONG)
        assert 400 <= answer.status_code < 600 and failure(answer)["kind"] == "damaged"
    finally:
        configure(faked.folder)
    assert faked.service.engine.pid == pid and listed(ask(faked)) == list(ITEMS)
    assert httpx.get(f"{faked.url}/v1/models").json() == models


def test_reload_on_a_gpu_with_room_for_one_engine(faked: Faked, tmp_path: Path) -> None:
    engine, gpu = faked.service.engine, str(tmp_path / "gpu")
    reload = partial(httpx.post, f"{faked.url}/v1/reload", timeout=_LONG)
    try:
        configure(faked.folder, gpu=gpu)
        assert reload().status_code == 200
        first = engine.pid
        # The new engine starts after the old one has ended.
        assert reload().status_code == 200
        second = engine.pid
        assert first != second and listed(ask(faked)) == list(ITEMS)
        # Damaged files are detected before the old engine ends.
        configure(faked.folder, gpu=gpu, fails=True)
        answer = reload()
        assert failure(answer)["kind"] == "damaged" and "stay active" in failure(answer)["message"]
        assert engine.pid == second and listed(ask(faked)) == list(ITEMS)
        # Lack of memory is detected afterwards; then starts are repeated until one succeeds.
        configure(faked.folder, gpu=gpu, full=True)
        answer = reload()
        assert failure(answer)["kind"] == "exhausted" and "were closed" in failure(answer)["message"]
        assert ask(faked).status_code == 503
    finally:
        configure(faked.folder)
    wait_ready(faked.url)
    assert listed(ask(faked)) == list(ITEMS)


@pytest.mark.parametrize(
    ("on_gpu", "free", "alone"),
    [
        (True, [80, 45], False),
        (True, [24, 11], True),
        (False, [], False),
    ],
)
def test_room_for_a_second_engine_is_measured(
    on_gpu: bool, free: list[int], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Language(LanguageModel):
        """Its weights need the difference of the two measurements."""

        def __init__(self) -> None:
            self.warmed = False

        def warm(self) -> None:
            self.warmed = True

        @property
        def on_gpu(self) -> bool:
            return on_gpu

    model, left = Language(), iter(free)
    monkeypatch.setattr(engine, "free_gpu_bytes", lambda: next(left) * 2**30)
    models = SimpleNamespace(opened={"tuned": model, "popularity": object()})
    assert engine.load_language_models(models) is alone and model.warmed  # type: ignore[arg-type]


def test_rejects_concurrent_reload(faked: Faked) -> None:
    configure(faked.folder, seconds=1.0)
    try:
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda _: httpx.post(f"{faked.url}/v1/reload", timeout=_LONG), range(2)))
    finally:
        configure(faked.folder)
    assert sorted(each.status_code for each in results) == [200, 429]
    (refused,) = [each for each in results if each.status_code == 429]
    assert failure(refused)["kind"] == "busy" and int(refused.headers["Retry-After"]) >= 1


def put_item(faked: Faked, name: str) -> None:
    body = {"items": [{"item_id": name, "title": f"Put {name}"}]}
    assert httpx.put(f"{faked.url}/v1/items", json=body, timeout=_LONG).json() == {"stored": 1}


def remove_item(faked: Faked, name: str) -> None:
    assert httpx.delete(f"{faked.url}/v1/items/{name}", timeout=_LONG).json() == {"removed": 1}


@pytest.mark.parametrize(("how", "change"), [("replaced", "put"), ("killed", "removed")])
def test_new_engine_knows_changes_during_its_start(
    faked: Faked, monkeypatch: pytest.MonkeyPatch, how: str, change: str
) -> None:
    """The store changes after the new engine has read it."""
    engine, changed, threads = faked.service.engine, threading.Event(), []
    read, name = engine._changes, f"{change}-{how}"
    if change == "removed":
        put_item(faked, name)

    def reading() -> Any:
        result = read()
        threads.append(threading.Thread(target=put_item if change == "put" else remove_item, args=(faked, name)))
        threads[-1].start()
        until(lambda: name in faked.service.store.item_changes()[change == "removed"], "it is not stored")
        changed.set()
        return result

    monkeypatch.setattr(engine, "_changes", reading)
    if how == "replaced":
        assert httpx.post(f"{faked.url}/v1/reload", timeout=_LONG).status_code == 200
    else:
        kill(faked)
    assert changed.wait(_LONG)
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    wait_ready(faked.url)
    assert (name in listed(ask(faked, k=20))) is (change == "put")
    assert (name in engine.cards[0].signature) is (change == "put")
    if change == "put":
        remove_item(faked, name)


def test_concurrent_changes_of_an_item_are_consistent(faked: Faked) -> None:
    def change(n: int) -> int:
        if n % 2:
            return httpx.delete(f"{faked.url}/v1/items/contested", timeout=_LONG).status_code
        put_item(faked, "contested")
        return 200

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(change, range(40))) <= {200, 404}
    stored = "contested" in faked.service.store.item_changes()[0]
    assert (httpx.get(f"{faked.url}/v1/items/contested").status_code == 200) is stored
    assert ("contested" in listed(ask(faked, k=20))) is stored
    if stored:
        remove_item(faked, "contested")


def test_overload_rejects_some_questions(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    with faking(tmp_path, patch, window=0.0, batch=1, room=3, patience=_LONG) as faked:
        go = tmp_path / "go"
        with ThreadPoolExecutor(20) as pool:
            first = pool.submit(ask, faked, f"wait {go}")
            working(faked)
            rest = [pool.submit(ask, faked) for _ in range(19)]
            until(lambda: sum(each.done() for each in rest) == 16, "they are not refused")
            # Rejected bodies are not read; methods are still checked.
            unread = httpx.post(f"{faked.url}/v1/rate", content=b"{", headers={"content-type": "application/json"})
            assert unread.status_code == 429 and int(unread.headers["Retry-After"]) >= 1
            assert httpx.get(f"{faked.url}/v1/rank").status_code == 405
            hello = httpx.post(f"{faked.url}/v1/chat", json={"text": "hello"}, timeout=_LONG)
            assert hello.status_code == 200
            go.touch()
            results = [each.result() for each in (first, *rest)]
        refused = [each for each in results if each.status_code == 429]
        assert {each.status_code for each in results} == {200, 429} and len(refused) == 16
        assert all(int(each.headers["Retry-After"]) >= 1 and failure(each)["kind"] == "busy" for each in refused)
        assert all(listed(each) == list(ITEMS) for each in results if each.status_code == 200)
        figures = httpx.get(f"{faked.url}/metrics").text
        assert f"llmrec_refused_total {float(len(refused) + 1)}" in figures and "llmrec_queue 0.0" in figures
        assert 'llmrec_requests_total{endpoint="/v1/rate",status="429"} 1.0' in figures


def test_hanging_engine_is_replaced(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    with faking(tmp_path, patch, window=0.0, patience=0.5) as faked:
        pid = faked.service.engine.pid
        late = ask(faked, "sleep 1000")
        assert late.status_code == 504 and failure(late)["kind"] == "exhausted"
        until(lambda: faked.service.engine.pid not in (pid, None), "it hangs on")
        # Half a second may be too short on a busy machine.
        until(lambda: ask(faked).status_code == 200, "the new engine does not answer")
        assert faked.service.engine.pid != pid


def test_question_of_a_disconnected_client_is_dropped(faked: Faked, tmp_path: Path) -> None:
    host, port = faked.url.removeprefix("http://").split(":")
    body = b'{"history": [{"title": "x"}], "profile": "die"}'
    head = f"POST /v1/rank HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    pid, load, go = faked.service.engine.pid, faked.service.batcher.load, tmp_path / "go"
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, faked, f"wait {go}")
        working(faked)
        with socket.create_connection((host, int(port))) as line:
            line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: load.waiting == 1, "it does not wait")
        until(lambda: load.waiting == 0, "it waits on")
        go.touch()
        assert slow.result().status_code == 200
    # The question would have killed the engine.
    assert faked.service.engine.pid == pid and listed(ask(faked)) == list(ITEMS)


@pytest.mark.slow
def test_failed_start_is_repeated(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    fake_engines(patch)
    for broken in ({"fails": True}, {"dies": True}):
        options = configure(tmp_path, **broken)
        service = make(tmp_path, options)
        with listening(make_app(service, Auth())) as (url,):
            until(lambda starts=service.engine: starts.starts >= 2, "it is not tried again")
            assert httpx.get(f"{url}/ready").status_code == 503
            refused = httpx.post(f"{url}/v1/rank", json={"history": [{"title": "x"}]})
            assert refused.status_code == 503 and refused.headers["Retry-After"]
            assert ("cannot be loaded" in failure(refused)["message"]) is ("fails" in broken)
            configure(tmp_path)
            wait_ready(url)
            assert httpx.post(f"{url}/v1/rank", json={"history": [{"title": "x"}]}).status_code == 200


def test_stopping_service_answers_pending_questions(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(3) as pool:
        with faking(tmp_path, patch, window=0.0, batch=1, patience=_LONG) as faked:
            pid = faked.service.engine.pid
            pending = [pool.submit(ask, faked, f"wait {tmp_path / 'go'}")]
            working(faked)
            pending += [pool.submit(ask, faked, "sleep 0.2") for _ in range(2)]
            until(lambda: faked.service.batcher.load.waiting == 2, "they do not wait")
            (tmp_path / "go").touch()
        assert [each.result().status_code for each in pending] == [200] * 3
    assert pid is not None and not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("starts", [{"seconds": 1000}, {"fails": True}])
def test_service_can_be_stopped_while_the_engine_starts(
    tmp_path: Path, patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch, starts: dict[str, Any]
) -> None:
    fake_engines(patch)
    monkeypatch.setattr(engine, "_MIN_RESTART_DELAY", 1000.0)
    options = configure(tmp_path, **starts)
    service = make(tmp_path, options)
    with listening(make_app(service, Auth())) as (url,):
        until(lambda: service.engine.starts > 0, "it does not start")
        until(lambda: "fails" not in starts or service.engine.fault is not None, "it does not fail")
        assert httpx.get(f"{url}/ready").status_code == 503
        question = {"history": ["i0"]}
        for path, body in (("rank", question), ("rank/batch", {"requests": [question, question]})):
            refused = httpx.post(f"{url}/v1/{path}", json=body)
            assert refused.status_code == 503 and refused.headers["retry-after"], path
            assert failure(refused)["kind"] == "failed"
    assert not service.engine.ready and not service.engine._opening


def test_errors_can_be_pickled() -> None:
    importlib.import_module("llmrec.backends.server.client")  # its errors contain more than a message

    def kinds(error: type[LlmrecError]) -> Iterator[type[LlmrecError]]:
        yield error
        for each in error.__subclasses__():
            yield from kinds(each)

    results = {kind for kind in kinds(LlmrecError) if kind.__module__.startswith("llmrec.")}
    assert {EngineLost, QueueFull, AnswerTimeout} < results
    for kind in results:
        error = kind("failed", kind="failed", at="file.csv", column="k")
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is kind and (str(back), back.__dict__) == (str(error), error.__dict__)
