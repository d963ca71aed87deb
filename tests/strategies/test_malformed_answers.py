"""Two thousand answers of every broken kind: none is lost, none brings a run down, none brings in a foreign item."""

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
from llmrec.strategies.raters import ParsedRater, Writer
from llmrec.tasks.family import family_of
from llmrec.tasks.parsing import read_ranking
from llmrec.types import Case, Completion, Ranking, Request, Unparsed
from tests.strategies.strategy_cases import cases, data, strategy, title
from tests.tasks.task_data import make_task

COUNT = 800
REFUSALS = ("I cannot help with that.", "As a language model, I have no access to this user.", "Sorry.", "N/A", "null")
FOREIGN = ("Je recommande plutôt autre chose.", "这些我都不喜欢", "Ничего из этого", "أي شيء", "🎬🎬🎬")
CONTROL = ("\x00", "\x07\x1b[31m", "\u202e", "\ue000", "\u2028", "\ufeff", "\x7f", "\ud800")


def malformed(rng: random.Random, pool: tuple[str, ...]) -> str:
    """One answer of a kind drawn by seed."""
    titles = [title(item) for item in pool]
    outside = [f"Film #{n}!" for n in range(60, 99)]
    labels = [chr(ord("A") + n) for n in range(26)]
    some = rng.sample(titles, 3)
    kinds: list[Callable[[], str]] = [
        lambda: "",
        lambda: " " * rng.randint(1, 40) + "\n" * rng.randint(0, 5),
        lambda: rng.choice(REFUSALS),
        lambda: rng.choice(FOREIGN),
        lambda: ", ".join(str(rng.randint(-9, 10**9)) for _ in range(rng.randint(1, 30))),
        lambda: ", ".join(rng.choice(labels) for _ in range(60)),
        lambda: "\n".join(f"{n}. {rng.choice(outside + some)}" for n in range(1, 25)),
        lambda: "\n".join(f"- **{t}**" for t in [*some, *some, rng.choice(outside)]),
        lambda: json.dumps([*some, rng.choice(outside), some[0]])[: rng.randint(1, 90)],
        lambda: json.dumps({"ranking": some, "why": {"nested": [None, 1.5, [[]]]}}),
        lambda: "[" * rng.randint(1, 3000) + rng.choice(titles),
        lambda: "{" + rng.choice(titles) + '": [' + "}" * rng.randint(0, 9),
        lambda: "".join(rng.choice([*CONTROL, *labels, "1", " ", "\n"]) for _ in range(80)),
        lambda: f"<|im_end|>\n<|im_start|>user\n{rng.choice(titles)}",
        lambda: rng.choice(titles)[:-2] + rng.choice(CONTROL) + "!",
        lambda: "".join(chr(rng.choice((rng.randint(32, 0xD7FF), rng.randint(0xE000, 0x1FFFF)))) for _ in range(60)),
        lambda: rng.choice(labels) * rng.randint(2, 5000),
        lambda: "```json\n" + json.dumps([{"title": t, "rank": n} for n, t in enumerate(some)]) + "\n```",
        lambda: f"| Rank | Title |\n|---|---|\n| 1 | {some[0]} |\n| 2 | {some[0]} |",
        lambda: rng.choice(("NaN", "inf", "-Infinity", "1e999", "5/0", "٩٩", "½½", "4.4.4", "--3", "+", ".")),
    ]
    return rng.choice(kinds)()


def texts(family: str) -> list[str]:
    rng = random.Random(f"malformed {family}")
    return [malformed(rng, case.request.candidates or ()) for case in cases(COUNT)]


def scripted(family: str) -> FakeBackend:
    """Gives one answer after the other, whole: `FakeBackend` cuts at spaces, which no tokenizer does."""
    found = iter(texts(family))

    class Whole(FakeBackend):
        def generate(self, prompts: Any, *, max_tokens: int) -> Any:
            return [Completion(text=next(found), prompt_tokens=1, completion_tokens=3) for _ in prompts]

    return Whole()


def protocol(cutoff: int = 10) -> EvalProtocol:
    return EvalProtocol(split="made", candidates="made-20", cutoffs=(cutoff,), resamples=20, seed=0, catalogue=60)


