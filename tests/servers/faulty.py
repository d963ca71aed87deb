"""A server with OpenAI's protocol and deliberate faults, by a seed.

Each answer follows from its request, so that tests can compute it. Whether an attempt meets a fault follows from the
seed, the request and the number of attempts. The server counts requests and correct answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

FAULTS = (
    *("429", "429 with Retry-After", "500", "stall", "trickle", "cut off", "no JSON"),
    *("too few choices", "doubled choice"),
)
"""Faults that cost an attempt."""
SHUFFLED = "choices in another order"
"""Correct, but easily misread; only with several choices."""
EVERYTHING = frozenset({"chat", "completions", "logprobs", "named", "echo", "chat logprobs", "usage"})
SYMBOLS = tuple("123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_VOCABULARY = 600
_TRICKLE = 0.1


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How a server behaves.

    Attributes:
        share: Share of attempts that meet a fault.
        seed: Seed of the faults.
        stall: Seconds after which a stalled connection is closed.
        retry_after: The Retry-After header of some responses with status 429.
        latency: Maximum seconds before a correct answer.
        offers: Supported features, of `EVERYTHING`.
        key: The required API key; None: no key.
        texts: The text of each token, for log-probabilities by text.
        count: Text -> number of tokens; None counts words.
        think: Format of thoughts in chats: ``closed``, ``open``, ``tail`` or ``field``; empty: no thoughts.
        owner: Owner of the models in their list.
        delivered: Maximum number of correct answers; later requests get status 503.
        weights: A key of the log-probabilities.
        port: The port; 0: a free one.
    """

    share: float = 0.0
    seed: int = 0
    stall: float = 30.0
    retry_after: str = "0.05"
    latency: float = 0.0
    offers: frozenset[str] = EVERYTHING
    key: str | None = None
    texts: Mapping[int, str] = field(default_factory=dict)
    count: Callable[[str], int] | None = None
    think: str = ""
    owner: str = "somebody"
    delivered: int | None = None
    weights: str = ""
    port: int = 0


