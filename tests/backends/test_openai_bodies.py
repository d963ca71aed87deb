"""Response bodies of a server: size limits, compression, invalid text, and masking of the API key."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import resource
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from llmrec.backends.cache import AnswerStore
from llmrec.backends.server import client, probe
from llmrec.backends.server.client import ServerClient, ServerUsage, completion_body, likelihood_body, parse_usage
from llmrec.errors import BackendError
from llmrec.types import Cost
from tests.facts import Facts, raises
from tests.servers.client import cached, question, section
from tests.servers.faulty import Behaviour, FaultyServer, running

httpx = pytest.importorskip("httpx")

SECRET = "sk-not-for-the-page-1234567890"
MIB = 2**20


def test_further_keys_are_in_every_request() -> None:
    body = likelihood_body(section("http://x", extra={"temperature": None, "seed": 7}), [[1, 2]])
    assert body == {"model": "films", "seed": 7, "prompt": [[1, 2]], "max_tokens": 1, "echo": True, "logprobs": 1}
    assert completion_body(section("http://x", extra={"seed": 7}), [1], room=3)["seed"] == 7


class Endless(httpx.AsyncByteStream):  # type: ignore[misc, name-defined]
    """A body without an end, and the number of bytes that were read."""

    def __init__(self, block: bytes = b"x" * 65536) -> None:
        self.block, self.taken = block, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.taken += len(self.block)
            yield self.block


def ask(respond: Callable[[Any], Any], parse: Callable[[Any], Any] = lambda value: value, **changes: Any) -> Any:
    """Send one request to a fake server."""
    server = section("http://127.0.0.1:9/v1", **{"attempts": 2, **changes})

    async def send() -> Any:
        wire = ServerClient(server, ServerUsage(server, None))
        headers = wire._client.headers
        await wire.close()
        wire._client = httpx.AsyncClient(transport=httpx.MockTransport(respond), headers=headers)
        try:
            return await wire.ask("/completions", {}, parse, what=lambda: "a request")
        finally:
            await wire.close()

    return asyncio.run(send())


def answer(body: bytes, status: int = 200, **headers: str) -> Any:
    return httpx.Response(
        status, stream=httpx.ByteStream(body), headers={name.replace("_", "-"): text for name, text in headers.items()}
    )


def packed(kind: str) -> bytes:
    return zlib.compress(b'{"text": "A"}') if kind == "deflate" else gzip.compress(b'{"text": "A"}')


@pytest.mark.parametrize("status", [200, 400, 500])
def test_endless_body_is_cut_at_the_limit(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", MIB)
    body = Endless()
    with raises(BackendError, Facts("unreachable", says="larger than 1 MiB (2)")):
        ask(lambda _: httpx.Response(status, stream=body))
    assert body.taken <= 2 * (MIB + 2 * len(body.block))


def test_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", MIB)
    # 400 MiB in 400 kB, in one piece.
    unpacker = zlib.compressobj(9, wbits=31)
    bomb = b"".join([*(unpacker.compress(b" " * MIB) for _ in range(400)), unpacker.flush()])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with raises(BackendError, Facts("unreachable", says="larger than 1 MiB")):
        ask(lambda _: answer(bomb, content_encoding="gzip"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("kind", ["x-gzip", "deflate"])
def test_compressed_answers_are_read(kind: str) -> None:
    def respond(request: Any) -> Any:
        assert request.headers["accept-encoding"] == "gzip"
        return answer(packed(kind), content_encoding=kind)

    assert ask(respond) == {"text": "A"}


@pytest.mark.parametrize(
    ("encoding", "body", "says"),
    [
        ("gzip", b"no gzip at all", "answer cut off"),
        # With an id, since gzip writes the time into its header.
        pytest.param("gzip", packed("gzip")[:-9], "answer cut off", id="half a gzip"),
        ("br", b"whatever", "packed as br"),
    ],
)
def test_undecodable_answers_are_retried(encoding: str, body: bytes, says: str) -> None:
    answers = iter([answer(body, content_encoding=encoding), answer(b'{"text": "A"}')])

    assert ask(lambda _: next(answers)) == {"text": "A"}
    with raises(BackendError, Facts("unreachable", says=says)):
        ask(lambda _: answer(body, content_encoding=encoding), attempts=1)


def test_deeply_nested_json_is_retried() -> None:
    brackets = b"[" * 200_000
    answers = iter([answer(brackets), answer(b'{"text": "A"}')])
    assert ask(lambda _: next(answers)) == {"text": "A"}
    with raises(BackendError, Facts("failed", "http://127.0.0.1:9/v1/completions", says="status 400")):
        ask(lambda _: answer(brackets, status=400))


def test_lone_surrogate_is_replaced_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FaultyServer, "_chat", _chat_with("4 \ud800A"))
    with running(Behaviour()) as server:
        for recalled in (0, 1):
            store = AnswerStore(tmp_path / "answers.sqlite")
            backend = cached(store, section(server.url))
            assert backend.generate([question("a")], max_tokens=4)[0].text == "4 ?A"
            assert backend.recalled == recalled
            backend.close()
            store.close()


def _chat_with(text: str) -> Callable[[FaultyServer, dict[str, Any]], dict[str, Any]]:
    def chat(server: FaultyServer, body: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return server._whole([{"index": 0, "message": message, "finish_reason": "stop"}], 3, 2)

    return chat


def test_key_in_an_answer_is_masked_before_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FILMS_KEY", SECRET)
    monkeypatch.setattr(FaultyServer, "_chat", _chat_with(f"4, and your key is {SECRET}."))
    logging.getLogger("llmrec").setLevel(logging.WARNING)
    with running(Behaviour(key=SECRET)) as server:
        store = AnswerStore(tmp_path / "answers.sqlite")
        backend = cached(store, section(server.url, key_env="FILMS_KEY"))
        answers = backend.generate([question("a"), question("b")], max_tokens=4)
        assert [each.text for each in answers] == ["4, and your key is ***."] * 2
        backend.close()
        store.close()
    for file in tmp_path.iterdir():
        assert SECRET.encode() not in file.read_bytes()
    assert sum("repeats the API key" in record.message for record in caplog.records) == 1
    assert SECRET not in caplog.text


def test_key_with_json_escapes_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FILMS_KEY", SECRET)
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in SECRET)
    body = f'{{"a": ["{escaped}", {{"{escaped}": 1}}], "b": 2}}'.encode()
    assert SECRET in json.dumps(json.loads(body))
    value = ask(lambda _: answer(body), key_env="FILMS_KEY")
    assert value == {"a": ["***", {"***": 1}], "b": 2}


def test_placeholder_key_is_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FILMS_KEY", "EMPTY")
    assert ask(lambda _: answer(b'{"text": "EMPTY"}'), key_env="FILMS_KEY") == {"text": "EMPTY"}


@pytest.mark.parametrize("count", [10**30, -1, "many"])
def test_invalid_usage_is_not_counted(count: object) -> None:
    assert parse_usage({"usage": {"prompt_tokens": count, "completion_tokens": 1}}) is None
    assert parse_usage({"usage": {"prompt_tokens": 3, "completion_tokens": 1}}) == Cost(
        prompt_tokens=3, completion_tokens=1
    )


def test_overflowing_log_probability_is_malformed() -> None:
    body = {"choices": [{"index": 0, "logprobs": {"top_logprobs": [{"token_id:7": -(10**400)}]}}]}
    with raises(BackendError, Facts("unreachable", says="malformed answer")):
        ask(lambda _: answer(json.dumps(body).encode()), lambda value: probe.parse_named_labels(value, [7]))
