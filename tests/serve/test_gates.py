"""Access to the service: keys, limits, origins, hosts, sizes and malformed bodies, partly over raw sockets."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("uvicorn", reason="the serve extra is not installed")

from llmrec.serve.gates import Auth
from llmrec.serve.keys import Keys, RateLimit, create_key, revoke_key
from tests.serve.fake_engine import faking
from tests.serve.served import Served, failure

QUESTION = json.dumps({"history": ["k01"], "candidates": ["k02", "k03"]}).encode()
JSON = "Content-Type: application/json"


@dataclass(frozen=True)
class Answer:
    """All responses of a connection."""

    statuses: tuple[int, ...]
    text: str


def talk(url: str, *parts: bytes, hang_up: bool = False) -> Answer:
    """Send raw bytes, and read until the service closes the connection; ``hang_up`` closes the sending side."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        received = b""
        # The service may close the connection early.
        with suppress(OSError):
            for part in parts:
                line.sendall(part)
            if hang_up:
                line.shutdown(socket.SHUT_WR)
        with suppress(OSError):
            while piece := line.recv(65536):
                received += piece
                line.settimeout(1)
    text = received.decode("utf-8", "replace")
    return Answer(tuple(int(each) for each in re.findall(r"HTTP/1\.[01] (\d{3}) ", text)), text)


def request(start: str, *headers: str, body: bytes = b"", host: str = "localhost") -> bytes:
    """Return the bytes of a request, with the length of its body."""
    lines = [start, *([f"Host: {host}"] if host else []), "Connection: close", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body


def post(*headers: str, path: str = "/v1/rank", body: bytes = QUESTION) -> bytes:
    return request(f"POST {path} HTTP/1.1", JSON, *headers, body=body)


def get(path: str, *headers: str, host: str = "localhost") -> bytes:
    return request(f"GET {path} HTTP/1.1", *headers, host=host)


def unauthorised(key: str) -> dict[str, bytes]:
    """Return requests that must be rejected, by what they try."""
    wrong = "Authorization: Bearer llmrec_" + "A" * 43
    models = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    tries = {
        "no key": post(),
        "an empty header": post("Authorization:"),
        "a scheme alone": post("Authorization: Bearer"),
        "the key alone": post(f"Authorization: {key}"),
        "basic": post(f"Authorization: Basic {base64.b64encode(f'shop:{key}'.encode()).decode()}"),
        "a scheme that begins like it": post(f"Authorization: BearerX {key}"),
        "a wrong key": post(wrong),
        "the name of a key": post("Authorization: Bearer shop"),
        "a suffix": post(f"Authorization: Bearer {key} x"),
        "a list": post(f"Authorization: Bearer x, Bearer {key}"),
        "two headers, a wrong one first": post(wrong, f"Authorization: Bearer {key}"),
        "a very long key": post(f"Authorization: Bearer {'A' * 50_000}"),
        "beyond ASCII": post(f"Authorization: Bearer {key}\xff"),
        "a control character": post(f"Authorization: Bearer {key}\x01"),
        "another header": post(f"X-API-Key: {key}", f"Proxy-Authorization: Bearer {key}"),
        "an underscore": post(f"Authorization_: Bearer {key}", f"HTTP_AUTHORIZATION: Bearer {key}"),
        "a cookie": post(f"Cookie: Authorization=Bearer%20{key}; api_key={key}"),
        "the query": post(path=f"/v1/rank?key={key}&access_token={key}&authorization=Bearer%20{key}"),
        "the body": post(body=json.dumps({"history": ["k01"], "authorization": f"Bearer {key}"}).encode()),
        "user and password in the address": get(f"http://shop:{key}@localhost/v1/models"),
        "a body that is no JSON": post(body=b"{"),
        "no body": request("POST /v1/rank HTTP/1.1", JSON, "Content-Length: 0"),
        "an old protocol": b"GET /v1/models HTTP/1.0\r\n\r\n",
        "forwarded from here": post("X-Forwarded-For: 127.0.0.1", "Forwarded: for=127.0.0.1;host=localhost"),
        "an original URL": get("/health", "X-Original-URL: /v1/models", "X-Rewrite-URL: /v1/models"),
        "a prefix": get("/models", "X-Forwarded-Prefix: /v1", "X-Script-Name: /v1"),
        "an authenticated user": post("X-Forwarded-User: boss", "X-Authenticated: true", "Remote-User: boss"),
        "another method": get("/v1/rank", "X-HTTP-Method-Override: POST", "X-Method-Override: POST"),
        "websocket": get(
            "/v1/models",
            *("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"),
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        ),
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "a folded header": models + f"X-A: b\r\n Authorization: Bearer {key}\r\n\r\n".encode(),
        "a space before the colon": models + f"Authorization : Bearer {key}\r\n\r\n".encode(),
        "a header in the request line": f"GET /v1/models HTTP/1.1 Authorization: Bearer {key}\r\n\r\n".encode(),
        "two lengths": models + b"Content-Length: 0\r\nContent-Length: 5\r\n\r\nhello",
        "a length and chunks": b"POST /v1/rank HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "the tools for agents": request(
            "POST /mcp HTTP/1.1",
            JSON,
            "Accept: application/json, text/event-stream",
            body=b'{"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}',
        ),
    }
    for method in ("HEAD", "OPTIONS", "TRACE", "PUT", "post"):
        tries[f"{method!r} with a body"] = request(f"{method} /v1/rank HTTP/1.1", JSON, body=QUESTION)
        tries[f"{method!r} without one"] = request(f"{method} /v1/models HTTP/1.1")
    for path in (
        *("//v1/models", "/v1//models", "/v1/models/", "/./v1/models", "/health/../v1/models", "/page/..%2fv1/models"),
        *("/%2e%2e/v1/models", "/v1%2Fmodels", "/%76%31/models", "/V1/MODELS", "/v1/models;x=y", "/v1/models%00"),
        *("/v1/models%3f", "/v1/models#", "\\v1\\models", "//localhost/v1/models", "http://evil.example/v1/models"),
        *("/v1/items/../models", "/v1/items/k01", "/v1/users/u01", "/v1/items?q=", "*", "v1/models", ""),
    ):
        tries[f"at {path!r}"] = get(path)
    for host in ("localhost:80@evil.example", "localhost/v1/models", "", "a" * 5000, "[::1"):
        tries[f"to {host[:30]!r}"] = get("/v1/models", host=host)
    return tries