def digest_of(question: Any) -> str:
    """Return the digest of a request: chat messages, token ids or a text."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]


def answer_to(question: Any) -> str:
    """Return the answer to a request: a digit, which can be read as a rating, and the digest."""
    digest = digest_of(question)
    return f"{1 + int(digest, 16) % 5} {digest}"


def logprob(question: Any, token: Any, weights: str = "") -> float:
    """Return the log-probability of a token after a request, in nats."""
    drawn = hashlib.blake2b(json.dumps([question, token]).encode(), digest_size=8, key=weights.encode()).digest()
    return -0.01 - 20 * int.from_bytes(drawn, "big") / 2**64


class FaultyServer:
    """A server in a thread; `running` starts and ends one."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = 0
        self.url = ""
        self._now = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", self.behaviour.port))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._exchange(reader, writer):
                pass
        writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request, and return whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        text = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = lines[0].split(" ")
        if method == "GET":
            data = [{"id": "films", "object": "model", "owned_by": self.behaviour.owner}]
            return await _send(writer, 200, {"object": "list", "data": data})
        if self.behaviour.key is not None and headers.get("authorization") != f"Bearer {self.behaviour.key}":
            message = f"Incorrect API key provided: {headers.get('authorization')}"
            return await _send(writer, 401, {"error": {"message": message}})
        body = json.loads(text)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            return await self._answer(writer, path, body)
        finally:
            self._now -= 1

    async def _answer(self, writer: asyncio.StreamWriter, path: str, body: dict[str, Any]) -> bool:
        chat = path == "/v1/chat/completions"
        if not chat and (path != "/v1/completions" or "completions" not in self.behaviour.offers):
            return await _send(writer, 404, {"detail": "Not Found"})
        if chat and "chat" not in self.behaviour.offers:
            return await _send(writer, 404, {"detail": "Not Found"})
        self.bodies.append(body)
        if body.get("model") != "films":
            return await _send(writer, 404, {"error": {"message": f"The model {body.get('model')!r} does not exist"}})
        if body.get("echo") and "echo" not in self.behaviour.offers:
            return await _send(writer, 400, {"error": "echo is not supported"})
        digest = digest_of(body["messages"] if chat else body["prompt"])
        self.asked[digest] += 1
        drawn = random.Random(f"{self.behaviour.seed} {digest} {self.asked[digest]}")
        fault = drawn.choice(FAULTS) if drawn.random() < self.behaviour.share else ""
        answer = self._chat(body) if chat else self._completions(body)
        if self.behaviour.delivered is not None and sum(self.answered.values()) >= self.behaviour.delivered:
            return await _send(writer, 503, {"error": "enough"})
        if fault:
            self.faults[fault] += 1
            return await self._break(writer, fault, answer)
        if len(answer["choices"]) > 1 and drawn.random() < 0.5:
            self.faults[SHUFFLED] += 1
            answer["choices"] = drawn.sample(answer["choices"], len(answer["choices"]))
        if self.behaviour.latency:
            await asyncio.sleep(drawn.random() * self.behaviour.latency)
        goes_on = await _send(writer, 200, answer)
        self.answered[digest] += 1
        return goes_on

    async def _break(self, writer: asyncio.StreamWriter, fault: str, answer: dict[str, Any]) -> bool:
        if fault == "429":
            return await _send(writer, 429, {"error": {"message": "slow down"}})
        if fault == "429 with Retry-After":
            return await _send(writer, 429, {"error": "slow down"}, {"Retry-After": self.behaviour.retry_after})
        if fault == "500":
            return await _send(writer, 500, "<html>Internal Server Error</html>")
        if fault == "stall":
            await asyncio.sleep(self.behaviour.stall)
            return False
        body = json.dumps(answer).encode()
        if fault == "trickle":
            writer.write(_head(200, len(body), {}))
            # Single bytes prevent the timeout of a single read.
            for index in range(int(self.behaviour.stall / _TRICKLE)):
                writer.write(body[index : index + 1])
                await writer.drain()
                await asyncio.sleep(_TRICKLE)
            return False
        if fault == "cut off":
            writer.write(_head(200, len(body), {}) + body[: len(body) // 2])
            await writer.drain()
            return False
        if fault == "no JSON":
            return await _send(writer, 200, json.dumps(answer)[:-5])
        choices = answer["choices"]
        choices = choices[:-1] if fault == "too few choices" else [*choices[:-1], choices[0], choices[0]]
        return await _send(writer, 200, answer | {"choices": choices})

    # ----------------------------------------------------------------------- answers

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        question = body["messages"]
        text, reason = _cut(answer_to(question), body.get("max_tokens") or 1000)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.behaviour.think == "field":
            message["reasoning_content"] = "Perhaps 1, perhaps 5."
        elif self.behaviour.think:
            shown = {
                "closed": f"<think>Perhaps 1?\n</think>\n\n{text}",
                "open": "<think>Perhaps 1",
                "tail": f"1?</think>{text}",
            }
            message["content"] = shown[self.behaviour.think]
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        if body.get("logprobs") and "chat logprobs" in self.behaviour.offers:
            likely = sorted(SYMBOLS, key=lambda symbol: -self._logprob(question, symbol))[: body["top_logprobs"]]
            entries = [{"token": symbol, "logprob": self._logprob(question, symbol)} for symbol in likely]
            choice["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
        return self._whole([choice], len(json.dumps(question)) // 4, len(text.split()))

    def _completions(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["prompt"]
        rows = asked if isinstance(asked[0], list) else [asked]
        choices, written, read = [], 0, 0
        for place, row in enumerate(rows):
            text, reason = _cut(answer_to(row), body.get("max_tokens") or 16)
            written += len(text.split())
            read += self._length(row)
            choices.append(
                {"index": place, "text": text, "finish_reason": reason, "logprobs": self._logprobs(body, row)}
            )
        return self._whole(choices, read, written)

    def _logprob(self, question: Any, token: Any) -> float:
        return logprob(question, token, self.behaviour.weights)

    def _length(self, row: Sequence[int] | str) -> int:
        if isinstance(row, str):
            return self.behaviour.count(row) if self.behaviour.count else len(row.split())
        return len(row)

    def _logprobs(self, body: dict[str, Any], row: Any) -> dict[str, Any] | None:
        top = body.get("logprobs")
        if top is None or "logprobs" not in self.behaviour.offers or isinstance(row, str):
            return None
        if body.get("echo"):
            values = [None, *(self._logprob(row[:k], row[k]) for k in range(1, len(row)))]
            return {"token_logprobs": [*values, self._logprob(row, 0)], "top_logprobs": None}
        named = body.get("logprob_token_ids") if "named" in self.behaviour.offers else None
        if named:
            return {"top_logprobs": [{f"token_id:{i}": self._logprob(row, i) for i in named}]}
        likely = sorted(range(_VOCABULARY), key=lambda i: -self._logprob(row, i))[:top]
        return {"top_logprobs": [{self.behaviour.texts.get(i, f"<{i}>"): self._logprob(row, i) for i in likely}]}

    def _whole(self, choices: list[dict[str, Any]], read: int, written: int) -> dict[str, Any]:
        used = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {"model": "films", "choices": choices} | ({"usage": used} if "usage" in self.behaviour.offers else {})


@contextmanager
def running(behaviour: Behaviour) -> Iterator[FaultyServer]:
    """Run a server for a while."""
    server = FaultyServer(behaviour)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _cut(text: str, most: int) -> tuple[str, str]:
    words = text.split()
    return " ".join(words[:most]), "stop" if len(words) <= most else "length"


def _head(status: int, length: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Status", "Content-Type: application/json", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _send(
    writer: asyncio.StreamWriter, status: int, value: Any, headers: Mapping[str, str] | None = None
) -> bool:
    text = (value if isinstance(value, str) else json.dumps(value)).encode()
    writer.write(_head(status, len(text), headers or {}) + text)
    await writer.drain()
    return True
