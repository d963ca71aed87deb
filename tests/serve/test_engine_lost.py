"""Engines that are killed, hang, do not start, or are replaced while they are asked: over HTTP, with a fake engine."""

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

from llmrec.answer.known import Histories, Known
from llmrec.answer.language_model import LanguageModel
from llmrec.errors import LlmrecError
from llmrec.serve import engine
from llmrec.serve.app import make_app
from llmrec.serve.batching import Full, TooLate
from llmrec.serve.engine import EngineLost
from llmrec.serve.gates import Auth
from llmrec.serve.service import Service, Settings
from llmrec.serve.store import ServiceStore
from tests.serve.fake_engine import ITEMS, Faked, fake_engines, faking, told
from tests.serve.served import failure, listening, until, wait_ready

# For what must come; no result depends on it.
_LONG = 600.0


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_PATIENCE", 1.0)
        yield patch


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Iterator[Faked]:
    with faking(tmp_path_factory.mktemp("faked"), patch, window=0.0, batch=4, patience=_LONG) as found:
        yield found


def ask(faked: Faked, profile: str = "", **body: Any) -> httpx.Response:
    body = {"history": [{"title": "x"}], "profile": profile, "k": 8, **body}
    return httpx.post(f"{faked.url}/v1/rank", json=body, timeout=_LONG)


def working(faked: Faked) -> None:
    """Wait until the engine works on a question."""
    until(lambda: bool(faked.service.batcher._batch), "the engine is not asked")


def made(folder: Path, options: Any) -> Service:
    store = ServiceStore.open(str(folder / "store.sqlite"))
    return Service(Settings(options=options), Known(ITEMS, Histories.none()), store)


def listed(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def kill(faked: Faked) -> int:
    """Kill the engine as the system does when memory runs out."""
    pid = faked.service.engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


# --------------------------------------------------------------------------- killed


def test_a_killed_engine_comes_back_and_no_event_is_lost(faked: Faked) -> None:
    def event(n: int) -> None:
        body = {"events": [{"user_id": "killed", "item_id": f"i{n}"}]}
        assert httpx.post(f"{faked.url}/v1/events", json=body).json() == {"stored": 1}

    event(0)
    told(faked.folder, seconds=1.0)
    pid = kill(faked)
    until(lambda: not faked.service.engine.ready, "the engine is not missed")
    # The body, with a k that is no number, is not read.
    for refused in (ask(faked), ask(faked, k="x")):
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
        assert failure(refused)["kind"] == "failed"
    assert httpx.get(f"{faked.url}/ready").status_code == 503
    assert "llmrec_engine_up 0.0" in httpx.get(f"{faked.url}/metrics").text
    # What needs no engine is answered meanwhile.
    event(1)
    assert httpx.get(f"{faked.url}/v1/items/i3").json()["title"] == "Item 3"
    assert httpx.get(f"{faked.url}/health").json() == {"status": "ok"}
    wait_ready(faked.url)
    told(faked.folder)
    assert faked.service.engine.pid != pid
    found = httpx.get(f"{faked.url}/v1/users/killed").json()["history"]
    assert [each["item_id"] for each in found] == ["i0", "i1"]
    assert listed(ask(faked, history=None, user_id="killed")) == ["i2", "i3", "i4", "i5", "i6", "i7"]


def test_what_waits_when_the_engine_is_killed_is_refused_and_nothing_hangs(faked: Faked) -> None:
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(ask, faked, "sleep 1000")
        working(faked)
        rest = [pool.submit(ask, faked, profile) for profile in ["sleep 0.01"] * 8]
        until(lambda: faked.service.batcher.load.waiting == 8, "they do not wait")
        kill(faked)
        found = [each.result() for each in (first, *rest)]
    assert [each.status_code for each in found] == [503] * 9
    assert all(each.headers["Retry-After"] and failure(each) for each in found)
    wait_ready(faked.url)
    assert listed(ask(faked)) == list(ITEMS)


def test_a_question_that_kills_the_engine_is_the_last_that_this_one_hears(faked: Faked) -> None:
    pid = faked.service.engine.pid
    assert ask(faked, "die").status_code == 503
    wait_ready(faked.url)
    assert faked.service.engine.pid != pid and listed(ask(faked)) == list(ITEMS)


@pytest.mark.parametrize(("profile", "status", "kind"), [("defect", 500, "defect"), ("refuse", 422, "bad-value")])
def test_a_question_that_fails_takes_neither_others_nor_the_engine_with_it(
    faked: Faked, tmp_path: Path, profile: str, status: int, kind: str
) -> None:
    pid, go = faked.service.engine.pid, tmp_path / "go"
    with ThreadPoolExecutor(5) as pool:
        slow = pool.submit(ask, faked, f"wait {go}")
        working(faked)
        together = [pool.submit(ask, faked, each) for each in ("", profile, "", "")]
        until(lambda: faked.service.batcher.load.waiting == 4, "they are no batch")
        go.touch()
        found = [each.result() for each in (slow, *together)]
    assert [each.status_code for each in found] == [200, 200, status, 200, 200]
    assert failure(found[2])["kind"] == kind
    assert faked.service.engine.pid == pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_all_processes_are_sent_does_not_end_the_engine(
    faked: Faked, tmp_path: Path, number: signal.Signals
) -> None:
    """The service answers what was asked before it ends, and needs the engine for that."""
    pid, go = faked.service.engine.pid, tmp_path / "go"
    assert pid is not None
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, faked, f"wait {go}")
        working(faked)
        os.kill(pid, number)
        go.touch()
        assert listed(slow.result()) == list(ITEMS)
    assert faked.service.engine.pid == pid


