"""A server that fails at 30 % of all attempts, and a client that is killed: nothing lost, doubled or mixed up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrec.backends.cache import AnswerStore
from llmrec.backends.encode import Encoder
from llmrec.backends.server.backend import OpenAIBackend
from llmrec.backends.server.client import retry_after
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


def test_every_answer_reaches_its_own_question(faulty: FaultyServer, tmp_path: Path) -> None:
    store, started = AnswerStore(tmp_path / "answers.sqlite"), []  # type: ignore[var-annotated]
    backend = cached(store, section(faulty.url, timeout=0.5), started)
    prompts = questions(COUNT)
    answers = backend.generate(prompts, max_tokens=ROOM)
    attempts = started[0].wire.attempts
    backend.close()
    assert wrong(answers, prompts) == []
    assert len(store) == COUNT
    assert set(faulty.faults) == set(FAULTS), "a kind of fault was not met"
    assert sum(faulty.faults.values()) > 0.2 * COUNT
    # What one says of the other: each fault cost one attempt, and each question took one sound answer.
    assert attempts.total() - attempts["ok"] >= sum(faulty.faults.values())
    assert {digest: faulty.answered[digest] >= 1 for digest in digests(COUNT)} == dict.fromkeys(digests(COUNT), True)


def test_a_killed_client_goes_on_where_it_was(faulty: FaultyServer, tmp_path: Path) -> None:
    store = tmp_path / "answers.sqlite"
    found = killing.kill(faulty, store, COUNT, 3, settings={"timeout": 0.5, "concurrency": 8})
    assert found.last["different"] == found.last["stored"] == COUNT
    assert found.last["wrong"] == []
    assert found.last["recalled"] > 0
    # At most what was under way is lost: a request a connection.
    assert len(found.under_way) == 3
    assert all(
        0 <= unstored <= under_way <= 8 for unstored, under_way in zip(found.unstored, found.under_way, strict=True)
    )


def test_choices_in_another_order_are_put_right() -> None:
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
        found = backend.score(prompts, [titles] * len(prompts))
    assert server.faults[SHUFFLED] > 10
    for asked, scores in zip(prompts, found, strict=True):
        ids = encoder.prompt(asked)
        for title, value in zip(titles, scores.logprobs, strict=True):
            row = [*ids, *encoder.continuation(asked, title, closed=True)]
            assert value == pytest.approx(sum(logprob(row[:k], row[k]) for k in range(len(ids), len(row))))
    assert found[0].engine == "openai:echo"


def test_offers_do_not_depend_on_faults() -> None:
    """A probe that meets a fault is asked again: no run scores because of luck and another does not."""
    for seed in range(12):
        with opened(Behaviour(share=0.4, seed=seed, stall=0.4), timeout=0.3) as (_, backend):
            assert backend.offers.top == 20, seed


# --------------------------------------------------------------------------- what ends


def test_what_fails_for_good_is_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.sqlite")
    with running(Behaviour(delivered=30)) as server:
        backend = cached(store, section(server.url, attempts=3, concurrency=4))
        with raises(
            BackendError,
            Facts(
                "unreachable",
                f"{server.url}/chat/completions",
                says=("of 100 ('Rate film ", "3 attempts: status 503 (3)", "run the same command again to continue"),
            ),
        ):
            backend.generate(questions(100), max_tokens=ROOM)
        probes = server.answered[digest_of([{"role": "user", "content": "Answer with one digit, 1 or 2."}])]
        assert len(store) == 30 - probes > 20
        backend.close()
    with running(Behaviour()) as server:
        again = cached(store, section(server.url))
        assert wrong(again.generate(questions(100), max_tokens=ROOM), questions(100)) == []
        assert again.recalled == 30 - probes
        again.close()


def test_a_refusal_is_not_tried_again() -> None:
    with (
        running(Behaviour()) as server,
        raises(BackendError, Facts("failed", says=("status 404", "'shows'", "eval.server.model"))),
    ):
        OpenAIBackend(section(server.url).model_copy(update={"model": "shows"}))
    assert len(server.bodies) == 1


def test_a_server_that_is_not_there_is_one_clear_error() -> None:
    with raises(
        BackendError,
        Facts(
            "unreachable",
            "http://127.0.0.1:9/v1/chat/completions",
            says=("2 attempts: no connection", "eval.server.attempts"),
        ),
    ):
        OpenAIBackend(section("http://127.0.0.1:9/v1", attempts=2))


def test_the_server_says_when_to_come_back() -> None:
    assert retry_after("2", now=0.0) == 2.0
    assert retry_after("0.5", now=0.0) == 0.5
    assert retry_after("Thu, 01 Jan 1970 00:01:40 GMT", now=40.0) == 60.0
    assert retry_after("Thu, 01 Jan 1970 00:00:00 GMT", now=40.0) == 0.0
    assert retry_after(None, now=0.0) is None
    assert retry_after("soon", now=0.0) is None
    assert retry_after("nan", now=0.0) is None


def test_waits_double_and_are_never_sooner_than_asked() -> None:
    with opened(Behaviour(), backoff=1.0, longest_wait=8.0) as (_, backend):
        pauses = [[backend.wire._pause(attempt, None) for _ in range(200)] for attempt in range(1, 7)]
    for drawn, bound in zip(pauses, (1, 2, 4, 8, 8, 8), strict=True):
        assert min(drawn) < 0.2 * bound, "full jitter reaches down to nothing"
        assert 0.8 * bound < max(drawn) <= bound
    assert all(backend.wire._pause(1, 5.0) >= 5.0 for _ in range(50))


def test_a_wait_that_is_too_long_ends_the_run() -> None:
    with (
        running(Behaviour(share=1.0, seed=3, retry_after="3600", stall=0.1)) as server,
        raises(
            BackendError,
            Facts("unreachable", column="eval.server.longest_wait", says=("3600 s", "eval.server.longest_wait=0.5")),
        ),
    ):
        OpenAIBackend(section(server.url, timeout=0.3))


# --------------------------------------------------------------------------- budgets


def test_a_budget_stops_the_run_keeps_what_was_answered_and_outlives_it(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.sqlite")
    with running(Behaviour()) as server:
        capped = section(server.url, max_tokens_budget=400, concurrency=2)
        first = cached(store, capped)
        with raises(
            BackendError,
            Facts(
                "exhausted",
                column="eval.server.max_tokens_budget",
                says=(
                    "eval.server.max_tokens_budget=400",
                    "answers so far are kept",
                    "run the same command again to continue",
                ),
            ),
        ):
            first.generate(questions(100), max_tokens=ROOM)
        first.close()
        kept, spent = len(store), store.spent("test")
        assert 10 < kept < 60
        # Two requests were under way at the most when the cap was reached.
        assert 400 <= spent.prompt_tokens + spent.completion_tokens <= 400 + 2 * 20
        asked = len(server.bodies)
        again = cached(store, capped)
        with raises(
            BackendError,
            Facts("exhausted", column="eval.server.max_tokens_budget", says="eval.server.max_tokens_budget=400"),
        ):
            again.generate(questions(100), max_tokens=ROOM)
        assert len(server.bodies) == asked, "a budget that is used up stops before the first request"
        assert len(store) == kept and store.spent("test") == spent
        more = cached(store, section(server.url, max_tokens_budget=100_000))
        assert wrong(more.generate(questions(100), max_tokens=ROOM), questions(100)) == []
        more.close()
        assert store.spent("test").completion_tokens >= 2 * 100


def test_a_budget_in_money(tmp_path: Path) -> None:
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


def test_a_budget_takes_a_server_that_counts() -> None:
    with (
        running(Behaviour(offers=frozenset({"chat"}))) as server,
        raises(
            BackendError, Facts("unsupported", column="eval.server.max_tokens_budget", says="set a limit on the server")
        ),
    ):
        OpenAIBackend(section(server.url, max_tokens_budget=1000))


def test_tokens_of_answers_that_could_not_be_read_are_spent_all_the_same(faulty: FaultyServer, tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.sqlite")
    backend = cached(store, section(faulty.url, timeout=0.5))
    answers = backend.generate(questions(50), max_tokens=ROOM)
    backend.close()
    malformed = faulty.faults["too few choices"] + faulty.faults["doubled choice"]
    assert malformed > 0
    assert store.spent("test").completion_tokens > sum(answer.completion_tokens for answer in answers)
    assert AnswerStore(tmp_path / "other.sqlite").spent("test") == Cost()


def test_a_closed_client_says_so() -> None:
    with running(Behaviour()) as server:
        backend = OpenAIBackend(section(server.url))
        assert backend.generate([question("a")], max_tokens=4)[0].text == answer_to(turns(question("a")))
        backend.close()
        backend.close()
        with raises(BackendError, Facts("closed")):
            backend.generate([question("a")], max_tokens=4)