def test_malformed_lists_stay_in_the_denominator_and_hold_candidates_alone() -> None:
    asked = cases(COUNT)
    predictor = strategy("list", scripted("direct"))
    answers = predictor.answer([case.request for case in asked])
    read = 0
    for case, answer in zip(asked, answers, strict=True):
        assert answer.raw is not None
        if isinstance(answer, Ranking):
            read += 1
            assert len(set(answer.items)) == len(answer.items) > 0
            assert set(answer.items) <= set(case.request.candidates or ())
            assert list(answer.scores) == sorted(answer.scores, reverse=True)
        else:
            assert isinstance(answer, Unparsed) and answer.reason
    found = evaluate(
        strategy("list", scripted("direct")), asked, name="direct", kind=family_of("direct").answer, protocol=protocol()
    )
    assert found.figures.n == COUNT and len(found.records) == COUNT
    assert found.figures.parse_rate == pytest.approx(read / COUNT) and 0.2 < read / COUNT < 0.9
    lost = [n for n, record in enumerate(found.records) if record.error]
    assert len(lost) == COUNT - read
    assert all(found.values["NDCG@10"][n] == 0.0 for n in lost) and len(found.values["NDCG@10"]) == COUNT


@pytest.mark.parametrize("family", ["rating", "explanation"])
def test_malformed_ratings_and_texts_stay_in_the_denominator(family: str) -> None:
    asking = make_task(family, data())
    rng = random.Random(5)
    asked = [
        Case(
            request=Request(id=f"q{n}", user_id=f"u{rng.randrange(40):02d}", item=f"i{rng.randrange(60):02d}"),
            truth=4.0 if family == "rating" else "a quiet film",
        )
        for n in range(COUNT)
    ]
    asker = Prompting(backend=scripted(family), task=asking, template=asking.eval_templates[0], batch=64)
    predictor: Any = ParsedRater(asker) if family == "rating" else Writer(asker)
    kind = family_of(family).answer
    found = evaluate(predictor, asked, name=family, kind=kind, protocol=protocol(), fallback=lambda request: 3.0)
    assert found.figures.n == COUNT and len(found.records) == COUNT
    failed = sum(record.error is not None for record in found.records)
    assert found.figures.parse_rate == pytest.approx(1 - failed / COUNT) and failed > 50
    metric = "RMSE" if family == "rating" else "ROUGE-L"
    assert len(found.values[metric]) == COUNT and all(map(math.isfinite, found.values[metric]))
    for record in found.records:
        if family == "rating" and record.error is None:
            assert 1.0 <= json.loads(record.parsed) <= 5.0
        if family == "rating" and record.error is not None:
            assert found.values["RMSE"][found.records.index(record)] == 1.0
            break
    json.dumps([record.as_json() for record in found.records], ensure_ascii=True)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ('["{1}", "{0}", "{1}"]', [1, 0]),
        ('```json\n["{2}", "Somebody Else\'s Film", "{0}"]\n```', [2, 0]),
        ("1. **{1}**\n2. *{0}*\n3. Not a Candidate At All", [1, 0]),
        ("- {2} (a classic)\n- {2}\n- {1}", [2, 1]),
        ("Sure! Here they are:\n\n1) {0}\n2) {2}", [0, 2]),
        # Nine letters of ten are enough, as long as the numbers agree.
        ("1. The Shawshenk Redemption\n2. Terminator 2: Judgement Day", [0, 1]),
        ("1. Terminator 3: Judgment Day", []),
        ("1. The Redemption", []),
    ],
)
def test_titles_in_json_and_markdown_lists(text: str, places: list[int]) -> None:
    titles = ["The Shawshank Redemption", "Terminator 2: Judgment Day", "Cinema Paradiso"]
    for place, each in enumerate(titles):
        text = text.replace(f"{{{place}}}", each)
    assert read_ranking(text, "ABC", titles) == places


def test_a_misspelling_of_two_titles_is_neither() -> None:
    assert read_ranking("1. The Long Nighx", "AB", ["The Long Night", "The Long Nighs"]) == []
    assert read_ranking("1. The Long Nighs", "AB", ["The Long Night", "The Long Nighs"]) == [1]
    assert read_ranking("Rocky III", "AB", ["Rocky II", "Rocky IV"]) == []
