"""Middleware: body size limit, same-origin check, API keys and rate limits, and metrics for Prometheus."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmrec.data.read.limits import format_value
from llmrec.errors import DataError, LlmrecError, did_you_mean
from llmrec.serve.failures import RETRY_SECONDS, error_response
from llmrec.serve.keys import Key, Keys, RateLimit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from llmrec.serve.service import Service

log = logging.getLogger("llmrec.serve")

PUBLIC_PATHS = frozenset({"/", "/chat", "/docs", "/health", "/ready", "/metrics", "/openapi.json"})
"""Paths that need no key and have no rate limit, like those that begin with `STATIC_PREFIX`."""
STATIC_PREFIX = "/page/"
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
_LOCAL_HOST_PATTERN = re.compile(r"(localhost|127\.0\.0\.1|::1|\[::1\])(:[0-9]{1,5})?")
_CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f]")
# Maximum number of digits of Content-Length, because int() rejects huge numbers.
_MAX_LENGTH_DIGITS = 18
_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_MAX_SHOWN_CHARACTERS = 60


class Auth:
    """Authentication by API keys, and rate limits.

    Args:
        keys: The API keys; None: no authentication.
        limit: The rate limit per key, or per address without keys; None: no limit.
    """

    def __init__(self, keys: Keys | None = None, limit: RateLimit | None = None) -> None:
        self._keys, self._limit = keys, limit

    @property
    def keyed(self) -> bool:
        """Whether requests need an API key."""
        return self._keys is not None

    def refusal(self, scope: Scope) -> ASGIApp | None:
        """Return the response for a request without a valid key or over the rate limit; None if it is accepted."""
        key = None
        if self._keys is not None:
            scheme, _, word = (_header_value(scope, b"authorization") or "").partition(" ")
            try:
                key = self._keys.find(word) if scheme.lower() == "bearer" else None
            except LlmrecError as error:
                # If the key file is unreadable, every request is rejected; the log has the reason.
                log.error("%s", error)
                return error_response(503, "unreadable", "the keys of this service cannot be read", after=RETRY_SECONDS)
            if key is None:
                answer = error_response(401, "missing-key", "give an API key: 'Authorization: Bearer llmrec_...'")
                answer.headers["WWW-Authenticate"] = "Bearer"
                return answer
        if self._limit is not None:
            wait = self._limit.take(key.name if key else (scope.get("client") or ("",))[0])
            if wait > 0:
                return error_response(429, "busy", f"too many requests; try again in {wait:.0f} s", after=wait)
        scope.setdefault("state", {})["key"] = key
        return None

    async def admin(self, request: Request) -> None:
        """Reject keys that may not change the catalogue or delete users; without keys, accept all callers."""
        key: Key | None = getattr(request.state, "key", None)
        if self.keyed and not (key is not None and key.admin):
            raise HTTPException(403, "this requires a key created with --admin")


class AuthMiddleware:
    """Middleware that checks API key and rate limit before the body is read."""

    def __init__(self, app: ASGIApp, auth: Auth) -> None:
        self._app, self._auth = app, auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond with 401, 429 or 503, or pass the request on."""
        closed = scope["type"] == "http" and not (
            scope["path"] in PUBLIC_PATHS or scope["path"].startswith(STATIC_PREFIX)
        )
        answer = (self._auth.refusal(scope) if closed else None) or self._app
        await answer(scope, receive, send)


class StrictRoute(APIRoute):
    """A route that rejects unknown parameters, bodies not declared as JSON, and objects with duplicate keys."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See `APIRoute.get_route_handler`."""
        handle, known = super().get_route_handler(), [query_param.alias for query_param in self.dependant.query_params]

        async def strict(request: Request) -> Response:
            for name in request.query_params if request.scope["query_string"] else ():
                if name not in known:
                    takes = f"it takes {', '.join(known)}" if known else "it takes none"
                    raise DataError(
                        f"{format_value(name)} is not a parameter of this endpoint{did_you_mean(name, known)}; {takes}",
                        kind="unknown-key",
                        column=name[:_MAX_SHOWN_CHARACTERS],
                    )
            if self.body_field:
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                # Other sites can send other content types without a preflight request.
                if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
                    raise HTTPException(415, "send the body with 'Content-Type: application/json'")
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        return json.loads(await self.body(), object_pairs_hook=_object_without_duplicates)


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, value in pairs:
        if name in results:
            raise HTTPException(422, f"an object has the key {format_value(name)} twice; remove one of them")
        results[name] = value
    return results


