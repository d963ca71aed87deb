"""Sends concurrent requests to servers, and retries them.

Retried are 408, 425, 429 and 5xx, time-outs, broken connections, and bodies that are incomplete, too large, not JSON or
of the wrong form. Waits double and are drawn between 0 and their bound ("full jitter"), so that many clients do not
return at once; a server's Retry-After is respected. All other errors are final. Server messages are
shortened, and the key is removed from messages and answers.

An event loop runs in a separate thread, so that connections outlast a call. Results are passed on one by one;
the caller's thread stores each answer before it takes the next. Until then an answer counts as in progress, so that a
slow disk does not pile up answers that a kill would lose.
"""

from __future__ import annotations

import asyncio
import copy
import email.utils
import json
import logging
import math
import os
import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from llmrec.backends.cache import StoredLedger
from llmrec.durable import Json
from llmrec.errors import BackendError, EngineFailure, require
from llmrec.guard import clean, neutralise
from llmrec.recipe.schema import ServerSection
from llmrec.types import Cost, Prompt

# Usage of a server in tokens and money, and the limits at which requests stop.


_MILLION = 1_000_000
# More tokens per answer are treated as an error; sums of them would overflow SQLite's integers.
_MAX_REPORTED_TOKENS = 2**32


class ServerUsage:
    """The usage of a server by this process and earlier ones.

    Requests in progress when a cap is reached are finished and kept, so usage can exceed a cap by their cost.

    Args:
        section: Caps and prices.
        ledger: Records usage beyond the process; None: this process only.
    """

    def __init__(self, section: ServerSection, ledger: StoredLedger | None) -> None:
        self._section, self._ledger = section, ledger
        self._lock = threading.Lock()
        self._total = ledger.spent() if ledger is not None else Cost()
        self._unbooked = Cost()

    @property
    def capped(self) -> bool:
        """Whether there is a limit, so that answers must report their usage."""
        return self._section.max_tokens_budget is not None or self._section.max_cost is not None

    @property
    def total(self) -> Cost:
        """Total number of tokens so far."""
        with self._lock:
            return self._total

    @property
    def money(self) -> float:
        """Cost of the tokens, in the currency of the prices."""
        total, section = self.total, self._section
        return (total.prompt_tokens * section.price_in + total.completion_tokens * section.price_out) / _MILLION

    def check(self) -> None:
        """Raise an error if a limit is reached.

        Raises:
            EngineFailure: If a cap is reached; the message names the key.
        """
        section, total = self._section, self.total
        used = total.prompt_tokens + total.completion_tokens
        kept = "answers so far are kept; raise the budget and run the same command again to continue"
        if section.max_tokens_budget is not None and used >= section.max_tokens_budget:
            raise EngineFailure(
                f"the budget eval.server.max_tokens_budget={section.max_tokens_budget:,} is used up: "
                f"{total.prompt_tokens:,} tokens were read and {total.completion_tokens:,} written; {kept}",
                kind="exhausted",
                column="eval.server.max_tokens_budget",
            )
        if section.max_cost is not None and self.money >= section.max_cost:
            raise EngineFailure(
                f"the budget eval.server.max_cost={section.max_cost:g} is used up: {self.money:.4g} was spent on "
                f"{total.prompt_tokens:,} tokens read and {total.completion_tokens:,} written; {kept}",
                kind="exhausted",
                column="eval.server.max_cost",
            )

    def count(self, cost: Cost) -> None:
        """Add the usage of an answer, even if it could not be parsed; thread-safe."""
        with self._lock:
            self._total, self._unbooked = self._total + cost, self._unbooked + cost

    def book(self) -> None:
        """Record usage that is not yet stored; must be called in the thread of the database."""
        with self._lock:
            cost, self._unbooked = self._unbooked, Cost()
        if self._ledger is not None and cost != Cost():
            self._ledger.spend(cost)


def parse_usage(value: Any) -> Cost | None:
    """Return the usage that an answer reports; None if it reports none."""
    result = value.get("usage") if isinstance(value, dict) else None
    if not isinstance(result, dict):
        return None
    counts = [result.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(count, int) and 0 <= count <= _MAX_REPORTED_TOKENS for count in counts):
        return None
    return Cost(prompt_tokens=counts[0], completion_tokens=counts[1])


# Load balancing over servers with the same model: a failing server is skipped for a while.


FIRST_PAUSE = 1.0
"""Seconds that a failing server is skipped at first; doubled after every further failure."""
# Number of consecutive failures after which a server is skipped; after a refused connection, one is enough.
_MAX_FAULTS = 3