def test_what_fails_beside_questions_leaves_the_engine_alive(faked: Faked, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = faked.service.engine.pid
    with pytest.raises(LlmrecError) as caught:
        faked.service.engine.call("prompt", "no question", None)
    assert caught.value.kind == "defect" and faked.service.engine.pid == pid
    assert listed(ask(faked)) == list(ITEMS)


# --------------------------------------------------------------------------- replaced


@pytest.mark.slow
def test_a_new_engine_takes_over_and_drops_no_question(faked: Faked) -> None:
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


def test_a_new_engine_that_does_not_start_leaves_the_old_one(faked: Faked) -> None:
    pid, models = faked.service.engine.pid, httpx.get(f"{faked.url}/v1/models").json()
    told(faked.folder, fails=True)
    try:
        answer = httpx.post(f"{faked.url}/v1/reload", timeout=_LONG)
        assert 400 <= answer.status_code < 600 and failure(answer)["kind"] == "damaged"
    finally:
        told(faked.folder)
    assert faked.service.engine.pid == pid and listed(ask(faked)) == list(ITEMS)
    assert httpx.get(f"{faked.url}/v1/models").json() == models


def test_on_a_gpu_without_room_for_two_the_old_engine_is_closed_first(faked: Faked, tmp_path: Path) -> None:
    engine, gpu = faked.service.engine, str(tmp_path / "gpu")
    reload = partial(httpx.post, f"{faked.url}/v1/reload", timeout=_LONG)
    try:
        told(faked.folder, gpu=gpu)
        assert reload().status_code == 200
        first = engine.pid
        # Both would not fit: this one starts after the other has ended.
        assert reload().status_code == 200
        second = engine.pid
        assert first != second and listed(ask(faked)) == list(ITEMS)
        # Files that cannot be read are found before.
        told(faked.folder, gpu=gpu, fails=True)
        answer = reload()
        assert failure(answer)["kind"] == "damaged" and "stay active" in failure(answer)["message"]
        assert engine.pid == second and listed(ask(faked)) == list(ITEMS)
        # Weights that do not fit are found after, and then engines are started until one runs.
        told(faked.folder, gpu=gpu, full=True)
        answer = reload()
        assert failure(answer)["kind"] == "exhausted" and "were closed" in failure(answer)["message"]
        assert ask(faked).status_code == 503
    finally:
        told(faked.folder)
    wait_ready(faked.url)
    assert listed(ask(faked)) == list(ITEMS)


@pytest.mark.parametrize(
    ("on_gpu", "free", "alone"),
    [
        (True, [80, 7], True),
        (True, [80, 45], False),
        (True, [24, 15], False),
        (True, [24, 11], True),
        (False, [], False),
    ],
)
def test_whether_a_gpu_has_room_for_a_second_engine_is_measured(
    on_gpu: bool, free: list[int], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Language(LanguageModel):
        """Its weights take what the second measurement lacks."""

        def __init__(self) -> None:
            self.warmed = False

        def warm(self) -> None:
            self.warmed = True

        @property
        def on_gpu(self) -> bool:
            return on_gpu

    model, left = Language(), iter(free)
    monkeypatch.setattr(engine, "free_bytes", lambda: next(left) * 2**30)
    models = SimpleNamespace(opened={"tuned": model, "popularity": object()})
    assert engine.warm(models) is alone and model.warmed  # type: ignore[arg-type]


def test_two_cannot_be_read_anew_at_a_time(faked: Faked) -> None:
    told(faked.folder, seconds=1.0)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda _: httpx.post(f"{faked.url}/v1/reload", timeout=_LONG), range(2)))
    finally:
        told(faked.folder)
    assert sorted(each.status_code for each in found) == [200, 429]
    (refused,) = [each for each in found if each.status_code == 429]
    assert failure(refused)["kind"] == "busy" and int(refused.headers["Retry-After"]) >= 1