def test_no_request_without_the_key_is_answered(served: Served) -> None:
    answered = {}
    for name, sent in unauthorised(served.key).items():
        answer = talk(served.keyed_url, sent)
        if 200 in answer.statuses and name != "an original URL":
            answered[name] = answer.text
        for secret in ('"item_id"', '"models":[{', '"signature"', '"history"', "search_items", "Brindal"):
            assert secret not in answer.text, name
        # Nothing breaks; 501 and 505 come from the server.
        assert not set(answer.statuses) & {500, 502, 503, 504}, (name, answer.text)
    assert answered == {}
    assert 200 in talk(served.keyed_url, post(f"Authorization: Bearer {served.key}")).statuses
    assert 200 in talk(served.keyed_url, post(f"authorization: bearer {served.key}")).statuses


def test_missing_key_has_status_401(served: Served) -> None:
    response = httpx.post(f"{served.keyed_url}/v1/rank", json={})
    assert response.headers["www-authenticate"] == "Bearer" and failure(response, 401)["kind"] == "missing-key"


def test_every_request_of_a_connection_needs_the_key(served: Served) -> None:
    first = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {served.key}\r\n\r\n".encode()
    second = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert talk(served.keyed_url, first + second).statuses == (200, 401)


def test_paths_without_a_key_are_those_documented(served: Served) -> None:
    for path in ("/", "/docs", "/health", "/ready", "/metrics", "/openapi.json", "/page/page.js", "/page/page.css"):
        assert httpx.get(f"{served.keyed_url}{path}").status_code == 200, path
    document = httpx.get(f"{served.keyed_url}/openapi.json").json()
    for path, methods in document["paths"].items():
        named = path.replace("{item_id}", "k01").replace("{user_id}", "u01")
        for method in methods:
            response = httpx.request(method, f"{served.keyed_url}{named}", headers={"Content-Type": "application/json"})
            assert (response.status_code == 401) is path.startswith("/v"), (method, path, response.text)