@dataclass(slots=True)
class ServerState:
    """The state of a server for load balancing.

    Attributes:
        url: The URL up to ``/v1``, without a trailing slash.
        until: The time until which it is skipped; 0: it is in use.
        rest: Seconds of the next pause.
        faults: Consecutive failed attempts.
        tried: Whether a trial request is in progress after a pause.
    """

    url: str
    until: float = 0.0
    rest: float = FIRST_PAUSE
    faults: int = 0
    tried: bool = False


class ServerPool:
    """Selects a server for each attempt, in turn.

    A skipped server returns with one trial request, and fully once it answers. A single server is never skipped.

    Args:
        urls: Addresses of the servers.
        longest: Maximum pause in seconds, unless a server requests a longer one.
        clock: A monotonic clock in seconds.
    """

    def __init__(self, urls: Sequence[str], longest: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._servers = [ServerState(url) for url in urls]
        self._longest, self._clock = longest, clock
        self._next = 0

    def take(self, last: ServerState | None = None) -> ServerState:
        """Return the server for the next attempt of a request.

        Args:
            last: The server of the failed previous attempt, which is avoided while another one answers.
        """
        now = self._clock()
        order = [*self._servers[self._next :], *self._servers[: self._next]]
        awake = [server for server in order if server.until <= now]
        chosen = next((server for server in awake if server is not last), None)
        if chosen is None:
            chosen = awake[0] if awake else min(order, key=lambda server: server.until)
        self._next = (self._servers.index(chosen) + 1) % len(self._servers)
        if chosen.until:
            # Other requests wait until the result of the trial is known.
            chosen.until, chosen.tried = now + chosen.rest, True
        return chosen

    def another(self, than: ServerState) -> bool:
        """Whether another server is available now."""
        return any(server is not than and server.until <= self._clock() for server in self._servers)

    def answered(self, server: ServerState) -> None:
        """Record that a server responded, so it is available."""
        server.faults = 0
        if server.until and not server.tried:
            return
        if server.tried:
            log.warning("%s is available again", server.url)
        server.until, server.rest, server.tried = 0.0, FIRST_PAUSE, False

    def failed(self, server: ServerState, fault: str, wait: float | None = None) -> None:
        """Record a failure, and skip the server after too many, or for the ``wait`` seconds of its Retry-After."""
        server.faults += 1
        if len(self._servers) == 1 or (server.until and not server.tried):
            return
        unavailable = fault.startswith("no connection") or server.faults >= _MAX_FAULTS or server.tried
        if not (unavailable or wait):
            return
        rest = max(wait or 0.0, server.rest if unavailable else 0.0)
        if not server.tried:
            log.warning("%s is not used for %.0f s (%s); requests go to the other servers", server.url, rest, fault)
        if unavailable:
            server.rest = min(self._longest, 2 * server.rest)
        server.until, server.tried = self._clock() + rest, False


log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 64 * 2**20
"""Maximum size of an answer in bytes."""
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError)
"""Exceptions that parsers raise for a malformed answer."""

_MASK = "***"
# Shorter keys are placeholders for servers without keys ("EMPTY"), or words that an answer may contain.
_MIN_KEY_LENGTH = 8


T = TypeVar("T")

_TRANSIENT_STATUSES = frozenset({408, 425, 429})
_NO_ROUTE_STATUSES = frozenset({404, 405, 501})
_MAX_MESSAGE_LENGTH = 300
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
_FIXES: Mapping[int, str] = {
    401: "set eval.server.key_env to the environment variable with a valid API key",
    402: "the account has no credit left",
    403: "set eval.server.key_env to the environment variable with an API key for this model",
    404: "see eval.server.url, which ends in /v1 on most servers, and eval.server.model",
    413: "show less history (tasks.<family>.history)",
}


class FinalServerError(BackendError):
    """Raised for a final error of a server, which is not retried."""

    # Has only a message, like every `LlmrecError`, so that it can be pickled.
    status: int | None = None

    @property
    def no_route(self) -> bool:
        """Whether the server lacks the route."""
        return self.status in _NO_ROUTE_STATUSES


class _RetryableError(Exception):
    """A failure to be retried; ``wait`` is the server's Retry-After in seconds."""

    def __init__(self, kind: str, wait: float | None = None) -> None:
        super().__init__(kind)
        self.kind, self.wait = kind, wait


