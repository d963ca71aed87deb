"""Malformed answers of every kind: none is lost, ends a run, or adds an item that is not a candidate."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from llmrec.backends.fake import FakeBackend
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.strategies.asking import Prompting
from llmrec.strategies.raters import ParsedRater, TextGenerator
from llmrec.tasks.family import family_of
from llmrec.tasks.parsing import parse_ranking
from llmrec.types import Case, Completion, Ranking, Request, Unparsed
from tests.strategies.strategy_cases import cases, data, strategy, title
from tests.tasks.task_data import make_task

COUNT = 400
REFUSALS = ("I cannot help with that.", "As a language model, I have no access to this user.", "Sorry.", "N/A", "null")
FOREIGN = ("Je recommande plutôt autre chose.", "这些我都不喜欢", "Ничего из этого", "أي شيء", "🎬🎬🎬")
CONTROL = ("\x00", "\x07\x1b[31m", "\u202e", "\ue000", "\u2028", "\ufeff", "\x7f", "\ud800")


def malformed(rng: random.Random, pool: tuple[str, ...]) -> str:
    """Return an answer of a random kind."""
    titles = [title(item) for item in pool]
    outside = [f"Film #{n}!" for n in range(60, 99)]
    labels = [chr(ord("A") + n) for n in range(26)]
    some = rng.sample(titles, 3)
    kinds: list[Callable[[], str]] = [
        lambda: "",
        lambda: rng.choice(REFUSALS),
        lambda: rng.choice(FOREIGN),
        lambda: ", ".join(str(rng.randint(-9, 10**9)) for _ in range(rng.randint(1, 30))),
        lambda: "\n".join(f"{n}. {rng.choice(outside + some)}" for n in range(1, 25)),
        lambda: json.dumps([*some, rng.choice(outside), some[0]])[: rng.randint(1, 90)],
        lambda: "[" * rng.randint(1, 3000) + rng.choice(titles),
        lambda: "".join(rng.choice([*CONTROL, *labels, "1", " ", "\n"]) for _ in range(80)),
        lambda: f"<|im_end|>\n<|im_start|>user\n{rng.choice(titles)}",
        lambda: rng.choice(titles)[:-2] + rng.choice(CONTROL) + "!",
        lambda: "".join(chr(rng.choice((rng.randint(32, 0xD7FF), rng.randint(0xE000, 0x1FFFF)))) for _ in range(60)),
        lambda: rng.choice(labels) * rng.randint(2, 5000),
        lambda: "```json\n" + json.dumps([{"title": t, "rank": n} for n, t in enumerate(some)]) + "\n```",
        lambda: rng.choice(("NaN", "inf", "-Infinity", "1e999", "5/0", "٩٩", "½½", "4.4.4", "--3", "+", ".")),
    ]
    return rng.choice(kinds)()


def texts(family: str) -> list[str]:
    rng = random.Random(f"malformed {family}")
    return [malformed(rng, case.request.candidates or ()) for case in cases(COUNT)]


def scripted(family: str) -> FakeBackend:
    """Return a backend that gives the answers in order and in full; `FakeBackend` would cut them at spaces."""
    answers = iter(texts(family))

    class Uncut(FakeBackend):
        def generate(self, prompts: Any, *, max_tokens: int) -> Any:
            return [Completion(text=next(answers), prompt_tokens=1, completion_tokens=3) for _ in prompts]

    return Uncut()


PROTOCOL = EvalProtocol(split="made", candidates="made-20", cutoffs=(10,), resamples=20, seed=0, catalogue=60)


def test_malformed_lists_count_as_failures_and_contain_only_candidates() -> None:
    requests = cases(COUNT)
    answers = strategy("list", scripted("direct")).answer([case.request for case in requests])
    parsed = 0
    for case, answer in zip(requests, answers, strict=True):
        assert answer.raw is not None
        if isinstance(answer, Ranking):
            parsed += 1
            assert len(set(answer.items)) == len(answer.items) > 0
            assert set(answer.items) <= set(case.request.candidates or ())
            assert list(answer.scores) == sorted(answer.scores, reverse=True)
        else:
            assert isinstance(answer, Unparsed) and answer.reason
    predictor = strategy("list", scripted("direct"))
    result = evaluate(predictor, requests, name="direct", kind=family_of("direct").answer, protocol=PROTOCOL)
    assert result.figures.n == len(result.records) == len(result.values["NDCG@10"]) == COUNT
    assert result.figures.parse_rate == pytest.approx(parsed / COUNT) and 0.2 < parsed / COUNT < 0.9
    lost = [n for n, record in enumerate(result.records) if record.error]
    assert len(lost) == COUNT - parsed
    assert all(result.values["NDCG@10"][n] == 0.0 for n in lost)


@pytest.mark.parametrize("family", ["rating", "explanation"])
def test_malformed_ratings_and_texts_count_as_failures(family: str) -> None:
    task, rng, rated = make_task(family, data()), random.Random(5), family == "rating"
    requests = [
        Case(
            request=Request(id=f"q{n}", user_id=f"u{rng.randrange(40):02d}", item=f"i{rng.randrange(60):02d}"),
            truth=4.0 if rated else "a quiet film",
        )
        for n in range(COUNT)
    ]
    asker = Prompting(backend=scripted(family), task=task, template=task.eval_templates[0], batch=64)
    predictor: Any = ParsedRater(asker) if rated else TextGenerator(asker)
    kind = family_of(family).answer
    result = evaluate(predictor, requests, name=family, kind=kind, protocol=PROTOCOL, fallback=lambda request: 3.0)
    assert result.figures.n == COUNT and len(result.records) == COUNT
    failed = [n for n, record in enumerate(result.records) if record.error is not None]
    assert result.figures.parse_rate == pytest.approx(1 - len(failed) / COUNT) and len(failed) > 25
    values = result.values["RMSE" if rated else "ROUGE-L"]
    assert len(values) == COUNT and all(map(math.isfinite, values))
    if rated:
        assert all(values[n] == 1.0 for n in failed)
        assert all(1.0 <= json.loads(record.parsed) <= 5.0 for record in result.records if record.error is None)
    json.dumps([record.as_json() for record in result.records], ensure_ascii=True)


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ('["{1}", "{0}", "{1}"]', [1, 0]),
        ('```json\n["{2}", "Another Film", "{0}"]\n```', [2, 0]),
        ("1. **{1}**\n2. *{0}*\n3. Not a Candidate At All", [1, 0]),
        ("Sure! Here they are:\n\n- {2} (a classic)\n- {2}\n- {1}", [2, 1]),
        # Nine of ten letters must match, and all numbers.
        ("1. The Shawshenk Redemption\n2. Terminator 2: Judgement Day", [0, 1]),
        ("1. Terminator 3: Judgment Day\n2. The Redemption", []),
    ],
)
def test_titles_in_json_and_markdown_lists(text: str, indices: list[int]) -> None:
    titles = ["The Shawshank Redemption", "Terminator 2: Judgment Day", "Cinema Paradiso"]
    for n, each in enumerate(titles):
        text = text.replace(f"{{{n}}}", each)
    assert parse_ranking(text, "ABC", titles) == indices


def test_ambiguous_misspelling_matches_no_title() -> None:
    assert parse_ranking("1. The Long Nighx", "AB", ["The Long Night", "The Long Nighs"]) == []
    assert parse_ranking("1. The Long Nighs", "AB", ["The Long Night", "The Long Nighs"]) == [1]
    assert parse_ranking("Rocky III", "AB", ["Rocky II", "Rocky IV"]) == []