def test_changes_need_an_admin_key(served: Served) -> None:
    url, plain = served.keyed_url, served.bearer()
    item = {"items": [{"item_id": "k01", "title": "Changed"}]}
    pid = served.service.engine.pid
    for headers in (plain, {**plain, "X-Admin": "true", "X-HTTP-Method-Override": "PUT"}):
        tries = [
            httpx.put(f"{url}/v1/items", json=item, headers=headers),
            httpx.delete(f"{url}/v1/items/k01", headers=headers),
            httpx.delete(f"{url}/v1/items/%6b01", headers=headers),
            httpx.delete(f"{url}/v1/users/u05", headers=headers),
            httpx.post(f"{url}/v1/reload", headers=headers),
        ]
        assert [each.status_code for each in tries] == [403] * 5
        assert all("--admin" in failure(each)["message"] for each in tries)
    assert httpx.get(f"{url}/v1/items/k01", headers=plain).json()["title"] == "Brindal Nook Blender"
    assert httpx.get(f"{url}/v1/users/u05", headers=plain).json()["history"] and served.service.engine.pid == pid
    boss = served.bearer(admin=True)
    new = {"items": [{"item_id": "of-the-boss", "title": "New"}]}
    assert httpx.put(f"{url}/v1/items", json=new, headers=boss).status_code == 200
    assert httpx.delete(f"{url}/v1/items/of-the-boss", headers=boss).status_code == 200
    # Every key may add events.
    events = {"events": [{"user_id": "of-a-key", "item_id": "k01"}]}
    assert httpx.post(f"{url}/v1/events", json=events, headers=plain).json() == {"stored": 1}
    assert httpx.delete(f"{url}/v1/users/of-a-key", headers=boss).json()["events"] == 1


@dataclass(frozen=True)
class Keyed:
    """A fake service with a key file; each key has five requests a minute."""

    url: str
    file: Path

    def ask(self, key: str, path: str = "/v1/models") -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers={"Authorization": f"Bearer {key}"})


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    create_key(folder / "keys.json", "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmrec.serve.keys._RELOAD_SECONDS", 0.05)
        auth = Auth(Keys.read(folder / "keys.json"), RateLimit(5, 5))
        with faking(folder, patch, auth=auth) as faked:
            yield Keyed(faked.url, folder / "keys.json")


def noticed(ask: Any, status: int) -> httpx.Response:
    """Repeat a request until a change of the key file is seen."""
    ends = time.monotonic() + 300
    while (response := ask()).status_code != status:
        assert time.monotonic() < ends, response.text
        time.sleep(0.05)
    return response


def test_key_works_until_it_is_revoked(keyed: Keyed) -> None:
    key = create_key(keyed.file, "comes-and-goes")
    # Requests with an unknown key do not count.
    noticed(lambda: keyed.ask(key), 200)
    revoke_key(keyed.file, "comes-and-goes")
    gone = noticed(lambda: keyed.ask(key), 401)
    assert failure(gone)["kind"] == "missing-key"


def test_rate_limit_per_key(keyed: Keyed) -> None:
    one, other = create_key(keyed.file, "often"), create_key(keyed.file, "seldom")
    noticed(lambda: keyed.ask(other), 200)
    responses = [keyed.ask(one) for _ in range(8)]
    assert [each.status_code for each in responses[:5]] == [200] * 5 and responses[-1].status_code == 429
    assert 1 <= int(responses[-1].headers["retry-after"]) <= 60 and failure(responses[-1])["kind"] == "busy"
    # Other keys and open paths are not limited.
    assert keyed.ask(other).status_code == 200
    assert [keyed.ask(one, "/health").status_code for _ in range(9)] == [200] * 9
    # Nor does another spelling of the header help.
    assert httpx.get(f"{keyed.url}/v1/models", headers={"authorization": f"bearer {one}"}).status_code == 429


def test_key_and_limit_are_checked_before_the_body(keyed: Keyed) -> None:
    def ask(key: str, body: bytes = b"{") -> int:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        return httpx.post(f"{keyed.url}/v1/rank", content=body, headers=headers).status_code

    assert ask("llmrec_unknown") == ask("llmrec_unknown", QUESTION) == 401
    key = create_key(keyed.file, "breaks-bodies")
    noticed(lambda: keyed.ask(key), 200)
    # An unreadable body counts too.
    assert ask(key) == 400 and 429 in (ask(key) for _ in range(100))


def test_forwarding_headers_do_not_evade_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with faking(tmp_path, monkeypatch, auth=Auth(limit=RateLimit(1, 3))) as faked:
        headers = [{"X-Forwarded-For": f"10.0.0.{n}", "X-Real-IP": f"10.0.0.{n}"} for n in range(6)]
        statuses = [httpx.get(f"{faked.url}/v1/models", headers=each).status_code for each in headers]
    assert statuses == [200] * 3 + [429] * 3


