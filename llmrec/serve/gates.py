"""What every request passes before it is answered: the limit of its body, its origin, its API key, and a clock."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmrec.data.read.limits import shown
from llmrec.errors import DataError, LlmrecError, did_you_mean
from llmrec.serve.failures import failed
from llmrec.serve.keys import Key, Keys, RateLimit

if TYPE_CHECKING:
    from llmrec.serve.metrics import Metrics

log = logging.getLogger("llmrec.serve")

OPEN = frozenset({"/", "/chat", "/docs", "/health", "/ready", "/metrics", "/openapi.json"})
"""Paths that need no key and are not limited; so are those that begin with `PAGE`."""
PAGE = "/page/"
_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
_THIS = re.compile(r"(localhost|127\.0\.0\.1|::1|\[::1\])(:[0-9]{1,5})?")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
# Of a number of bytes; Python itself refuses to read thousands.
_DIGITS = 18
# Seconds after which to ask again if the keys cannot be read.
_RETRY = 5.0
_SHOWN = 60


class Auth:
    """Who may ask.

    Args:
        keys: The API keys; None: whoever reaches the service may ask.
        limit: Requests of one key, or of one address where there are no keys; None: as many as there are.
    """

    def __init__(self, keys: Keys | None = None, limit: RateLimit | None = None) -> None:
        self._keys, self._limit = keys, limit

    @property
    def keyed(self) -> bool:
        """Whether API keys are asked for."""
        return self._keys is not None

    def refusal(self, scope: Scope) -> ASGIApp | None:
        """Return the answer to a request without a key, or to one that comes too often; None if it may go on."""
        found = None
        if self._keys is not None:
            scheme, _, word = (_header(scope, b"authorization") or "").partition(" ")
            try:
                found = self._keys.find(word) if scheme.lower() == "bearer" else None
            except LlmrecError as error:
                # A file of keys that cannot be read lets nobody in, and its owner reads why in the log.
                log.error("%s", error)
                return failed(503, "unreadable", "the keys of this service cannot be read", after=_RETRY)
            if found is None:
                answer = failed(401, "missing-key", "give an API key: 'Authorization: Bearer llmrec_...'")
                answer.headers["WWW-Authenticate"] = "Bearer"
                return answer
        if self._limit is not None:
            wait = self._limit.take(found.name if found else (scope.get("client") or ("",))[0])
            if wait > 0:
                return failed(429, "busy", f"too many requests; ask again in {wait:.0f} s", after=wait)
        scope.setdefault("state", {})["key"] = found
        return None

    async def admin(self, request: Request) -> None:
        """Let in those alone that may change the catalogue and erase users: every caller where there are no keys.

        Raises:
            HTTPException: If the key may not.
        """
        found: Key | None = getattr(request.state, "key", None)
        if self.keyed and not (found is not None and found.admin):
            raise HTTPException(403, "this needs a key made with --admin")


class Authenticated:
    """Asks for the key, and counts requests, before anything of a body is read."""

    def __init__(self, app: ASGIApp, auth: Auth) -> None:
        self._app, self._auth = app, auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, 429 or 503, or hand on."""
        closed = scope["type"] == "http" and not (scope["path"] in OPEN or scope["path"].startswith(PAGE))
        answer = (self._auth.refusal(scope) if closed else None) or self._app
        await answer(scope, receive, send)


class StrictRoute(APIRoute):
    """A route that refuses unknown parameters, bodies that are not said to be JSON, and objects that repeat a key."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See `APIRoute.get_route_handler`."""
        handle, known = super().get_route_handler(), [each.alias for each in self.dependant.query_params]

        async def strict(request: Request) -> Response:
            for name in request.query_params:
                if name not in known:
                    takes = f"it takes {', '.join(known)}" if known else "it takes none"
                    raise DataError(
                        f"{shown(name)} is no parameter of this address{did_you_mean(name, known)}; {takes}",
                        kind="unknown-key",
                        column=name[:_SHOWN],
                    )
            if self.body_field:
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                # A page of another site can send any other body without asking first.
                if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
                    raise HTTPException(415, "send the body with 'Content-Type: application/json'")
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        return json.loads(await self.body(), object_pairs_hook=_unrepeated)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise HTTPException(422, f"an object has the key {shown(name)} twice; leave one out")
        found[name] = value
    return found


class Plain:
    """Answers HEAD as GET, and refuses addresses with control characters: a line break at the end is easily missed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 422, or hand on."""
        if scope["type"] == "http":
            if _CONTROL.search(scope["path"]):
                refused = failed(422, "bad-value", "the address holds a control character; leave it out")
                await refused(scope, receive, send)
                return
            if scope["method"] == "HEAD":
                # The server knows by its own record that there is to be no body.
                inner = {**scope, "method": "GET"}
                await self._app(inner, receive, send)
                scope.update({name: inner[name] for name in ("route", "state") if name in inner})
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large, before they are read."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413, or hand on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = _header(scope, b"content-length")
        refused = failed(413, "too-large", f"the body is larger than {self._most} bytes")
        if said is not None and (not said.isdecimal() or len(said) > _DIGITS or int(said) > self._most):
            await refused(scope, receive, send)
            return
        body, more = bytearray(), True
        # A body of unknown length is read here, so that what reads it later cannot be surprised.
        while more and scope["method"] not in ("GET", "HEAD", "DELETE"):
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._most:
                await refused(scope, receive, send)
                return
        given = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> Message:
            return next(given, None) or await receive()

        await self._app(scope, replay, send)


class SameOrigin:
    """Refuses what a browser sends from a page of another site, and names of hosts that only pretend to be this one.

    Without it any page that a user looks at could ask a service on the user's own machine.

    Args:
        app: What is guarded.
        keyed: API keys are asked for. A page under a made-up name has none, and a proxy may hand on a name of its own.
    """

    def __init__(self, app: ASGIApp, *, keyed: bool = False) -> None:
        self._app, self._keyed = app, keyed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or hand on."""
        wrong = self._wrong(scope) if scope["type"] == "http" else None
        await (failed(403, "unsafe", wrong) if wrong else self._app)(scope, receive, send)

    def _wrong(self, scope: Scope) -> str | None:
        host = (_header(scope, b"host") or "").lower()
        origin = _header(scope, b"origin")
        if origin is not None:
            scheme, _, name = origin.lower().partition("://")
            # With keys a proxy may stand between, which speaks https with the browser and http with this service.
            if name != host or scheme not in (("http", "https") if self._keyed else (scope["scheme"],)):
                return "the request comes from a page of another site"
        local = str((scope.get("server") or ("", 0))[0]) in _LOCAL and not self._keyed
        if local and host and not _THIS.fullmatch(host):
            return "this service answers to localhost alone; start it with --host"
        return None


class Measured:
    """Counts requests and writes one line on each: no query, no body, no text of anybody's."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on, and note what came of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # As long as nothing is sent: whoever asked is gone.
        begun, status = time.monotonic(), 499

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.monotonic() - begun
            endpoint = getattr(scope.get("route"), "path", "other")
            key = getattr(scope.get("state", {}).get("key"), "name", "-")
            self._metrics.request(endpoint, status, seconds)
            log.info("%s %s %d %.1f ms key=%s", scope["method"], endpoint, status, 1000 * seconds, key)


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