class HeadAndUrlMiddleware:
    """Middleware that answers HEAD like GET, and rejects URLs with control characters."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond with 422, or pass the request on."""
        if scope["type"] == "http":
            if _CONTROL_CHARACTERS.search(scope["path"]):
                refused = error_response(422, "bad-value", "the URL contains a control character; remove it")
                await refused(scope, receive, send)
                return
            if scope["method"] == "HEAD":
                # The server keeps the original method, so it sends no body.
                inner = {**scope, "method": "GET"}
                await self._app(inner, receive, send)
                scope.update({name: inner[name] for name in ("route", "state") if name in inner})
                return
        await self._app(scope, receive, send)


class BodyLimitMiddleware:
    """Middleware that rejects bodies over the size limit, before they are read."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond with 413, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = _header_value(scope, b"content-length")
        if length is not None and (
            not length.isdecimal() or len(length) > _MAX_LENGTH_DIGITS or int(length) > self._most
        ):
            await self._too_large_response()(scope, receive, send)
            return
        body, more = bytearray(), True
        # A body of unknown length is read here, so that later readers get at most the limit.
        while more and scope["method"] not in ("GET", "HEAD", "DELETE"):
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._most:
                await self._too_large_response()(scope, receive, send)
                return
        messages = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        await self._app(scope, replay, send)

    def _too_large_response(self) -> ASGIApp:
        return error_response(413, "too-large", f"the body is larger than {self._most} bytes")


class SameOriginMiddleware:
    """Middleware that rejects cross-origin requests of browsers and spoofed host names (DNS rebinding).

    Without it any web page could send requests to a service on the user's machine.

    Args:
        app: The application.
        keyed: Whether API keys are required. Then host names are not checked: a page with a spoofed name has no key,
            and a proxy may change the name.
    """

    def __init__(self, app: ASGIApp, *, keyed: bool = False) -> None:
        self._app, self._keyed = app, keyed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond with 403, or pass the request on."""
        wrong = self._find_violation(scope) if scope["type"] == "http" else None
        await (error_response(403, "unsafe", wrong) if wrong else self._app)(scope, receive, send)

    def _find_violation(self, scope: Scope) -> str | None:
        host = (_header_value(scope, b"host") or "").lower()
        origin = _header_value(scope, b"origin")
        if origin is not None:
            scheme, _, name = origin.lower().partition("://")
            # With keys, a proxy may use https towards the browser and http towards this service.
            if name != host or scheme not in (("http", "https") if self._keyed else (scope["scheme"],)):
                return "the request comes from another site"
        local = str((scope.get("server") or ("", 0))[0]) in _LOCAL_HOSTS and not self._keyed
        if local and host and not _LOCAL_HOST_PATTERN.fullmatch(host):
            return "this service accepts requests to localhost only; start it with --host"
        return None


class Metrics:
    """Prometheus metrics of a service.

    Args:
        service: The service with the measured queue and engine.
    """

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "llmrec_requests", "Requests by endpoint and status", ("endpoint", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "llmrec_request_seconds",
            "Request latency in seconds",
            ("endpoint",),
            buckets=_LATENCY_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(_ServiceCollector(service))

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request; ``endpoint`` is the path of a route, never a path that the client chose."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus format."""
        return generate_latest(self._registry)


class _ServiceCollector:
    """Collects the state of the queue and the engine."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        load, engine = self._service.batcher.load, self._service.engine
        yield GaugeMetricFamily("llmrec_queue", "Queued requests", load.waiting)
        yield GaugeMetricFamily("llmrec_engine_up", "Whether the engine answers", float(engine.ready))
        yield CounterMetricFamily("llmrec_engine_starts", "Engine starts", engine.starts)
        yield CounterMetricFamily("llmrec_refused", "Requests rejected because the queue was full", load.refused)
        yield CounterMetricFamily("llmrec_late", "Requests that timed out", load.late)
        yield CounterMetricFamily("llmrec_batches", "Batches processed by the engine", sum(load.batches.values()))
        requests = sum(size * times for size, times in load.batches.items())
        yield CounterMetricFamily("llmrec_asked", "Requests processed by the engine", requests)
        yield CounterMetricFamily("llmrec_engine_seconds", "Seconds of engine time", load.seconds)


class MetricsMiddleware:
    """Middleware that counts requests and logs one line for each, without text from the client."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and record the result."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # status if no response is sent: the client disconnected
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


def _header_value(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
