"""Strategies over a scripted backend: order, failures, position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from llmrec.backends.fake import FakeBackend
from llmrec.strategies.asking import Prompting, prompt_hash
from llmrec.strategies.pointwise import LikelihoodRanker
from llmrec.strategies.raters import ExpectedRater, ParsedRater, Writer
from llmrec.strategies.rounds import ListRanker
from llmrec.types import Answer, Message, Prompt, Ranking, Rating, Request, Segment, Text, Unparsed

LETTERS = "ABCD"


class ToyTask:
    """Labels A-D for candidates, digits for ratings; reads the first thing that it knows."""

    def __init__(self, labels: Sequence[str] = LETTERS) -> None:
        self.labels = tuple(labels)
        self.wants: list[str] = []

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: str = "one") -> Prompt:
        self.wants.append(want)
        return Prompt(messages=(Message("user", (Segment("text", f"{request.id} {template} {shots}"),)),))

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        return self.labels

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        if completion[:1].isdigit():
            return Rating(request_id=request.id, value=float(completion[0]))
        listed = [c for c in completion if c in LETTERS]
        if listed and request.candidates:
            items = tuple(request.candidates[LETTERS.index(c)] for c in listed)
            return Ranking(request_id=request.id, items=items, scores=tuple(-float(k) for k in range(len(items))))
        return Text(request_id=request.id, text=completion) if completion else None


def requests(n: int = 5) -> list[Request]:
    return [Request(id=f"r{k}", user_id="u", candidates=("i1", "i2", "i3", "i4"), item="i1") for k in range(n)]


def asker(backend: Any, task: ToyTask | None = None, **options: Any) -> Prompting:
    return Prompting(backend=backend, task=task or ToyTask(), template="t", batch=2, **options)  # type: ignore[arg-type]


def test_likelihood_sorts_by_score_and_keeps_ties() -> None:
    values = {"A": -3.0, "B": -1.0, "C": -2.0, "D": -1.0}
    ranker = LikelihoodRanker(asker(FakeBackend(prefer=lambda text, candidate: values[candidate])))
    answers = ranker.answer(requests())
    assert [a.request_id for a in answers] == [f"r{k}" for k in range(5)]
    for answer in answers:
        assert isinstance(answer, Ranking)
        assert answer.items == ("i2", "i4", "i3", "i1")
        assert answer.scores == (-1.0, -1.0, -2.0, -3.0)
        assert answer.prompt_hash


def test_lists_ask_for_a_ranking_and_count_failures() -> None:
    task = ToyTask()
    texts = iter(["C, A, D, B", "", "no idea", "B", "D C"])
    backend = FakeBackend(complete=lambda text: next(texts))
    answers = ListRanker(asker(backend, task)).answer(requests())
    assert set(task.wants) == {"ranking"}
    assert [type(a).__name__ for a in answers] == ["Ranking", "Unparsed", "Unparsed", "Ranking", "Ranking"]
    assert isinstance(answers[0], Ranking)
    assert answers[0].items == ("i3", "i1", "i4", "i2")
    assert isinstance(answers[2], Unparsed)
    assert answers[2].raw == "no idea"


def test_expected_rating_is_the_mean_of_the_label_distribution() -> None:
    task = ToyTask(labels=("1", "2", "3"))
    logs = {"1": math.log(0.05), "2": math.log(0.15), "3": math.log(0.3)}
    answers = ExpectedRater(asker(FakeBackend(prefer=lambda text, label: logs[label]), task)).answer(requests(1))
    assert isinstance(answers[0], Rating)
    assert answers[0].value == pytest.approx((0.05 + 0.3 + 0.9) / 0.5)


@pytest.mark.parametrize(("labels", "closed"), [(("1", "2", "3"), False), (("1", "2", "10"), True)])
def test_labels_that_start_one_another_are_scored_to_their_end(labels: tuple[str, ...], closed: bool) -> None:
    seen = []

    class Watching(FakeBackend):
        def score(self, prompts: Any, candidates: Any, *, closed: bool = True) -> Any:
            seen.append(closed)
            return super().score(prompts, candidates, closed=closed)

    ExpectedRater(asker(Watching(), ToyTask(labels=labels))).answer(requests(1))
    assert seen == [closed]


def test_parsed_rating_and_text() -> None:
    texts = iter(["4 stars", "none"])
    answers = ParsedRater(asker(FakeBackend(complete=lambda text: next(texts)))).answer(requests(2))
    assert [type(a).__name__ for a in answers] == ["Rating", "Unparsed"]
    (text,) = Writer(asker(FakeBackend(complete=lambda text: "it is quiet")), max_tokens=2).answer(requests(1))
    assert isinstance(text, Text)
    assert text.text == "it is"


def test_progress_counts_every_request() -> None:
    done: list[int] = []
    LikelihoodRanker(asker(FakeBackend(), advance=done.append)).answer(requests(5))
    assert done == [2, 2, 1]


def test_prompt_hash_sees_every_part() -> None:
    def make(role: Any = "user", text: str = "x", given: str = "") -> str:
        return prompt_hash(
            Prompt(messages=(Message(role, (Segment("text", text),)),), answer_prefix=(Segment("item", given),))
        )

    assert len({make(), make(role="system"), make(text="y"), make(given="z")}) == 4
    assert make() == make()
