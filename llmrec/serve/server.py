"""The HTTP server with limits for the size of headers, the time of a request to arrive, and connections."""

from __future__ import annotations

import asyncio
import math
import socket
from typing import TYPE_CHECKING, Any

import h11
import psutil
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from starlette.types import ASGIApp

HEADER_LIMIT = 64 * 1024
"""Maximum size in bytes of the request line and all headers."""
_BACKLOG = 128
_MAX_CONNECTIONS = 2048


def make_server(app: ASGIApp, *, timeout: float = 60.0, connections: int | None = None) -> uvicorn.Server:
    """Create the server for an application.

    Args:
        app: The application.
        timeout: Seconds for a request to arrive, for a client to receive a response, and for open requests to end when
            the server stops.
        connections: The maximum number of open connections; by default half of the process's limit of open files.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            port=0,
            log_level="warning",
            access_log=False,
            # httptools, the alternative parser, does not limit headers.
            http=_limited_protocol(timeout, connections or _half_of_file_limit()),
            h11_max_incomplete_event_size=HEADER_LIMIT,
            ws="none",
            # Otherwise clients could choose the address that --per-minute counts.
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=math.ceil(timeout),
        )
    )


def _half_of_file_limit() -> int:
    process = psutil.Process()
    # psutil can read this limit only on Linux and FreeBSD.
    most = process.rlimit(psutil.RLIMIT_NOFILE)[0] if hasattr(process, "rlimit") else 2 * _MAX_CONNECTIONS
    return min(_MAX_CONNECTIONS, most // 2) if most > 0 else _MAX_CONNECTIONS


def _limited_protocol(timeout: float, most: int) -> type[H11Protocol]:
    """Return a connection protocol that closes connections whose request does not arrive in time.

    If more than ``most`` are open, the longest-waiting one is closed, so that idle connections do not block others.
    """

    class Limited(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                # The system closes the connection of a client that no longer reads its response.
                line = transport.get_extra_info("socket")
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * timeout))
            self._watch()
            if len(self.connections) > most:
                waiting = [
                    connection
                    for connection in self.connections
                    if isinstance(connection, Limited) and connection._late is not None
                ]
                min(waiting, key=lambda connection: connection._late.when())._end()  # type: ignore[union-attr]

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop()

        def _watch(self) -> None:
            """Run a timer while a request is incomplete."""
            if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
                self._stop()
            elif self._late is None and not self.transport.is_closing():
                self._late = self.loop.call_later(timeout, self._end)

        def _stop(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _end(self) -> None:
            self._stop()
            self.transport.abort()

    return Limited
