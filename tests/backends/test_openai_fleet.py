"""Several servers of one model behind one backend: load balancing, failures, and comparison at the start."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError

from llmrec.answer.checks import engine_section
from llmrec.answer.options import RecommenderOptions
from llmrec.backends.cache import AnswerStore
from llmrec.backends.encode import Encoder
from llmrec.backends.server.backend import OpenAIBackend
from llmrec.backends.server.client import FIRST_PAUSE, ServerPool
from llmrec.errors import BackendError
from llmrec.recipe.schema import ServerSection
from tests.conftest import make_tokenizer
from tests.facts import Facts, raises
from tests.servers.client import ROOM, cached, digests, questions, section, wrong
from tests.servers.faulty import EVERYTHING, Behaviour, FaultyServer, running

COUNT = 150
URLS = ("http://a/v1", "http://b/v1", "http://c/v1")


@pytest.fixture
def three() -> Iterator[list[FaultyServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(Behaviour(latency=0.02, seed=n))) for n in range(3)]


def urls(servers: list[FaultyServer]) -> tuple[str, ...]:
    return tuple(server.url for server in servers)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_round_robin_and_pauses_of_a_dead_server() -> None:
    clock = Clock()
    fleet = ServerPool(URLS, longest=3.0, clock=clock)
    assert [fleet.take().url for _ in range(4)] == [*URLS, URLS[0]]
    dead = fleet.take()
    fleet.failed(dead, "no connection: refused")
    fleet.failed(dead, "no connection: refused")  # a concurrent request fails too
    assert fleet.take(dead) is not dead and fleet.another(dead)
    assert dead.url not in {fleet.take().url for _ in range(6)}
    rests = []
    for _ in range(4):
        rests.append(dead.until - clock.now)
        clock.now = dead.until
        trial = next(each for each in (fleet.take() for _ in range(3)) if each is dead)
        # Only one request is sent as a trial.
        assert dead.url not in {fleet.take().url for _ in range(6)}
        fleet.failed(trial, "time-out")
    assert rests == [FIRST_PAUSE, 2.0, 3.0, 3.0]
    clock.now = dead.until
    while fleet.take() is not dead:
        pass
    fleet.answered(dead)
    assert {fleet.take().url for _ in range(3)} == set(URLS)
    assert (dead.until, dead.rest, dead.faults) == (0.0, FIRST_PAUSE, 0)


def test_retry_after_of_a_server_is_kept() -> None:
    clock = Clock()
    fleet = ServerPool(URLS, longest=60.0, clock=clock)
    busy = fleet.take()
    fleet.failed(busy, "status 429", wait=7.0)
    fleet.answered(busy)  # an earlier request
    assert busy.until == 7.0
    clock.now = 6.9
    assert busy.url not in {fleet.take().url for _ in range(6)}
    clock.now = 7.0
    assert busy.url in {fleet.take().url for _ in range(3)}


def test_single_faults_do_not_pause_a_server() -> None:
    fleet = ServerPool(URLS, longest=60.0, clock=Clock())
    shaky = fleet.take()
    for _ in range(2):
        fleet.failed(shaky, "status 500")
    assert shaky.until == 0.0
    fleet.failed(shaky, "status 500")
    assert shaky.until == FIRST_PAUSE


def test_if_all_servers_pause_the_first_to_return_is_used() -> None:
    clock = Clock()
    fleet = ServerPool(URLS[:2], longest=60.0, clock=clock)
    first, second = fleet.take(), fleet.take()
    fleet.failed(first, "no connection")
    clock.now = 0.5
    fleet.failed(second, "no connection")
    assert not fleet.another(first) and fleet.take(second) is first
    alone = ServerPool(URLS[:1], longest=60.0, clock=clock)
    for _ in range(9):
        alone.failed(alone.take(), "no connection")
    assert alone.take().until == 0.0 and not alone.another(alone.take())


def test_no_answer_is_lost_when_a_server_dies_and_returns(
    three: list[FaultyServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, started = AnswerStore(tmp_path / "answers.sqlite"), []  # type: ignore[var-annotated]
    backend = cached(store, section(urls(three), concurrency=12), started)
    prompts = questions(COUNT)
    backend.generate(prompts[:12], max_tokens=ROOM)
    shares = [sum(server.answered.values()) for server in three]
    assert min(shares) > 0 and max(shares) - min(shares) <= 2
    victim, others = three[1], [three[0], three[2]]

    def kill() -> None:
        while sum(victim.answered.values()) < 20:
            time.sleep(0.001)
        victim.stop()

    killer = threading.Thread(target=kill)
    killer.start()
    answers = backend.generate(prompts[:COUNT], max_tokens=ROOM)
    killer.join()
    assert wrong(answers, prompts) == [] and len(store) == COUNT
    done = [sum(server.answered[digest] for server in three) for digest in digests(COUNT)]
    # A lost answer of the dead server is requested again from another one.
    assert min(done) == 1 and sum(done) <= COUNT + 12
    assert sum(victim.answered.values()) < min(sum(server.answered.values()) for server in others)
    assert [text for text in caplog.messages if "is not used for" in text and victim.url in text][1:] == []
    again = replace(victim.behaviour, port=urlsplit(victim.url).port or 0)
    (client,) = started
    with running(again) as returned:
        for server in client.wire._fleet._servers:
            server.until = min(server.until, 1e-9)  # its pause is over
        more = client.generate(questions(2 * COUNT)[COUNT : COUNT + 60], max_tokens=ROOM)
        assert len({answer.text for answer in more}) == 60
        assert sum(returned.answered.values()) > 10
    assert [text for text in caplog.messages if "answers again" in text and victim.url in text][1:] == []
    backend.close()


def test_error_names_the_unreachable_servers(three: list[FaultyServer]) -> None:
    backend = OpenAIBackend(section(urls(three), attempts=4))
    for server in three:
        server.stop()
    with raises(BackendError, Facts("unreachable", says=(three[0].url, "and 1 more", "in 4 attempts"))):
        backend.generate(questions(1), max_tokens=ROOM)
    backend.close()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Behaviour(weights="others"), "the log-probabilities"),
        (Behaviour(offers=EVERYTHING - {"chat logprobs"}), "top is 20 and 0"),
    ],
)
def test_rejects_servers_with_different_models(other: Behaviour, says: str) -> None:
    with (
        running(Behaviour()) as one,
        running(other) as two,
        raises(BackendError, Facts("mismatch", two.url, column="eval.server.url", says=(one.url, two.url, says))),
    ):
        OpenAIBackend(section((one.url, two.url)))


def test_servers_are_compared_by_completions() -> None:
    encoder = Encoder(make_tokenizer(), max_length=512)
    alike = Behaviour(count=lambda text: len(encoder.tokenizer.encode(text)))
    with running(alike) as one, running(alike) as two, running(replace(alike, weights="others")) as three:
        backend = OpenAIBackend(section((one.url, two.url)), encoder)
        assert backend.offers.exact and backend.offers.named
        backend.close()
        with raises(BackendError, Facts("mismatch", three.url, says="after the same prompt")):
            OpenAIBackend(section((one.url, three.url)), encoder)


def test_error_names_a_server_that_is_dead_at_the_start(three: list[FaultyServer]) -> None:
    with raises(BackendError, Facts("unreachable", "http://127.0.0.1:9/v1/chat/completions")):
        OpenAIBackend(section((three[0].url, "http://127.0.0.1:9/v1"), attempts=2))


def test_urls_in_recipes_and_options() -> None:
    several = ServerSection(url=("http://b/v1/", "http://a/v1"), model="m")
    assert several.urls == ("http://b/v1", "http://a/v1")
    assert several.answering()["url"] == ["http://a/v1", "http://b/v1"]
    one = ServerSection(url=("http://a/v1",), model="m")
    assert one.answering() == ServerSection(url="http://a/v1", model="m").answering()
    for invalid in ((), ("http://a/v1", "http://a/v1/"), ("http://a/v1", "ftp://b/v1")):
        with pytest.raises(ValidationError, match=r"eval\.server\.url"):
            ServerSection(url=invalid, model="m")
    for number in (5, ["http://a/v1", 7]):
        with pytest.raises(ValidationError, match="write a URL, or a list of URLs"):
            ServerSection.model_validate({"url": number, "model": "m"})
    for server_url, expected in (((), ("http://127.0.0.1:8000/v1",)), (URLS, URLS), (URLS[:1], URLS[:1])):
        options = RecommenderOptions(model="x", backend="openai", server_model="m", server_url=server_url)
        section_ = engine_section(options)
        assert section_.server is not None and section_.server.urls == expected