class ServerClient:
    """A client of one server, or of several servers with the same model.

    Raises:
        BackendError: If the environment variable of the key is not set.
        MissingExtra: If httpx is not installed.
    """

    def __init__(self, section: ServerSection, spending: ServerUsage) -> None:
        httpx = require("httpx", "openai")
        self._httpx, self._section, self._spending = httpx, section, spending
        self._fleet = ServerPool(section.urls, section.longest_wait)
        self._key = find_api_key(section)
        # shared by the copies for single servers, like all counters
        self._warned: set[str] = set()
        self.where = section.where
        self.attempts: Counter[str] = Counter()
        """Attempts by how they ended: ``ok`` or the kind of fault."""
        for name in ("httpx", "httpcore"):
            # these loggers write one line per request
            logging.getLogger(name).setLevel(logging.WARNING)
        local = any(urlsplit(url).hostname in _LOCAL_HOSTS for url in section.urls)
        bearer = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client: Any = httpx.AsyncClient(
            # Only these encodings can be decompressed incrementally.
            headers={**bearer, "Accept-Encoding": "gzip"},
            timeout=section.timeout,
            limits=httpx.Limits(max_connections=section.concurrency, max_keepalive_connections=section.concurrency),
            # no proxy for this machine
            trust_env=not local,
        )

    async def ask(
        self, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], T], *, what: Callable[[], str]
    ) -> T:
        """Send a request and parse the answer, with retries.

        Args:
            path: The path after the base URL, such as ``/completions``.
            body: The JSON to send.
            read: Parses the answer; raises one of `MALFORMED` if it is malformed.
            what: Names the request in an error.

        Raises:
            FinalServerError: For a final error.
            EngineFailure: If no attempt succeeds, or a budget is exhausted.
            BackendError: If the server rejects the request.
        """
        faults: list[str] = []
        server: ServerState | None = None
        wait: float | None = None
        for attempt in range(self._section.attempts):
            # Another server is tried at once, but not one after another without waiting.
            if server is not None and not (attempt % 2 and self._fleet.another(server)):
                await asyncio.sleep(self._pause(attempt, wait))
            self._spending.check()
            server = self._fleet.take(server)
            try:
                result = await self._send_once(server.url, path, body, read, what)
            except _RetryableError as fault:
                faults.append(fault.kind)
                self.attempts[fault.kind.partition(":")[0]] += 1
                self._fleet.failed(server, fault.kind, fault.wait)
                wait = None if self._fleet.another(server) else fault.wait
                if wait is not None and wait > self._section.longest_wait:
                    raise EngineFailure(
                        f"{server.url}{path} asks to wait {wait:.0f} s before {what()}, longer than "
                        f"eval.server.longest_wait={self._section.longest_wait:g}; raise this key, or run the same "
                        "command again later. Answers so far are kept",
                        kind="unreachable",
                        at=f"{server.url}{path}",
                        column="eval.server.longest_wait",
                    ) from None
                continue
            except FinalServerError:
                self._fleet.answered(server)
                raise
            self._fleet.answered(server)
            self.attempts["ok"] += 1
            return result
        seen = ", ".join(f"{kind} ({count})" for kind, count in Counter(faults).most_common())
        raise EngineFailure(
            f"{self.where}{path} did not answer {what()} in {len(faults)} attempts: {seen}; run the same command "
            "again to continue, or raise eval.server.attempts or eval.server.timeout. Answers so far are kept",
            kind="unreachable",
            at=f"{self.where}{path}",
        )

    def each(self) -> list[ServerClient]:
        """Return a client for each server, with the same connections and counters."""
        results = []
        for url in self._section.urls:
            one = copy.copy(self)
            one._fleet, one.where = ServerPool([url], self._section.longest_wait), url
            results.append(one)
        return results

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _send_once(
        self, url: str, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], T], what: Callable[[], str]
    ) -> T:
        try:
            # The client's timeouts apply to single reads, so a very slow response would never end.
            async with asyncio.timeout(self._section.timeout):
                stream = self._client.stream("GET" if body is None else "POST", url + path, json=body)
                async with stream as response:
                    content = await read_body(response)
        except (TimeoutError, self._httpx.TimeoutException):
            raise _RetryableError("time-out") from None
        except (self._httpx.RemoteProtocolError, self._httpx.ReadError, self._httpx.DecodingError):
            raise _RetryableError("answer cut off") from None
        except self._httpx.TransportError as error:
            raise _RetryableError(f"no connection: {self._words(str(error)) or type(error).__name__}") from None
        status = int(response.status_code)
        if status in _TRANSIENT_STATUSES or (status >= 500 and status != 501):
            raise _RetryableError(
                f"status {status}", parse_retry_after(response.headers.get("retry-after"), time.time())
            )
        if status != 200:
            fix = _FIXES.get(status, "see eval.server in the recipe")
            text = self._words(_error_message(content.decode("utf-8", "replace")))
            refusal = FinalServerError(
                f"{url}{path} refused {what()} with status {status}: {text}; {fix}",
                kind="failed",
                at=f"{url}{path}",
            )
            refusal.status = status
            raise refusal
        try:
            value = self._masked(json.loads(content))
        except (ValueError, RecursionError):
            raise _RetryableError("no JSON") from None
        self._count(value, body)
        try:
            return read(value)
        except MALFORMED as error:
            raise _RetryableError(f"malformed answer: {self._words(str(error))}") from None

    def _count(self, value: Any, body: Mapping[str, Any] | None) -> None:
        """Add the usage reported in an answer.

        Raises:
            BackendError: If there is a cap and the answer reports no usage.
        """
        cost = parse_usage(value)
        if cost is not None:
            self._spending.count(cost)
        elif body is not None and self._spending.capped:
            raise BackendError(
                f"{self.where} does not report the tokens of an answer, so no budget can be enforced; remove "
                "eval.server.max_tokens_budget and max_cost, and set a limit on the server",
                kind="unsupported",
                at=self.where,
                column="eval.server.max_tokens_budget",
            )

    def _pause(self, attempt: int, wait: float | None) -> float:
        """Return the seconds to wait before the next attempt, at least the server's Retry-After."""
        bound = min(self._section.longest_wait, self._section.backoff * 2.0 ** (attempt - 1))
        return (wait or 0.0) + random.uniform(0.0, bound)

    def _words(self, text: str) -> str:
        """Return the message of a server as one short line without the API key."""
        if self._key:
            text = text.replace(self._key, _MASK)
        return clean(text, _MAX_MESSAGE_LENGTH)

    def _masked(self, value: Any) -> Any:
        """Remove the API key from an answer, because a server may repeat it and it would be cached."""
        if self._key is None or len(self._key) < _MIN_KEY_LENGTH:
            return value
        masked = _replace_in_strings(value, self._key, _MASK)
        if masked != value and not self._warned:
            self._warned.add(_MASK)
            log.warning("%s repeats the API key in its answers; the key is replaced with %s", self.where, _MASK)
        return masked


