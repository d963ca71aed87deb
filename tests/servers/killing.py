"""Kills a client repeatedly during its requests, and counts lost and repeated answers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.backends.cache import AnswerStore
from tests.servers.client import digests
from tests.servers.faulty import FaultyServer

_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of the kills.

    Attributes:
        last: The output of the last client, which was not killed.
        under_way: Per kill, the number of requests that were sent but not stored, so that they are repeated.
        unstored: Per kill, how many of them the server had answered.
        twice: Number of answers beyond one per request.
    """

    last: dict[str, Any]
    under_way: tuple[int, ...]
    unstored: tuple[int, ...]
    twice: int


def run(server: FaultyServer, store: Path, count: int, *, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a client to its end, and return its output."""
    done = subprocess.run(
        _command(server, store, count, settings), capture_output=True, text=True, timeout=_SECONDS * 3
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output: dict[str, Any] = json.loads(done.stdout)
    return output


def kill(
    server: FaultyServer,
    store: Path,
    count: int,
    kills: int,
    *,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> Outcome:
    """Kill clients after random numbers of answers, and let the last one finish."""
    rng, names = random.Random(seed), digests(count)
    under_way, unstored, stored = [], [], 0
    for left in range(kills, 0, -1):
        # Each client gets a random part of its share of the remaining requests.
        goal = rng.randrange(1, max(2, (count - stored) // (left + 1)))
        sent, answered = [server.asked[name] for name in names], [server.answered[name] for name in names]
        client = subprocess.Popen(_command(server, store, count, settings), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + _SECONDS
        start = server.answered.total()
        while server.answered.total() < start + goal and time.monotonic() < deadline and client.poll() is None:
            time.sleep(0.002)
        assert client.poll() is None, f"the client ended with {client.returncode} before it was killed"
        os.kill(client.pid, signal.SIGKILL)
        client.wait()
        known, before = AnswerStore(store), stored
        stored = len(known)
        known.close()
        # This client did not repeat any stored request.
        under_way.append(_more(server.asked, names, sent) - (stored - before))
        unstored.append(_more(server.answered, names, answered) - (stored - before))
    last = run(server, store, count, settings=settings)
    twice = sum(server.answered[name] for name in names) - count
    return Outcome(last=last, under_way=tuple(under_way), unstored=tuple(unstored), twice=twice)


def _more(now: Mapping[str, int], names: Sequence[str], before: Sequence[int]) -> int:
    """Return the number of requests with a higher count than before."""
    return sum(now[name] > known for name, known in zip(names, before, strict=True))


def _command(server: FaultyServer, store: Path, count: int, settings: dict[str, Any] | None) -> list[str]:
    words = [sys.executable, "-m", "tests.servers.client", server.url, str(store), str(count)]
    return [*words, "--settings", json.dumps(settings or {})]