def test_unreadable_keys_reject_every_request(keyed: Keyed, caplog: pytest.LogCaptureFixture) -> None:
    key = create_key(keyed.file, "before")
    noticed(lambda: keyed.ask(key), 200)
    text = keyed.file.read_bytes()
    for spoil in (lambda: keyed.file.write_text("{}"), keyed.file.unlink):
        spoil()
        refused = noticed(lambda: keyed.ask(key), 503)
        assert refused.headers["retry-after"] and str(keyed.file) not in refused.text
        assert failure(refused)["kind"] == "unreadable"
        assert str(keyed.file) in caplog.text
        keyed.file.unlink(missing_ok=True)
        keyed.file.touch(0o600)
        keyed.file.write_bytes(text)
        noticed(lambda: keyed.ask("llmrec_unknown"), 401)


@pytest.mark.parametrize("origin", ["http://localhost.evil.example", "null", "", "http://localhost:1", "localhost"])
def test_rejects_other_origins(served: Served, origin: str) -> None:
    for url, headers in ((served.url, {}), (served.keyed_url, served.bearer(admin=True))):
        for method, path in (("POST", "/v1/rank"), ("OPTIONS", "/v1/rank"), ("DELETE", "/v1/items/k01")):
            body = {"json": json.loads(QUESTION)} if method == "POST" else {}
            response = httpx.request(method, f"{url}{path}", headers={**headers, "Origin": origin}, **body)
            assert response.status_code == 403 and failure(response)["kind"] == "unsafe", (method, path)
            assert not [name for name in response.headers if name.startswith("access-control")]
    assert httpx.get(f"{served.url}/v1/items/k01").status_code == 200


def test_accepts_the_same_origin(served: Served) -> None:
    for host in (served.url.removeprefix("http://"), "localhost:80", "LOCALHOST", "[::1]:8000", "127.0.0.1"):
        headers = {"Origin": f"http://{host}", "Host": host}
        assert httpx.post(f"{served.url}/v1/rank", json=json.loads(QUESTION), headers=headers).status_code == 200, host


@pytest.mark.parametrize("host", ["localhost.evil.example", "0.0.0.0", "localhost:80@evil.example", "localhost."])
def test_rejects_other_hosts_without_keys(served: Served, host: str) -> None:
    for start in ("GET /", "GET /metrics", "DELETE /v1/items/k01"):
        assert talk(served.url, request(f"{start} HTTP/1.1", host=host)).statuses == (403,), start
        # Also with the same name as origin.
        sent = request(f"{start} HTTP/1.1", f"Origin: http://{host}", host=host)
        assert talk(served.url, sent).statuses == (403,), start
    assert httpx.get(f"{served.url}/v1/items/k01").status_code == 200


def test_https_is_another_origin_without_keys(served: Served) -> None:
    host = served.url.removeprefix("http://")
    response = httpx.post(f"{served.url}/v1/rank", json=json.loads(QUESTION), headers={"Origin": f"https://{host}"})
    assert response.status_code == 403 and failure(response)["kind"] == "unsafe"


def test_proxy_may_use_its_name_with_keys(served: Served) -> None:
    headers = {**served.bearer(), "Host": "shop.example", "Origin": "https://shop.example"}
    assert httpx.get(f"{served.keyed_url}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{served.keyed_url}/v1/models", headers={"Host": "shop.example"}).status_code == 401


@pytest.mark.parametrize("kind", ["text/plain", "", "json", "application/jsonx", "text/plain; application/json"])
def test_rejects_other_content_types(served: Served, kind: str) -> None:
    for method, path, body in (
        ("POST", "/v1/events", b'{"events": [{"user_id": "plain", "item_id": "k01"}]}'),
        ("PUT", "/v1/items", b'{"items": [{"item_id": "k01", "title": "Changed"}]}'),
    ):
        headers = {"Content-Type": kind} if kind else {}
        response = httpx.request(method, f"{served.url}{path}", content=body, headers=headers)
        assert failure(response, 415)["kind"] == "wrong-format", path
    assert httpx.get(f"{served.url}/v1/users/plain").status_code == 404


