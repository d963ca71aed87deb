"""The limits of the HTTP server, over real sockets: headers, half-open requests, connections, slow readers."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("uvicorn", reason="the serve extra is not installed")

from llmrec.serve.server import HEADER_LIMIT
from tests.serve.served import listening

# Timeout in seconds; no result depends on it.
PATIENCE = 60.0
SHORT = 0.2
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALVES = {
    "nothing": b"",
    "half of the headers": b"GET / HTTP/1.1\r\nHost: localhost\r\nX-",
    "half of a body": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc",
    "half of a chunk": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    "half of a second request": REQUEST + b"GET / HT",
}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer a complete request; ``/slow`` answers after the timeout of the tests."""
    if scope["type"] != "http":
        return
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        if not message.get("more_body"):
            break
    if scope["path"] == "/slow":
        await asyncio.sleep(4 * SHORT)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextmanager
def connected(url: str, sent: bytes = b"") -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as line:
        line.sendall(sent)
        yield line


def rest(line: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while piece := line.recv(65536):
            received += piece
    return received


@pytest.mark.parametrize(
    "sent", [b"X-A: " + b"a" * 4 * HEADER_LIMIT, b"X-A: b\r\n" * HEADER_LIMIT, b"a" * 4 * HEADER_LIMIT]
)
def test_rejects_endless_headers(sent: bytes) -> None:
    with listening(echo) as (url,), connected(url) as line:
        # The server closes the connection while this is being sent.
        with suppress(OSError):
            line.sendall(b"GET / HTTP/1.1\r\n" + sent)
        assert rest(line)[:12] in (b"HTTP/1.1 400", b"")
        assert httpx.get(url).text == "ok"


def test_headers_within_the_limit() -> None:
    with listening(echo) as (url,):
        assert httpx.get(url, headers={"X-A": "a" * (HEADER_LIMIT - 1000)}).text == "ok"


def test_incomplete_requests_time_out() -> None:
    with listening(echo, timeout=SHORT) as (url,), ExitStack() as stack:
        lines = {name: stack.enter_context(connected(url, half)) for name, half in HALVES.items()}
        for name, line in lines.items():
            assert rest(line).count(b"200 OK") == (name == "half of a second request"), name


def test_answer_may_take_longer_than_a_request() -> None:
    with listening(echo, timeout=SHORT) as (url,):
        assert httpx.get(f"{url}/slow", timeout=PATIENCE).text == "ok"


def test_half_open_connections_do_not_block_others() -> None:
    flooded = threading.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/slow":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"o", "more_body": True})
            await asyncio.to_thread(flooded.wait, PATIENCE)
            await send({"type": "http.response.body", "body": b"k"})
        else:
            await echo(scope, receive, send)

    with listening(slow, connections=4) as (url,), ExitStack() as stack:
        slow_line = stack.enter_context(connected(url, b"GET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
        slow_line.recv(1, socket.MSG_PEEK)
        half = [stack.enter_context(connected(url, HALVES["half of the headers"])) for _ in range(12)]
        for _ in range(3):
            assert httpx.get(url).text == "ok"
        # The oldest are closed first, except the one that is being answered.
        assert [rest(line) for line in half[:8]] == [b""] * 8
        flooded.set()
        assert rest(slow_line).endswith(b"ok")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system cannot")
def test_client_that_does_not_read_times_out() -> None:
    ended = threading.Event()

    async def flood(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(100):
                await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True})
            ended.set()

    with listening(flood, timeout=SHORT) as (url,), connected(url, REQUEST):
        assert ended.wait(PATIENCE)


def test_forwarding_headers_do_not_change_the_client() -> None:
    seen = []

    async def noted(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.append((scope["client"][0], scope["scheme"]))
        await echo(scope, receive, send)

    with listening(noted) as (url,), closing(httpx.Client()) as client:
        client.get(url, headers={"X-Forwarded-For": "10.0.0.1", "X-Forwarded-Proto": "https"})
    assert seen == [("127.0.0.1", "http")]