async def read_body(response: Any) -> bytes:
    """Read a response body, up to `MAX_ANSWER_BYTES` bytes both compressed and decompressed.

    Raises:
        _RetryableError: If it is larger or cannot be decompressed.
    """
    packing = response.headers.get("content-encoding", "identity").strip().lower()
    if packing not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise _RetryableError(f"packed as {clean(packing, 20)}")
    unpacker = None if packing in ("", "identity") else zlib.decompressobj(wbits=47 if "gzip" in packing else 15)
    parts, size, sent = [], 0, 0
    async for chunk in response.aiter_raw():
        sent += len(chunk)
        if unpacker is not None:
            try:
                chunk = unpacker.decompress(chunk, MAX_ANSWER_BYTES - size + 1)
            except zlib.error:
                raise _RetryableError("answer cut off") from None
        parts.append(chunk)
        size += len(chunk)
        if max(size, sent) > MAX_ANSWER_BYTES:
            raise _RetryableError(f"the answer is larger than {MAX_ANSWER_BYTES // 2**20} MiB")
    if unpacker is not None and sent and not unpacker.eof:
        raise _RetryableError("answer cut off")
    return b"".join(parts)


def _replace_in_strings(value: Any, old: str, new: str) -> Any:
    """Replace a text in all strings of a JSON value."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, list):
        return [_replace_in_strings(item, old, new) for item in value]
    if isinstance(value, dict):
        return {name.replace(old, new): _replace_in_strings(item, old, new) for name, item in value.items()}
    return value


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds in a ``Retry-After`` header, a number or date; None if it is missing. ``now``: since 1970."""
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


