"""One request to a server, tried again where that can help: the only layer that retries.

Tried again are 408, 425, 429 and 5xx, attempts that take too long, connections that break, bodies that end early, and
bodies that are no JSON or not of the right form. Waits double and are drawn between nothing and their bound ("full
jitter"), so that many clients do not come back at once; a server that says when to come back is heeded. All else is
refused at once. A server's own words are shown shortened, with the key taken out.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from llmrec.backends.remote_spent import Spending
from llmrec.errors import BackendError, require
from llmrec.guard import clean
from llmrec.recipe import ServerSection
from llmrec.types import Cost

T = TypeVar("T")

_TRANSIENT = frozenset({408, 425, 429})
_NO_ROUTE = frozenset({404, 405, 501})
_SHOWN = 300
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_MENDS: Mapping[int, str] = {
    401: "set eval.server.key_env to the environment variable that holds a valid key",
    402: "the account has no credit left",
    403: "set eval.server.key_env to the environment variable that holds a key for this model",
    404: "see eval.server.url, which ends in /v1 on most servers, and eval.server.model",
    413: "show less history (tasks.<family>.history)",
}


class Refused(BackendError):
    """An answer that another attempt would not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def no_route(self) -> bool:
        """Whether the server does not know the address at all."""
        return self.status in _NO_ROUTE


class _Again(Exception):
    """A fault that another attempt may mend; ``wait`` is what the server asks for, in seconds."""

    def __init__(self, kind: str, wait: float | None = None) -> None:
        super().__init__(kind)
        self.kind, self.wait = kind, wait


class Wire:
    """A client of one server.

    Args:
        section: Address, key, time-outs, attempts.
        spending: Where usage is counted, and which stops requests.

    Raises:
        BackendError: If the environment variable of the key is not set.
        MissingExtra: If httpx is not installed.
    """

    def __init__(self, section: ServerSection, spending: Spending) -> None:
        httpx = require("httpx", "openai")
        self._httpx, self._section, self._spending = httpx, section, spending
        self._url = section.url.rstrip("/")
        self._key = _key(section)
        self.attempts: Counter[str] = Counter()
        """Attempts by how they ended: ``ok`` or the kind of fault."""
        for name in ("httpx", "httpcore"):
            # They write a line a request otherwise.
            logging.getLogger(name).setLevel(logging.WARNING)
        local = urlsplit(self._url).hostname in _LOCAL
        self._client: Any = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=section.timeout,
            limits=httpx.Limits(max_connections=section.concurrency, max_keepalive_connections=section.concurrency),
            # A proxy is for other machines.
            trust_env=not local,
        )

    async def ask(
        self, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], T], *, what: Callable[[], str]
    ) -> T:
        """Send a request until its answer can be read; without a body it is a GET.

        Args:
            path: Behind the address, such as ``/completions``.
            body: The JSON to send.
            read: Reads the answer; a ValueError, LookupError, TypeError or AttributeError calls it malformed.
            what: Names the request in an error.

        Raises:
            Refused: At an answer that another attempt would not change.
            BackendError: If no attempt succeeds, or a budget is used up.
        """
        faults: list[str] = []
        asked: float | None = None
        for attempt in range(self._section.attempts):
            if attempt:
                await asyncio.sleep(self._pause(attempt, asked))
            self._spending.check()
            try:
                found = await self._once(path, body, read, what)
            except _Again as fault:
                asked = fault.wait
                faults.append(fault.kind)
                self.attempts[fault.kind.partition(":")[0]] += 1
                if fault.wait is not None and fault.wait > self._section.longest_wait:
                    raise BackendError(
                        f"{self._url}{path} asks to wait {fault.wait:.0f} s before {what()}, longer than "
                        f"eval.server.longest_wait={self._section.longest_wait:g}; what was answered is kept, run the "
                        "same command again later, or raise that key"
                    ) from None
                continue
            self.attempts["ok"] += 1
            return found
        seen = ", ".join(f"{kind} ({count})" for kind, count in Counter(faults).most_common())
        raise BackendError(
            f"{self._url}{path} did not answer {what()} in {len(faults)} attempts: {seen}; what was answered is kept, "
            "run the same command again to continue, or raise eval.server.attempts or eval.server.timeout"
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _once(
        self, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], T], what: Callable[[], str]
    ) -> T:
        try:
            # The client's own time-outs bound single reads; one that trickles would go on for ever.
            async with asyncio.timeout(self._section.timeout):
                response = await (
                    self._client.get(self._url + path)
                    if body is None
                    else self._client.post(self._url + path, json=body)
                )
        except (TimeoutError, self._httpx.TimeoutException):
            raise _Again("time-out") from None
        except (self._httpx.RemoteProtocolError, self._httpx.ReadError, self._httpx.DecodingError):
            raise _Again("answer cut off") from None
        except self._httpx.TransportError as error:
            raise _Again(f"no connection: {self._words(str(error)) or type(error).__name__}") from None
        status = int(response.status_code)
        if status in _TRANSIENT or (status >= 500 and status != 501):
            raise _Again(f"status {status}", retry_after(response.headers.get("retry-after"), time.time()))
        if status != 200:
            mend = _MENDS.get(status, "see eval.server in the recipe")
            said = self._words(_message(response.text))
            raise Refused(f"{self._url}{path} refused {what()} with status {status}: {said}; {mend}", status)
        try:
            value = json.loads(response.content)
        except (ValueError, RecursionError):
            raise _Again("no JSON") from None
        self._count(value, body)
        try:
            return read(value)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _Again(f"malformed answer: {self._words(str(error))}") from None

    def _count(self, value: Any, body: Mapping[str, Any] | None) -> None:
        """Count what an answer used.

        Raises:
            BackendError: If there is a cap, and the answer does not say.
        """
        cost = usage(value)
        if cost is not None:
            self._spending.count(cost)
        elif body is not None and self._spending.capped:
            raise BackendError(
                f"{self._url} does not say how many tokens an answer used, so no budget can be kept; leave "
                "eval.server.max_tokens_budget and max_cost out, and set a limit at the server"
            )

    def _pause(self, attempt: int, asked: float | None) -> float:
        """Return the seconds before another attempt: never sooner than the server asked for."""
        bound = min(self._section.longest_wait, self._section.backoff * 2.0 ** (attempt - 1))
        return (asked or 0.0) + random.uniform(0.0, bound)

    def _words(self, text: str) -> str:
        """Return a server's words in one short line without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        return clean(text, _SHOWN)


def usage(value: Any) -> Cost | None:
    """Return the tokens that an answer says it used; None if it does not."""
    found = value.get("usage") if isinstance(value, dict) else None
    if not isinstance(found, dict):
        return None
    counts = [found.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        return None
    return Cost(prompt_tokens=counts[0], completion_tokens=counts[1])


def retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for, as a number or as a date; None if it asks nothing.

    Args:
        value: The header.
        now: Seconds since 1970.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except ValueError:
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)


def _message(text: str) -> str:
    """Return what an error's body says, in whichever of the usual forms."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return value if isinstance(value, str) else json.dumps(value)


def _key(section: ServerSection) -> str | None:
    if section.key_env is None:
        return None
    key = os.environ.get(section.key_env, "").strip()
    if not key:
        raise BackendError(
            f"eval.server.key_env: the environment variable {section.key_env} is not set; export it, or leave the key "
            "out for a server that takes none"
        )
    if not key.isascii() or not key.isprintable():
        raise BackendError(f"eval.server.key_env: {section.key_env} holds characters that no key has; set it again")
    return key
