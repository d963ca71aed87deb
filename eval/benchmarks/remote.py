"""Asks a server that fails at 30 % of all attempts, and kills the client again and again.

Run by ``make bench NAME=remote``; the server is `tests/servers/faulty.py`, whose answers show which question they
belong to.

- faults: 10,000 questions, each attempt of which may meet 429 with or without Retry-After, 500, a stall or a trickle of
  bytes beyond the client's time-out, a body that ends early, one that is no JSON, and too few or doubled choices.
  Every answer is compared with its question's.
- scores: candidates of 500 prompts, several a request, whose choices also come in another order. Every
  log-probability is compared with what the server has for it.
- kills: the same questions to the same kind of server by a client that is killed with SIGKILL 20 times, each time
  after a random number of answers, and continued.

Nothing here measures a model: seconds are those of the client and of a server in Python on the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from llmrec.backends.encode import Encoder
from llmrec.backends.server.backend import OpenAIBackend
from llmrec.durable import write_json
from llmrec.machine import machine, versions
from tests.conftest import make_tokenizer
from tests.servers import killing
from tests.servers.client import digests, question, section
from tests.servers.faulty import SHUFFLED, Behaviour, logprob, running

SHARE, STALL = 0.3, 6.0
SETTINGS: dict[str, Any] = {"timeout": 1.5, "concurrency": 32, "attempts": 24, "backoff": 0.02, "longest_wait": 0.5}
TITLES = tuple(f"{name} {n}" for name in ("Heat", "Fargo", "Casino") for n in range(4))
PROMPTS = 500


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    chosen = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        parts = {
            "faults": faults(Path(name) / "faults.sqlite", chosen.requests),
            "scores": scores(PROMPTS),
            "kills": kills(Path(name) / "kills.sqlite", chosen.requests, chosen.kills),
        }
    result = {
        "command": "make bench NAME=remote",
        "what": "a client of an OpenAI-compatible server that fails on purpose; answers compared with their questions",
        "share_of_faults": SHARE,
        "settings": SETTINGS,
        **parts,
        "load_before": round(before, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "machine": machine(),
        "versions": versions(),
    }
    write_json(chosen.target, result)


def faults(store: Path, count: int) -> dict[str, Any]:
    """Ask every question once, through faults."""
    with running(Behaviour(share=SHARE, stall=STALL, latency=0.01)) as server:
        said = killing.run(server, store, count, settings=SETTINGS)
        answered = [server.answered[digest] for digest in digests(count)]
        met = dict(server.faults)
    attempts = dict(Counter(said["attempts"]).most_common())
    found = {
        "requests": count,
        **_compared(said, count),
        "attempts": sum(attempts.values()),
        "attempts_by_outcome": attempts,
        "faults_of_the_server": met,
        # Sound, but too late for the client, or under way when a connection broke.
        "answered_twice": sum(times > 1 for times in answered),
        "seconds": round(said["seconds"], 1),
        "requests_per_second": round(count / said["seconds"], 1),
    }
    return _show("faults", found)


def scores(count: int) -> dict[str, Any]:
    """Score several candidates a request, whose choices come in any order."""
    encoder = Encoder(make_tokenizer(), max_length=512)
    tokens = encoder.tokenizer.encode
    offers = frozenset({"completions", "logprobs", "echo", "usage"})
    behaviour = Behaviour(share=SHARE, stall=STALL, offers=offers, count=lambda text: len(tokens(text)))
    prompts = [question(f"Continue {n}", given="Heat\n", stop="\n") for n in range(count)]
    with running(behaviour) as server:
        backend = OpenAIBackend(section(server.url, **SETTINGS), encoder)
        begin = time.monotonic()
        found = backend.score(prompts, [TITLES] * count)
        seconds = time.monotonic() - begin
        backend.close()
        met = dict(server.faults)
    wrong = 0
    for prompt, each in zip(prompts, found, strict=True):
        ids = encoder.prompt(prompt)
        for title, value in zip(TITLES, each.logprobs, strict=True):
            row = [*ids, *encoder.continuation(prompt, title, closed=True)]
            wrong += abs(value - sum(logprob(row[:k], row[k]) for k in range(len(ids), len(row)))) > 1e-6
    return _show(
        "scores",
        {
            "requests": count,
            "candidates": len(TITLES),
            "lost": count - len(found),
            "wrong_log_probabilities": wrong,
            "answers_in_another_order": met.pop(SHUFFLED),
            "faults_of_the_server": met,
            "seconds": round(seconds, 1),
        },
    )


def kills(store: Path, count: int, times: int) -> dict[str, Any]:
    """Kill the client at random points, and continue."""
    with running(Behaviour(share=SHARE, stall=STALL, latency=0.01, seed=1)) as server:
        begin = time.monotonic()
        found = killing.kill(server, store, count, times, settings=SETTINGS)
        seconds = time.monotonic() - begin
    return _show(
        "kills",
        {
            "requests": count,
            "kills": len(found.under_way),
            **_compared(found.last, count),
            "sent_again_because_under_way_at_a_kill": sum(found.under_way),
            "most_under_way_at_a_kill": max(found.under_way),
            "answered_and_not_yet_stored_at_a_kill": sum(found.unstored),
            "answered_twice": found.twice,
            "seconds": round(seconds, 1),
        },
    )


def _compared(said: dict[str, Any], count: int) -> dict[str, int]:
    """Compare what a client has at its end with what it was to ask; answers to different questions differ."""
    return {
        "lost": count - said["stored"],
        "doubled": count - said["different"],
        "assigned_to_another": len(said["wrong"]),
    }


def _show(name: str, found: dict[str, Any]) -> dict[str, Any]:
    sys.stdout.write(f"{name}: {json.dumps(found)}\n")
    sys.stdout.flush()
    return found


if __name__ == "__main__":
    main()
