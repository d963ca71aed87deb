"""What every request passes before it is answered: the limit of its body, its origin, its API key, and a clock."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmrec.errors import LlmrecError
from llmrec.serve.keys import Key, Keys, RateLimit
from llmrec.serve.schema import Failed, Failure

if TYPE_CHECKING:
    from llmrec.serve.metrics import Metrics

log = logging.getLogger("llmrec.serve")

_bearer = HTTPBearer(auto_error=False, description="An API key, made by `llmrec serve-key`.")
_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
_THIS = re.compile(r"(localhost|127\.0\.0\.1|::1|\[::1\])(:[0-9]{1,5})?")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
# Of a number of bytes; Python itself refuses to read thousands.
_DIGITS = 18


class Door:
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

    async def key(
        self, request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> Key | None:
        """Return the key of a request.

        Raises:
            HTTPException: If there is none, or it asks too often.
        """
        found = None
        if self._keys is not None:
            try:
                found = None if given is None else self._keys.find(given.credentials)
            except LlmrecError as error:
                # A file of keys that cannot be read lets nobody in, and its owner reads why in the log.
                log.error("%s", error)
                raise HTTPException(503, "the keys of this service cannot be read", {"Retry-After": "5"}) from None
            if found is None:
                raise HTTPException(
                    401, "give an API key: 'Authorization: Bearer llmrec_...'", {"WWW-Authenticate": "Bearer"}
                )
        if self._limit is not None:
            name = found.name if found else (request.client.host if request.client else "")
            wait = self._limit.take(name)
            if wait > 0:
                raise HTTPException(
                    429, f"too many requests; ask again in {wait:.0f} s", {"Retry-After": str(max(1, round(wait)))}
                )
        request.state.key = found
        return found

    async def admin(self, request: Request) -> None:
        """Let in those alone that may change the catalogue and erase users: every caller where there are no keys.

        Raises:
            HTTPException: If the key may not.
        """
        found = getattr(request.state, "key", None)
        if self._keys is not None and not (found is not None and found.admin):
            raise HTTPException(403, "this needs a key made with --admin")


async def json_alone(request: Request) -> None:
    """Refuse a body that is not said to be JSON: a page of another site can send any other without asking first.

    Raises:
        HTTPException: If it is not.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HTTPException(415, "send the body with 'Content-Type: application/json'")


class Plain:
    """Answers HEAD as GET, and refuses addresses with control characters: a line break at the end is easily missed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 422, or hand on."""
        if scope["type"] == "http":
            if _CONTROL.search(scope["path"]):
                await _refuse(send, 422, "bad-value", "the address holds a control character; leave it out")
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
        if said is not None and (not said.isdecimal() or len(said) > _DIGITS or int(said) > self._most):
            await _refuse(send, 413, "too-large", f"the body is larger than {self._most} bytes")
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
                await _refuse(send, 413, "too-large", f"the body is larger than {self._most} bytes")
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
        if scope["type"] == "http":
            host = (_header(scope, b"host") or "").lower()
            origin = _header(scope, b"origin")
            if origin is not None and origin.lower().partition("://")[2] != host:
                await _refuse(send, 403, "unsafe", "the request comes from a page of another site")
                return
            local = str((scope.get("server") or ("", 0))[0]) in _LOCAL and not self._keyed
            if local and host and not _THIS.fullmatch(host):
                await _refuse(send, 403, "unsafe", "this service answers to localhost alone; start it with --host")
                return
        await self._app(scope, receive, send)


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


async def _refuse(send: Callable[[Message], Any], status: int, kind: str, message: str) -> None:
    body = Failed(error=Failure(kind=kind, message=message)).model_dump()
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
