"""Sends a fixed set of requests to a server and stores the answers, until it is done or killed.

``python -m tests.servers.client URL STORE COUNT`` resumes after a kill. `wrong` returns the answers of a store that are
missing or wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from llmrec.backends.cache import AnswerStore, CachedBackend, StoredLedger
from llmrec.backends.encode import Encoder
from llmrec.backends.server.backend import OpenAIBackend
from llmrec.recipe.schema import ServerSection
from llmrec.types import Backend, Completion, Message, Prompt, Segment
from tests.servers.faulty import Behaviour, FaultyServer, answer_to, digest_of, running

ROOM = 8


def question(text: str, *, given: str = "", stop: str | None = None) -> Prompt:
    answer = (Segment("item", given),) if given else ()
    return Prompt(messages=(Message("user", (Segment("text", text),)),), answer_prefix=answer, stop=stop)


def questions(count: int) -> list[Prompt]:
    return [question(f"Rate film {n}") for n in range(count)]


def section(url: str | tuple[str, ...], **changes: Any) -> ServerSection:
    """Return settings for tests: short timeouts, many attempts."""
    settings: dict[str, Any] = {"timeout": 1.0, "attempts": 24, "backoff": 0.02, "longest_wait": 0.5, "concurrency": 32}
    return ServerSection(url=url, model="films", **{**settings, **changes})


@contextmanager
def opened(
    behaviour: Behaviour, encoder: Encoder | None = None, **changes: Any
) -> Iterator[tuple[FaultyServer, OpenAIBackend]]:
    """Yield a server and its client."""
    with running(behaviour) as server, closing(OpenAIBackend(section(server.url, **changes), encoder)) as backend:
        yield server, backend


def cached(store: AnswerStore, settings: ServerSection, started: list[OpenAIBackend] | None = None) -> CachedBackend:
    """Return a backend that stores its answers, as in a run; its client is appended to ``started``."""

    def start() -> Backend:
        client = OpenAIBackend(settings, ledger=StoredLedger(store, "test"))
        if started is not None:
            started.append(client)
        return client

    return CachedBackend(store, settings.answering() | {"url": "the server"}, OpenAIBackend, start)


def turns(prompt: Prompt) -> list[dict[str, str]]:
    """Return the messages that a server receives for a prompt without a prefix of the answer."""
    return [{"role": turn.role, "content": turn.text} for turn in prompt.messages]


def digests(count: int) -> list[str]:
    """Return the digest of each request."""
    return [digest_of(turns(prompt)) for prompt in questions(count)]


def wrong(answers: Sequence[Completion], prompts: Sequence[Prompt]) -> list[int]:
    """Return the indices of wrong answers."""
    expected = [answer_to(turns(prompt)) for prompt in prompts]
    assert len(answers) == len(expected)
    return [n for n, (answer, text) in enumerate(zip(answers, expected, strict=True)) if answer.text != text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("url")
    parser.add_argument("store", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--settings", type=json.loads, default={})
    chosen = parser.parse_args()
    store, started = AnswerStore(chosen.store), []  # type: ignore[var-annotated]
    backend = cached(store, section(chosen.url, **chosen.settings), started)
    prompts = questions(chosen.count)
    begin = time.monotonic()
    answers = backend.generate(prompts, max_tokens=ROOM)
    seconds = time.monotonic() - begin
    attempts: Mapping[str, int] = started[0].wire.attempts if started else {}
    backend.close()
    json.dump(
        {
            "different": len({answer.text for answer in answers}),
            "stored": len(store),
            "wrong": wrong(answers, prompts),
            "recalled": backend.recalled,
            "seconds": seconds,
            "attempts": attempts,
        },
        sys.stdout,
    )
    store.close()


if __name__ == "__main__":
    main()