def test_accepts_json_content_types(served: Served) -> None:
    for kind in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/problem+json"):
        response = httpx.post(f"{served.url}/v1/rank", content=QUESTION, headers={"Content-Type": kind})
        assert response.status_code == 200, kind


LIMIT = 1 << 20


def chunks(size: int, piece: int) -> bytes:
    """Return the chunks of a body."""
    body = QUESTION[:-1] + b" " * (size - len(QUESTION)) + QUESTION[-1:]
    parts = [body[at : at + piece] for at in range(0, size, piece)]
    return b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts) + b"0\r\n\r\n"


def test_body_limit(served: Served) -> None:
    for size, status in ((LIMIT, 200), (LIMIT + 1, 413)):
        body = QUESTION[:-1] + b" " * (size - len(QUESTION)) + QUESTION[-1:]
        response = httpx.post(f"{served.url}/v1/rank", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == status
        start = request("POST /v1/rank HTTP/1.1", JSON, "Transfer-Encoding: chunked")
        assert talk(served.url, start, chunks(size, 70_000)).statuses[:1] == (status,)
    assert failure(response)["kind"] == "too-large"


def test_small_chunks_are_joined(served: Served) -> None:
    start = request("POST /v1/rank HTTP/1.1", JSON, "Transfer-Encoding: chunked")
    assert talk(served.url, start, chunks(20_000, 1)).statuses == (200,)


@pytest.mark.parametrize(
    ("length", "statuses"),
    [
        # The rest of a body that is longer than declared is no request.
        ("10", ((422, 400), (400,), (400, 400))),
        (str(LIMIT + 1), ((413,),)),
        ("9" * 5000, ((400,), (413,))),
        ("-1", ((400,),)),
        ("\xb2", ((400,),)),
        # The client disconnects early and gets no answer.
        ("100", ((),)),
    ],
)
def test_wrong_content_length(served: Served, length: str, statuses: tuple[tuple[int, ...], ...]) -> None:
    sent = request("POST /v1/rank HTTP/1.1", JSON, f"Content-Length: {length}").replace(b"Connection: close\r\n", b"")
    assert talk(served.url, sent, QUESTION, hang_up=length == "100").statuses in statuses
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_methods_without_a_body_read_none(served: Served) -> None:
    for start in ("GET /v1/models", "DELETE /v1/items/no-such", "HEAD /health"):
        sent = request(f"{start} HTTP/1.1", JSON, "Transfer-Encoding: chunked")
        assert talk(served.url, sent, chunks(3 * LIMIT, 100_000)).statuses[0] in (200, 404)
        sent = request(f"{start} HTTP/1.1", JSON, f"Content-Length: {3 * LIMIT}")
        assert talk(served.url, sent, b"x" * 1000).statuses == (413,)


def deep(count: int, inside: str = "") -> str:
    return "[" * count + inside + "]" * count


MALFORMED = {
    "nothing": "",
    "null": "null",
    "a list": "[]",
    "half": '{"history": ["k01"',
    "a comment": '{"history": ["k01"]} // x',
    "two": "{}{}",
    "deep": f'{{"history": {deep(500)}}}',
    "too deep to read": f'{{"history": {deep(200_000)}}}',
    "deep and open": '{"history": ' + "[" * 100_000,
    "half a pair in a key": '{"\\ud800": 1}',
    "NUL in a key": '{"\\u0000": 1}',
    "a long key": '{"%s": 1}' % ("a" * 500_000),
    "many keys": json.dumps({f"k{n}": n for n in range(5_000)}),
    "a prototype": '{"__proto__": {"admin": true}, "constructor": {}}',
    "a key twice": '{"k": 1, "k": "x"}',
    "UTF-16": "{}".encode("utf-16"),
    "no UTF-8": b'{"history": ["\xff\xfe"]}',
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
}
"""Wrong for every endpoint."""
WRONG_VALUES = {
    "NaN": '{"history": [{"item_id": "k01", "rating": NaN}]}',
    "too large a number": '{"history": [{"item_id": "k01", "rating": 1e999}]}',
    "NaN as a time": '{"events": [{"user_id": "u", "item_id": "k01", "timestamp": NaN}]}',
    "an integer that Python does not read": f'{{"k": {"9" * 5000}}}',
    "a large rating": f'{{"history": [{{"item_id": "k01", "rating": {"9" * 400}}}]}}',
    "a deep document": f'{{"query": "a", "documents": [{{"text": "x", "y": {deep(900)}}}]}}',
    "half a pair in an id": '{"history": ["\\ud800"]}',
    "half a pair in a field": '{"history": [{"item_id": "k01", "fields": {"\\udfff": "a"}}]}',
    "half a pair in a rule": '{"rules": {"only": {"\\ud800": ["a"]}}}',
    "half a pair in a document": '{"query": "a", "documents": [{"text": "\\ud800"}]}',
    "half a pair in a query": '{"query": "\\ud800", "documents": ["a"]}',
    "half a pair in a title": '{"items": [{"item_id": "half", "title": "\\ud800"}]}',
    "NUL in a title": '{"items": [{"item_id": "nul", "title": "a\\u0000"}]}',
    "NUL in a user": '{"events": [{"user_id": "a\\u0000", "item_id": "k01"}]}',
    "many entries": json.dumps({"history": ["k01"] * 1001}),
    "many candidates": json.dumps({"candidates": [f"c{n}" for n in range(2001)]}),
    "empty lists": '{"requests": [], "items": [], "events": [], "documents": []}',
}
POSTED = (
    *("/v1/rank", "/v1/rank/batch", "/v1/rate", "/v1/explain", "/v1/similar", "/v1/rerank", "/v2/rerank"),
    *("/v1/events", "/v1/items", "/v1/ask", "/v1/chat"),
)


def test_rejects_duplicate_keys(served: Served) -> None:
    for body in (
        b'{"k": 1, "k": 2}',
        b'{"history": [{"item_id": "k01", "item_id": "k02"}]}',
        b'{"rules": {"only": {}, "only": {}}}',
    ):
        response = send(served, "/v1/rank", body)
        assert response.status_code == 422 and "twice" in failure(response)["message"]
    assert send(served, "/v1/rank", b'{"history": [{"item_id": "k01"}, {"item_id": "k02"}]}').status_code == 200


def test_rejects_unknown_parameters(served: Served) -> None:
    for method, path, at in (
        ("GET", "/v1/items?search=Nook", "search"),
        ("GET", "/v1/items?q=Nook&limits=3", "limits"),
        ("GET", "/v1/items/k01?q=x", "q"),
        ("POST", "/v1/rank?k=3", "k"),
        ("DELETE", "/v1/users/u01?force=1", "force"),
    ):
        body = {"json": json.loads(QUESTION)} if method == "POST" else {}
        response = httpx.request(method, f"{served.url}{path}", **body)
        assert response.status_code == 422 and failure(response)["at"] == at, path
    assert "did you mean 'limit'?" in httpx.get(f"{served.url}/v1/items?limits=3").text
    assert httpx.get(f"{served.url}/v1/items?q=Nook&limit=3").status_code == 200


def send(served: Served, path: str, body: bytes) -> httpx.Response:
    method = "PUT" if path == "/v1/items" else "POST"
    return httpx.request(
        method, f"{served.url}{path}", content=body, headers={"Content-Type": "application/json"}, timeout=120
    )


@pytest.mark.parametrize("name", [*MALFORMED, *WRONG_VALUES])
def test_rejects_absurd_bodies(served: Served, name: str) -> None:
    raw = (MALFORMED | WRONG_VALUES)[name]
    body = raw if isinstance(raw, bytes) else raw.encode()
    for path in POSTED if name in WRONG_VALUES else ("/v1/rank", "/v2/rerank", "/v1/items", "/v1/chat"):
        response = send(served, path, body)
        assert response.status_code in (200, 400, 404, 422), (path, response.text[:300])
        if response.status_code != 200:
            # The size of the response does not depend on the request.
            assert len(response.content) < 2000
            assert failure(response)["kind"] in ("syntax", "bad-value", "encoding", "unknown-name")
    assert httpx.get(f"{served.url}/v1/items?q=nul").json()["total"] == 0


JSONS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["k01", "u01", "tuned"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["history", "candidates", "item", "item_id", "title", "rules", "only", "k", "requests", "query"]
            )
            | st.text(max_size=4),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(path=st.sampled_from(POSTED), body=JSONS)
def test_random_json_is_no_defect(served: Served, path: str, body: Any) -> None:
    response = send(served, path, json.dumps(body).encode())
    assert response.status_code in (200, 400, 404, 422), response.text
    if response.status_code != 200:
        failure(response)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=12),
    st.sampled_from(["/v1/items/", "/v1/users/", "/v1/items?q=", "/v1/items?limit=", "/page/", "/"]),
)
def test_random_paths_are_no_defect(served: Served, tail: bytes, head: str) -> None:
    spelled = "".join(f"%{byte:02x}" for byte in tail)
    response = talk(served.url, get(f"{head}{spelled}"))
    assert len(response.statuses) == 1 and response.statuses[0] in (200, 404, 422), (spelled, response.text)


