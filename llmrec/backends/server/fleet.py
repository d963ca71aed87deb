"""Servers of one model: each attempt goes to the next of them that answers, and one that fails rests for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

FIRST_REST = 1.0
"""Seconds that a server rests at first; doubled each time that it fails again."""
# Faults in a row after which a server rests. A connection that is refused is one too many: nothing listens there.
_PATIENCE = 3


@dataclass(slots=True)
class Server:
    """One server.

    Attributes:
        url: As far as ``/v1``, without a slash at its end.
        until: When it is asked again, by the clock; 0: it does not rest.
        rest: Seconds of its next rest.
        faults: Attempts in a row that failed.
        tried: A request is its trial after a rest.
    """

    url: str
    until: float = 0.0
    rest: float = FIRST_REST
    faults: int = 0
    tried: bool = False


class Fleet:
    """Says which server is asked next, in turn.

    A server that rests comes back with one request as its trial, and with all of its share once it answers. A single
    server never rests: there is no other to ask.

    Args:
        urls: Addresses of the servers.
        longest: Seconds of the longest rest, but for one that a server asks for.
        clock: Seconds that only rise.
    """

    def __init__(self, urls: Sequence[str], longest: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._servers = [Server(url) for url in urls]
        self._longest, self._clock = longest, clock
        self._next = 0

    def take(self, last: Server | None = None) -> Server:
        """Return the server of an attempt.

        Args:
            last: The server that failed the attempt before, which is not taken while another one answers.
        """
        now = self._clock()
        order = [*self._servers[self._next :], *self._servers[: self._next]]
        awake = [server for server in order if server.until <= now]
        chosen = next((server for server in awake if server is not last), None)
        if chosen is None:
            chosen = awake[0] if awake else min(order, key=lambda server: server.until)
        self._next = (self._servers.index(chosen) + 1) % len(self._servers)
        if chosen.until:
            # Others wait for how its trial goes.
            chosen.until, chosen.tried = now + chosen.rest, True
        return chosen

    def another(self, than: Server) -> bool:
        """Whether a further server can be asked now."""
        return any(server is not than and server.until <= self._clock() for server in self._servers)

    def answered(self, server: Server) -> None:
        """Note an answer, sound or a refusal: the server is there. What it took before its rest changes nothing."""
        server.faults = 0
        if server.until and not server.tried:
            return
        if server.tried:
            log.warning("%s answers again and is asked as before", server.url)
        server.until, server.rest, server.tried = 0.0, FIRST_REST, False

    def failed(self, server: Server, fault: str, wait: float | None = None) -> None:
        """Note a fault, and let the server rest where it is one too many.

        Args:
            server: The server.
            fault: What it was, for the log.
            wait: Seconds that the server asks for.
        """
        server.faults += 1
        if len(self._servers) == 1 or (server.until and not server.tried):
            return
        gone = fault.startswith("no connection") or server.faults >= _PATIENCE or server.tried
        if not (gone or wait):
            return
        rest = max(wait or 0.0, server.rest if gone else 0.0)
        if not server.tried:
            log.warning("%s is left out for %.0f s (%s); the other servers are asked", server.url, rest, fault)
        if gone:
            server.rest = min(self._longest, 2 * server.rest)
        server.until, server.tried = self._clock() + rest, False