def put(faked: Faked, name: str) -> None:
    body = {"items": [{"item_id": name, "title": f"Put {name}"}]}
    assert httpx.put(f"{faked.url}/v1/items", json=body, timeout=_LONG).json() == {"stored": 1}


def remove(faked: Faked, name: str) -> None:
    assert httpx.delete(f"{faked.url}/v1/items/{name}", timeout=_LONG).json() == {"removed": 1}


@pytest.mark.parametrize("how", ["replaced", "killed"])
@pytest.mark.parametrize("change", ["put", "removed"])
def test_what_changes_while_an_engine_starts_is_known_to_it(
    faked: Faked, monkeypatch: pytest.MonkeyPatch, how: str, change: str
) -> None:
    """Between what a new engine reads of the store and its first answer, the store changes."""
    engine, raced, threads = faked.service.engine, threading.Event(), []
    read, name = engine._changes, f"{change}-{how}"
    if change == "removed":
        put(faked, name)

    def reading() -> Any:
        found = read()
        threads.append(threading.Thread(target=put if change == "put" else remove, args=(faked, name)))
        threads[-1].start()
        until(lambda: name in faked.service.store.item_changes()[change == "removed"], "it is not stored")
        raced.set()
        return found

    monkeypatch.setattr(engine, "_changes", reading)
    if how == "replaced":
        assert httpx.post(f"{faked.url}/v1/reload", timeout=_LONG).status_code == 200
    else:
        kill(faked)
    assert raced.wait(_LONG)
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    wait_ready(faked.url)
    assert (name in listed(ask(faked, k=20))) is (change == "put")
    assert (name in engine.cards[0].signature) is (change == "put")
    if change == "put":
        remove(faked, name)


def test_items_are_changed_while_there_is_no_engine(faked: Faked) -> None:
    told(faked.folder, seconds=1.0)
    try:
        kill(faked)
        until(lambda: not faked.service.engine.ready, "the engine is not missed")
        put(faked, "between")
        assert not faked.service.engine.ready
    finally:
        told(faked.folder)
    wait_ready(faked.url)
    assert "between" in listed(ask(faked, k=20))
    remove(faked, "between")
    assert "between" not in listed(ask(faked, k=20))


def test_changes_of_one_item_at_once_leave_store_catalogue_and_engine_agreed(faked: Faked) -> None:
    def change(n: int) -> int:
        if n % 2:
            return httpx.delete(f"{faked.url}/v1/items/contested", timeout=_LONG).status_code
        put(faked, "contested")
        return 200

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(change, range(80))) <= {200, 404}
    stored = "contested" in faked.service.store.item_changes()[0]
    assert (httpx.get(f"{faked.url}/v1/items/contested").status_code == 200) is stored
    assert ("contested" in listed(ask(faked, k=20))) is stored
    if stored:
        remove(faked, "contested")


# --------------------------------------------------------------------------- too much, too late, gone