def _error_message(text: str) -> str:
    """Return the message in an error response, in any of the usual formats."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return value if isinstance(value, str) else json.dumps(value)


def find_api_key(section: ServerSection) -> str | None:
    """Return the API key of a server; None if it needs none.

    Raises:
        BackendError: If its environment variable is not set or is not a key.
    """
    if section.key_env is None:
        return None
    key = os.environ.get(section.key_env, "").strip()
    if not key:
        raise BackendError(
            f"eval.server.key_env: the environment variable {section.key_env} is not set; set the variable, or remove "
            "the setting if the server needs no key",
            kind="missing-value",
            column="eval.server.key_env",
        )
    if not key.isascii() or not key.isprintable():
        raise BackendError(
            f"eval.server.key_env: {section.key_env} contains characters that are not valid in an API key; set the "
            "variable again",
            kind="bad-value",
            column="eval.server.key_env",
        )
    return key


_JOIN_SECONDS = 10.0


class EventLoopThread:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmrec-server", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def each(self, jobs: Sequence[Callable[[], Awaitable[T]]], together: int) -> Iterator[tuple[int, T]]:
        """Yield the index and result of each job when it finishes, running ``together`` jobs at a time.

        A result counts as in progress until the next one is taken. After a failure no further job starts; those in
        progress are finished and yielded, then the first failure is raised. Closing the iterator cancels all jobs.
        """
        done: SimpleQueue[tuple[int, T, asyncio.Event] | None] = SimpleQueue()
        work = asyncio.run_coroutine_threadsafe(_run_all_jobs(jobs, together, done), self._loop)
        try:
            while (received := done.get()) is not None:
                index, result, taken = received
                yield index, result
                self._loop.call_soon_threadsafe(taken.set)
            if (failure := work.result()) is not None:
                raise failure
        finally:
            work.cancel()

    def close(self) -> None:
        """End the thread; calling it twice is harmless."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_JOIN_SECONDS)
        if not self._loop.is_running() and not self._loop.is_closed():
            self._loop.close()


async def _run_all_jobs(
    jobs: Sequence[Callable[[], Awaitable[T]]], together: int, done: SimpleQueue[tuple[int, T, asyncio.Event] | None]
) -> Exception | None:
    """Run jobs, pass on their indices and results, each with an event to set when it is received, and end with None."""
    waiting = iter(enumerate(jobs))
    failures: list[Exception] = []

    async def work() -> None:
        for index, job in waiting:
            try:
                result, taken = await job(), asyncio.Event()
            except Exception as failure:
                failures.append(failure)
                return
            done.put((index, result, taken))
            await taken.wait()
            if failures:
                return

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(together, len(jobs))):
                group.create_task(work())
    finally:
        done.put(None)
    return failures[0] if failures else None


# Request bodies.


def completion_body(section: ServerSection, ids: Sequence[int] | str, *, room: int, **keys: Any) -> dict[str, Json]:
    """Return the body of a request that continues token ids or a text by greedy decoding."""
    prompt = ids if isinstance(ids, str) else list(ids)
    return _request_body(section, {"prompt": prompt, "max_tokens": room, **keys})


def likelihood_body(section: ServerSection, rows: Sequence[Sequence[int]]) -> dict[str, Json]:
    """Return the body of a request for the log-probabilities of token sequences."""
    keys: dict[str, Json] = {"prompt": [list(row) for row in rows], "max_tokens": 1, "echo": True, "logprobs": 1}
    return _request_body(section, keys)


def chat_body(
    section: ServerSection, prompt: Prompt, *, room: int, control: Sequence[str], continues: bool, **keys: Any
) -> dict[str, Json]:
    """Return the body of a request that answers chat messages by greedy decoding.

    The given part of the answer is a final assistant turn. A server that supports it continues this turn; others may
    start a new one.

    Args:
        section: Model, room for thinking, further keys.
        prompt: The turns.
        room: Tokens of the answer.
        control: Control tokens that no text may contain, if the server's tokens are known.
        continues: Whether the server can continue an assistant turn.
        keys: Further keys of the request.
    """
    turns = [{"role": turn.role, "content": neutralise(turn.text, control)} for turn in prompt.messages]
    prefix = neutralise("".join(segment.text for segment in prompt.answer_prefix), control)
    if prefix:
        turns.append({"role": "assistant", "content": prefix})
        if continues:
            keys |= {"continue_final_message": True, "add_generation_prompt": False}
    return _request_body(section, {"messages": turns, "max_tokens": room + section.thinking_tokens, **keys})


def _request_body(section: ServerSection, keys: dict[str, Json]) -> dict[str, Json]:
    body = {"model": section.model, "temperature": 0, **keys, **section.extra}
    return {name: value for name, value in body.items() if value is not None}