def test_log_and_metrics_contain_no_client_data(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    # Commands of other tests set these levels.
    for name in ("llmrec", "llmrec.serve"):
        caplog.set_level(logging.DEBUG, logger=name)
    for name in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    mark = "Zx7Qmark"
    headers = {**served.bearer(admin=True), "User-Agent": mark, "Referer": f"http://localhost/{mark}", "X-Mark": mark}
    history = [{"title": f"{mark} title", "fields": {mark: mark}}]
    item = {"item_id": f"{mark}-item", "title": f"{mark} title", "fields": {"mark": mark}}

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "llmrec.serve"]

    sent: list[httpx.Response] = []

    def ask(method: str, path: str, **options: Any) -> None:
        sent.append(httpx.request(method, f"{served.keyed_url}{path}", **options))
        # The line is written after the response.
        late = time.monotonic() + 300
        while len(lines()) < len(sent) and time.monotonic() < late:
            time.sleep(0.005)

    ask("POST", "/v1/rank", json={"history": history, "user_id": mark, "profile": mark}, headers=headers)
    ask("POST", "/v1/rank", json={mark: mark}, headers=headers)
    ask("POST", f"/v1/rank?{mark}={mark}", content=mark, headers={**headers, "Content-Type": "application/json"})
    ask("PUT", "/v1/items", json={"items": [item]}, headers=headers)
    ask("GET", f"/v1/items?q={mark}", headers=headers)
    ask("DELETE", f"/v1/items/{mark}-item", headers=headers)
    ask("POST", "/v1/events", json={"events": [{"user_id": mark, "item_id": "k01"}]}, headers=headers)
    ask("GET", f"/v1/users/{mark}", headers=headers)
    ask("DELETE", f"/v1/users/{mark}", headers=headers)
    ask("GET", f"/{mark}", headers=headers)
    ask("GET", "/v1/models", headers={"Authorization": f"Bearer {mark}"})
    ask("GET", "/v1/models", headers={**headers, "Origin": f"http://{mark}"})
    ask("POST", "/v1/explain", json={"history": history, "item": {"title": mark}}, headers=headers)
    written = lines()
    for line, answer in zip(written, sent, strict=True):
        assert re.fullmatch(r"[A-Z]+ \S+ \d{3} [\d.]+ ms key=(boss|-)", line), line
        assert line.split()[2] == str(answer.status_code)
    output = caplog.text + httpx.get(f"{served.keyed_url}/metrics").text
    assert mark not in output
    for secret in (served.key, served.admin_key, hashlib.sha256(served.admin_key.encode()).hexdigest()):
        assert secret not in output
    assert {"POST /v1/rank", "GET /v1/users/{user_id:path}"} <= {" ".join(line.split()[:2]) for line in written}


def test_page_loads_nothing_from_other_hosts(served: Served) -> None:
    for path, kind in (("/", "text/html"), ("/page/page.js", "text/javascript"), ("/page/page.css", "text/css")):
        response = httpx.get(f"{served.keyed_url}{path}")
        headers = response.headers
        assert headers["content-type"] == f"{kind}; charset=utf-8"
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        for name in ("default-src", "frame-ancestors", "base-uri", "form-action"):
            assert policy[name] == "'none'", name
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert not {"'unsafe-inline'", "'unsafe-eval'", "*"} & set(" ".join(policy.values()).split())
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert not re.search(r"""(src|href|url\()\s*=?\s*["'(]?(https?:)?//""", response.text)
        assert "set-cookie" not in headers


def test_api_documentation_needs_no_network(served: Served) -> None:
    page = httpx.get(f"{served.keyed_url}/docs")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self';" in page.headers["content-security-policy"] and "https://" not in page.text
    linked = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
    assert len(linked) == 3
    for path in linked:
        response = httpx.get(f"{served.keyed_url}/{path}")
        assert response.status_code == 200 and len(response.content) > 50, path
