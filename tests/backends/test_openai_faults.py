"""A server that fails in 30 % of all attempts, and a killed client: no answer is lost, duplicated or mixed up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrec.backends.cache import AnswerStore
from llmrec.backends.encode import Encoder
from llmrec.backends.server.backend import OpenAIBackend
from llmrec.backends.server.client import parse_retry_after
from llmrec.errors import BackendError
from llmrec.types import Cost
from tests.conftest import make_tokenizer
from tests.facts import Facts, raises
from tests.servers import killing
from tests.servers.client import ROOM, cached, digests, opened, question, questions, section, turns, wrong
from tests.servers.faulty import FAULTS, SHUFFLED, Behaviour, FaultyServer, answer_to, digest_of, logprob, running

COUNT = 300


@pytest.fixture
def faulty() -> Iterator[FaultyServer]:
    with running(Behaviour(share=0.3, stall=3.0, latency=0.01)) as server:
        yield server


def test_each_answer_belongs_to_its_prompt(faulty: FaultyServer, tmp_path: Path) -> None:
    store, started = AnswerStore(tmp_path / "answers.sqlite"), []  # type: ignore[var-annotated]
    backend = cached(store, section(faulty.url, timeout=0.5), started)
    prompts = questions(COUNT)
    answers = backend.generate(prompts, max_tokens=ROOM)
    attempts = started[0].wire.attempts
    backend.close()
    assert wrong(answers, prompts) == []
    assert len(store) == COUNT
    # Tokens of malformed answers are counted too.
    assert faulty.faults["too few choices"] + faulty.faults["doubled choice"] > 0
    assert store.spent("test").completion_tokens > sum(answer.completion_tokens for answer in answers)
    assert AnswerStore(tmp_path / "other.sqlite").spent("test") == Cost()
    assert set(faulty.faults) == set(FAULTS), "a kind of fault was not met"
    assert sum(faulty.faults.values()) > 0.2 * COUNT
    # Each fault cost one attempt, and each prompt took one valid answer.
    assert attempts.total() - attempts["ok"] >= sum(faulty.faults.values())
    assert {digest: faulty.answered[digest] >= 1 for digest in digests(COUNT)} == dict.fromkeys(digests(COUNT), True)


def test_killed_client_resumes(faulty: FaultyServer, tmp_path: Path) -> None:
    store = tmp_path / "answers.sqlite"
    outcome = killing.kill(faulty, store, 60, 1, settings={"timeout": 0.5, "concurrency": 8})
    assert outcome.last["different"] == outcome.last["stored"] == 60
    assert outcome.last["wrong"] == [] and outcome.last["recalled"] > 0
    # At most the answers of the concurrent requests are lost.
    assert 0 <= outcome.unstored[0] <= outcome.under_way[0] <= 8


def test_shuffled_choices_are_sorted() -> None:
    encoder = Encoder(make_tokenizer(), max_length=512)
    behaviour = Behaviour(
        share=0.3,
        seed=1,
        stall=3.0,
        offers=frozenset({"completions", "logprobs", "echo", "usage"}),
        count=lambda text: len(encoder.tokenizer.encode(text)),
    )
    with opened(behaviour, encoder, timeout=0.5) as (server, backend):
        prompts = [question(f"Continue {n}", given="Heat\n", stop="\n") for n in range(40)]
        titles = ("Heat", "Fargo", "Casino", "Toy Story 2")
        results = backend.score(prompts, [titles] * len(prompts))
    assert server.faults[SHUFFLED] > 10
    for prompt, scores in zip(prompts, results, strict=True):
        ids = encoder.prompt(prompt)
        for title, value in zip(titles, scores.logprobs, strict=True):
            row = [*ids, *encoder.continuation(prompt, title, closed=True)]
            assert value == pytest.approx(sum(logprob(row[:k], row[k]) for k in range(len(ids), len(row))))
    assert results[0].engine == "openai:echo"


def test_offers_do_not_depend_on_faults() -> None:
    for seed in range(3):
        with opened(Behaviour(share=0.4, seed=seed, stall=0.4), timeout=0.3) as (_, backend):
            assert backend.offers.top == 20, seed


def test_permanent_failure_keeps_the_other_answers(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.sqlite")
    with running(Behaviour(delivered=30)) as server:
        backend = cached(store, section(server.url, attempts=3, concurrency=4))
        says = ("of 100 ('Rate film ", "3 attempts: status 503 (3)", "run the same command again to continue")
        with raises(BackendError, Facts("unreachable", f"{server.url}/chat/completions", says=says)):
            backend.generate(questions(100), max_tokens=ROOM)
        probes = server.answered[digest_of([{"role": "user", "content": "Answer with one digit, 1 or 2."}])]
        assert len(store) == 30 - probes > 20
        backend.close()
    with running(Behaviour()) as server:
        again = cached(store, section(server.url))
        assert wrong(again.generate(questions(100), max_tokens=ROOM), questions(100)) == []
        assert again.recalled == 30 - probes
        again.close()


def test_refusal_is_not_retried() -> None:
    with (
        running(Behaviour()) as server,
        raises(BackendError, Facts("failed", says=("status 404", "'shows'", "eval.server.model"))),
    ):
        OpenAIBackend(section(server.url).model_copy(update={"model": "shows"}))
    assert len(server.bodies) == 1


def test_retry_after() -> None:
    assert parse_retry_after("2", now=0.0) == 2.0
    assert parse_retry_after("0.5", now=0.0) == 0.5
    assert parse_retry_after("Thu, 01 Jan 1970 00:01:40 GMT", now=40.0) == 60.0
    assert parse_retry_after("Thu, 01 Jan 1970 00:00:00 GMT", now=40.0) == 0.0
    assert parse_retry_after(None, now=0.0) is None
    assert parse_retry_after("soon", now=0.0) is None
    assert parse_retry_after("nan", now=0.0) is None


def test_backoff_doubles_and_respects_retry_after() -> None:
    with opened(Behaviour(), backoff=1.0, longest_wait=8.0) as (_, backend):
        pauses = [[backend.wire._pause(attempt, None) for _ in range(200)] for attempt in range(1, 7)]
    for waits, bound in zip(pauses, (1, 2, 4, 8, 8, 8), strict=True):
        assert min(waits) < 0.2 * bound, "full jitter reaches down to zero"
        assert 0.8 * bound < max(waits) <= bound
    assert all(backend.wire._pause(1, 5.0) >= 5.0 for _ in range(50))


def test_too_long_retry_after_ends_the_run() -> None:
    with (
        running(Behaviour(share=1.0, seed=3, retry_after="3600", stall=0.1)) as server,
        raises(BackendError, Facts("unreachable", column="eval.server.longest_wait", says="3600 s")),
    ):
        OpenAIBackend(section(server.url, timeout=0.3))


def test_token_budget_stops_the_run_and_is_stored(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.sqlite")
    with running(Behaviour()) as server:
        capped = section(server.url, max_tokens_budget=400, concurrency=2)
        first = cached(store, capped)
        exhausted = Facts("exhausted", column="eval.server.max_tokens_budget", says="run the same command again to")
        with raises(BackendError, exhausted):
            first.generate(questions(100), max_tokens=ROOM)
        first.close()
        kept, spent = len(store), store.spent("test")
        assert 10 < kept < 60
        # At most two requests were running when the limit was reached.
        assert 400 <= spent.prompt_tokens + spent.completion_tokens <= 400 + 2 * 20
        requests = len(server.bodies)
        again = cached(store, capped)
        with raises(BackendError, exhausted):
            again.generate(questions(100), max_tokens=ROOM)
        assert len(server.bodies) == requests, "an exhausted budget stops before the first request"
        assert len(store) == kept and store.spent("test") == spent
        more = cached(store, section(server.url, max_tokens_budget=100_000))
        assert wrong(more.generate(questions(100), max_tokens=ROOM), questions(100)) == []
        more.close()
        assert store.spent("test").completion_tokens >= 2 * 100


def test_money_budget(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.sqlite")
    with running(Behaviour()) as server:
        started: list[OpenAIBackend] = []
        backend = cached(
            store, section(server.url, max_cost=0.001, price_in=1.0, price_out=4.0, concurrency=1), started
        )
        with raises(BackendError, Facts("exhausted", column="eval.server.max_cost", says="eval.server.max_cost=0.001")):
            backend.generate(questions(200), max_tokens=ROOM)
        spent = store.spent("test")
        assert started[0].spending.money == pytest.approx((spent.prompt_tokens + 4 * spent.completion_tokens) / 1e6)
        assert 0.001 <= started[0].spending.money < 0.0011
        backend.close()


def test_budget_needs_a_server_that_reports_usage() -> None:
    with (
        running(Behaviour(offers=frozenset({"chat"}))) as server,
        raises(BackendError, Facts("unsupported", column="eval.server.max_tokens_budget")),
    ):
        OpenAIBackend(section(server.url, max_tokens_budget=1000))


def test_rejects_closed_client() -> None:
    with running(Behaviour()) as server:
        backend = OpenAIBackend(section(server.url))
        assert backend.generate([question("a")], max_tokens=4)[0].text == answer_to(turns(question("a")))
        backend.close()
        backend.close()
        with raises(BackendError, Facts("closed")):
            backend.generate([question("a")], max_tokens=4)