def test_too_many_questions_are_refused_and_the_others_answered(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    with faking(tmp_path, patch, window=0.0, batch=1, room=3, patience=_LONG) as faked:
        go = tmp_path / "go"
        with ThreadPoolExecutor(20) as pool:
            first = pool.submit(ask, faked, f"wait {go}")
            working(faked)
            rest = [pool.submit(ask, faked) for _ in range(19)]
            until(lambda: sum(each.done() for each in rest) == 16, "they are not refused")
            # What is refused is not read, but a key, a method and a path are checked as always.
            unread = httpx.post(f"{faked.url}/v1/rate", content=b"{", headers={"content-type": "application/json"})
            assert unread.status_code == 429 and int(unread.headers["Retry-After"]) >= 1
            assert httpx.get(f"{faked.url}/v1/rank").status_code == 405
            hello = httpx.post(f"{faked.url}/v1/chat", json={"text": "hello"}, timeout=_LONG)
            assert hello.status_code == 200, "an answer without the engine"
            go.touch()
            found = [each.result() for each in (first, *rest)]
        refused = [each for each in found if each.status_code == 429]
        assert {each.status_code for each in found} == {200, 429} and len(refused) == 16
        assert all(int(each.headers["Retry-After"]) >= 1 and failure(each)["kind"] == "busy" for each in refused)
        assert all(listed(each) == list(ITEMS) for each in found if each.status_code == 200)
        figures = httpx.get(f"{faked.url}/metrics").text
        assert f"llmrec_refused_total {float(len(refused) + 1)}" in figures and "llmrec_queue 0.0" in figures
        assert 'llmrec_requests_total{endpoint="/v1/rate",status="429"} 1.0' in figures


def test_an_engine_that_hangs_is_killed_and_another_answers(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    with faking(tmp_path, patch, window=0.0, patience=0.5) as faked:
        pid = faked.service.engine.pid
        late = ask(faked, "sleep 1000")
        assert late.status_code == 504 and failure(late)["kind"] == "exhausted"
        until(lambda: faked.service.engine.pid not in (pid, None), "it hangs on")
        # Half a second is little on a busy machine.
        until(lambda: ask(faked).status_code == 200, "the new engine does not answer")
        assert faked.service.engine.pid != pid


def test_a_client_that_leaves_takes_its_question_along(faked: Faked, tmp_path: Path) -> None:
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
    # The engine was never asked what would have killed it.
    assert faked.service.engine.pid == pid and listed(ask(faked)) == list(ITEMS)


# --------------------------------------------------------------------------- starting and stopping


@pytest.mark.slow
def test_an_engine_that_does_not_start_is_tried_again(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    fake_engines(patch)
    for broken in ({"fails": True}, {"dies": True}):
        options = told(tmp_path, **broken)
        service = made(tmp_path, options)
        with listening(make_app(service, Auth())) as (url,):
            until(lambda starts=service.engine: starts.starts >= 2, "it is not tried again")
            assert httpx.get(f"{url}/ready").status_code == 503
            refused = httpx.post(f"{url}/v1/rank", json={"history": [{"title": "x"}]})
            assert refused.status_code == 503 and refused.headers["Retry-After"]
            assert ("made up" in failure(refused)["message"]) is ("fails" in broken)
            told(tmp_path)
            wait_ready(url)
            assert httpx.post(f"{url}/v1/rank", json={"history": [{"title": "x"}]}).status_code == 200


def test_a_service_that_is_stopped_answers_what_was_asked(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(3) as pool:
        with faking(tmp_path, patch, window=0.0, batch=1, patience=_LONG) as faked:
            pid = faked.service.engine.pid
            asked = [pool.submit(ask, faked, f"wait {tmp_path / 'go'}")]
            working(faked)
            asked += [pool.submit(ask, faked, "sleep 0.2") for _ in range(2)]
            until(lambda: faked.service.batcher.load.waiting == 2, "they do not wait")
            (tmp_path / "go").touch()
        assert [each.result().status_code for each in asked] == [200] * 3
    assert pid is not None and not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("starts", [{"seconds": 1000}, {"fails": True}])
def test_a_service_whose_engine_starts_can_be_stopped(
    tmp_path: Path, patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch, starts: dict[str, Any]
) -> None:
    fake_engines(patch)
    monkeypatch.setattr(engine, "_SHORTEST", 1000.0)
    options = told(tmp_path, **starts)
    service = made(tmp_path, options)
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


@pytest.mark.slow
def test_a_service_whose_engine_hangs_can_be_stopped(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    with faking(tmp_path, patch, window=0.0, patience=1.0) as faked:
        pid = faked.service.engine.pid
        assert ask(faked, "sleep 1000").status_code == 504
    assert pid is not None and not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_service_can_be_stopped_while_it_is_read_anew(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(1) as pool:
        with faking(tmp_path, patch) as faked:
            told(tmp_path, seconds=1)
            reading = pool.submit(httpx.post, f"{faked.url}/v1/reload", timeout=_LONG)
            until(lambda: faked.service.engine.starts == 2, "it does not start")
        assert reading.result().status_code in (200, 503)
    assert not faked.service.engine.ready and not faked.service.engine._opening


# --------------------------------------------------------------------------- between the processes


def test_every_error_comes_through_the_line_as_it_is() -> None:
    importlib.import_module("llmrec.backends.server.client")  # its errors say more than a message

    def kinds(error: type[LlmrecError]) -> Iterator[type[LlmrecError]]:
        yield error
        for each in error.__subclasses__():
            yield from kinds(each)

    found = {kind for kind in kinds(LlmrecError) if kind.__module__.startswith("llmrec.")}
    assert {EngineLost, Full, TooLate} < found
    for kind in found:
        error = kind("made up", kind="failed", at="file.csv", column="k")
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is kind and (str(back), back.__dict__) == (str(error), error.__dict__)
