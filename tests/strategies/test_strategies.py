"""Ranking strategies: position bias, an ideal model, permutations, shuffles, corrections, and costs."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from llmrec.backends.encode import Encoder
from llmrec.backends.fake import FakeBackend, prompt_text
from llmrec.errors import LlmrecError, RecipeError
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.recipe.schema import EvalSection
from llmrec.strategies.asking import Prompting
from llmrec.strategies.counting import count_prompts
from llmrec.strategies.rounds import label_ranker, permutation_ranker, window_bounds
from llmrec.tasks.family import family_of
from llmrec.types import Prompt, Ranking, Request
from tests.conftest import make_tokenizer
from tests.facts import Facts, raises
from tests.strategies.strategy_cases import (
    DIRECT,
    SCORED,
    TITLED,
    Counting,
    cases,
    data,
    knowing,
    listed,
    pick_first,
    strategy,
    task,
    title,
)

PROTOCOL = EvalProtocol(split="made", candidates="made-20", cutoffs=(10,), resamples=200, seed=0, catalogue=60)
CHANCE = sum(1 / math.log2(1 + rank) for rank in range(1, 11)) / 20


def ranking(predictor: Any, request: Request) -> Ranking:
    (answer,) = predictor.answer([request])
    assert isinstance(answer, Ranking)
    return answer


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in DIRECT), ("pairwise", {"all_pairs": 0})])
def test_model_that_prefers_first_label_scores_at_random(name: str, options: dict[str, Any]) -> None:
    requests = cases(12 if name == "pairwise" else 60)
    predictor, kind = strategy(name, pick_first(), **options), family_of("direct").answer
    result = evaluate(predictor, requests, name="direct", kind=kind, protocol=PROTOCOL)
    values = result.values["NDCG@10"]
    assert result.figures.parse_rate == 1.0
    assert name != "window" or result.figures.cost.forwards == 4 * 60
    assert abs(values.mean() - CHANCE) <= 2.6 * values.std() / math.sqrt(len(values)) + 1e-9


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("label", "list", "permutation", "window", "setwise", *TITLED)),
        ("permutation", {"depth": 1}),
        ("setwise", {"set_size": 2, "depth": 20}),
        ("window", {"window": 5, "window_step": 4, "permutations": 3}),
    ],
)
def test_item_preferred_by_model_is_first(name: str, options: dict[str, Any]) -> None:
    for case in cases(3):
        truth = title(str(case.truth))
        # Without history the model prefers no title, so that the prior changes nothing.
        backend = knowing(lambda text, truth=truth: 5.0 if text == truth else -5.0)  # type: ignore[misc]
        if name == "likelihood-prior":
            backend = FakeBackend(
                prefer=lambda text, candidate, truth=truth: (  # type: ignore[misc]
                    -1.0 if candidate == truth and "Film #" in text else -9.0
                )
            )
        answer = ranking(strategy(name, backend, **options), case.request)
        assert answer.items[0] == case.truth and answer.scores[0] > answer.scores[1]


@pytest.mark.parametrize("name", ["window", "pairwise", "setwise", "pointwise-yes", "permutation"])
def test_full_depth_gives_models_order(name: str) -> None:
    worth = {title(f"i{n:02d}"): float(rank) for rank, n in enumerate(random.Random(3).sample(range(60), 60))}
    options: dict[str, Any] = {
        "window": {"window": 20, "window_step": 19},
        "setwise": {"depth": 20},
        "permutation": {"depth": 20},
    }.get(name, {})
    for case in cases(3):
        answer = ranking(strategy(name, knowing(worth.__getitem__), **options), case.request)
        best = sorted(case.request.candidates or (), key=lambda item: -worth[title(item)])
        assert list(answer.items) == best
        if name in ("pairwise", "setwise"):
            # A smaller depth decides only the first positions.
            fewer = {"depth": 4} | ({"all_pairs": 0} if name == "pairwise" else {})
            answer = ranking(strategy(name, knowing(worth.__getitem__), **fewer), case.request)
            assert list(answer.items[:4]) == best[:4]
            assert set(answer.scores[4:]) == {0.0} and len(set(answer.scores[:4])) == 4


@given(
    name=st.sampled_from(SCORED),
    size=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    depth=st.integers(1, 15),
    permutations=st.integers(1, 3),
)
def test_answer_is_permutation_of_candidates(name: str, size: int, seed: int, depth: int, permutations: int) -> None:
    (case,) = cases(1, size, seed)
    options: dict[str, Any] = {"depth": depth} if name in ("permutation", "setwise", "pairwise") else {}
    if name not in ("pairwise", "pointwise-yes"):
        options["permutations"] = permutations
    answer = ranking(strategy(name, FakeBackend(), **options), case.request)
    assert sorted(answer.items) == sorted(case.request.candidates or ())
    assert list(answer.scores) == sorted(answer.scores, reverse=True)
    assert all(math.isfinite(score) for score in answer.scores)
    if name == "permutation":
        assert len(set(answer.scores[: min(depth, size - 1)])) == min(depth, size - 1)


def test_permutation_extends_prefix_label_by_label() -> None:
    seen: list[tuple[Prompt, tuple[str, ...]]] = []

    class Watching(FakeBackend):
        def score(self, prompts: Any, candidates: Any, *, closed: bool = True) -> Any:
            seen.extend((prompt, tuple(texts)) for prompt, texts in zip(prompts, candidates, strict=True))
            assert not closed
            return super().score(prompts, candidates, closed=closed)

    (case,) = cases(1, 6)
    answer = ranking(strategy("permutation", Watching(), depth=4), case.request)
    labels = dict(zip(case.request.candidates or (), "ABCDEF", strict=True))
    written = [labels[item] for item in answer.items]
    encoder = Encoder(make_tokenizer(), max_length=4096)
    before: list[int] = []
    for step, (prompt, texts) in enumerate(seen):
        prefix = "".join(segment.text for segment in prompt.answer_prefix)
        assert prefix == (", ".join(written[:step]) + "," if step else "")
        assert [text.strip() for text in texts] == [label for label in "ABCDEF" if label not in written[:step]]
        assert all(text.startswith(" ") == bool(step) for text in texts)
        assert "Order all labels" in prompt.messages[-1].text
        ids = encoder.prompt(prompt)
        assert ids[: len(before)] == before and len(ids) > len(before)
        before = ids
    assert len(seen) == 4


@pytest.mark.parametrize("name", SCORED)
def test_answers_do_not_depend_on_batch(name: str) -> None:
    requests = [case.request for case in cases(7, 7)]
    one, many = (strategy(name, FakeBackend(), batch=batch).answer(requests) for batch in (1, 5))
    assert one == many
    assert strategy(name, FakeBackend()).answer(requests[::-1])[::-1] == one


@pytest.mark.parametrize("name", ["window", "setwise"])
def test_displayed_order_does_not_depend_on_earlier_answers(name: str) -> None:
    shown: dict[frozenset[str], set[tuple[str, ...]]] = {}

    def backend(sign: int) -> FakeBackend:
        def prefer(text: str, candidate: str) -> float:
            titles = tuple(listed(text).values())
            shown.setdefault(frozenset(titles), set()).add(titles)
            return sign * float(hash(listed(text)[candidate]) % 97)

        return FakeBackend(prefer=prefer)

    for case in cases(5):
        for sign in (1, -1):
            strategy(name, backend(sign)).answer([case.request])
        assert all(len(orders) == 1 for orders in shown.values())
        shown.clear()


def biased(quality: dict[str, float], worth: list[float]) -> FakeBackend:
    """A model that adds a bias for each position to an item's quality."""

    def prefer(text: str, candidate: str) -> float:
        shown = listed(text)
        return quality[shown[candidate.strip()]] + worth[list(shown).index(candidate.strip())]

    return FakeBackend(prefer=prefer)


def planted() -> tuple[dict[str, float], list[float]]:
    rng = random.Random(11)
    quality = {title(f"i{n:02d}"): rng.gauss(0, 1) for n in range(60)}
    return quality, [6.0 * rng.random() - 3.0 * (position / 19) for position in range(20)]


def test_averaging_over_orders_reduces_variance_of_biased_model() -> None:
    backend = biased(*planted())
    (case,) = cases(1)
    spreads = []
    for permutations in (1, 8):
        predictor = strategy("label", backend, permutations=permutations)
        ranks = []
        for seed in range(10):
            pool = list(case.request.candidates or ())
            random.Random(seed).shuffle(pool)
            answer = ranking(predictor, replace(case.request, candidates=tuple(pool)))
            ranks.append([answer.items.index(item) for item in case.request.candidates or ()])
        spreads.append(np.var(np.array(ranks), axis=0).mean())
    assert spreads[1] < 0.5 * spreads[0]


@pytest.mark.parametrize("name", ["label", "setwise", "permutation"])
def test_correction_removes_planted_bias(name: str) -> None:
    quality, worth = planted()
    # Questions have 10 candidates, as in the stored sets.
    requests, training = [case.request for case in cases(15, 10)], task("direct").questions(400)
    options: dict[str, Any] = {"depth": 10} if name in ("permutation", "setwise") else {}
    agreement = []
    for questions in ((), training):
        answers = strategy(name, biased(quality, worth), training=questions, **options).answer(requests)
        agreement.append(
            np.mean([spearmanr([quality[title(i)] for i in a.items], range(10, 0, -1)).statistic for a in answers])
        )
    assert agreement[1] > 0.9 and agreement[1] > agreement[0] + 0.2


def test_correction_questions_use_only_training_events() -> None:
    held = data().held_out
    questions = task("direct").questions(120)
    assert len(questions) == 120 and len({question.id for question in questions}) == 120
    for question in questions:
        trained = [event.item_id for event in data().train_events(question.user_id)]
        assert [event.item_id for event in question.history] == trained[: len(question.history)]
        # Held-out events are neither shown nor the answer; they may be negatives (tests/tasks).
        assert not {(question.user_id, event.item_id) for event in question.history} & held
        (chosen,) = set(question.candidates or ()) & set(trained)
        assert (question.user_id, chosen) not in held
        assert trained[len(question.history)] in (question.candidates or ())
    firsts = [(q.candidates or ()).index(data().train_events(q.user_id)[len(q.history)].item_id) for q in questions]
    assert len(set(firsts)) == 10
    assert task("direct").questions(5) == questions[:5]


def test_rejects_correction_with_too_few_candidates() -> None:
    (case,) = cases(1, 20)
    with raises(LlmrecError, Facts("too-few", column="eval.debias", says=("20 candidates", "eval.candidates.count"))):
        strategy("label", FakeBackend(), training=task("direct").questions(4)).answer([case.request])


def test_prior_removes_popularity_of_title() -> None:
    loud, taste = title("i07"), {title(f"i{n:02d}"): -float(n) for n in range(60)}

    def prefer(text: str, candidate: str) -> float:
        return (50.0 if candidate == loud else 0.0) + (taste[candidate] if "Film #" in text else 0.0) - 100.0

    request = Request(id="r", user_id="s", history=cases(1)[0].request.history, candidates=("i20", "i07", "i03"))
    backend = FakeBackend(prefer=prefer)
    assert ranking(strategy("likelihood", backend), request).items == ("i07", "i03", "i20")
    plain = ranking(strategy("likelihood-prior", backend), request)
    assert plain.items == ("i03", "i07", "i20") and plain.scores == (-3.0, -7.0, -20.0)
    half = ranking(strategy("likelihood-prior", backend, prior_weight=0.5), request)
    assert half.items == ("i07", "i03", "i20")
    none = ranking(strategy("likelihood-prior", backend, prior_weight=0.0), request)
    assert none.scores == ranking(strategy("likelihood", backend), request).scores


def test_prior_is_computed_once_per_title_without_user() -> None:
    prompts: list[tuple[str, tuple[str, ...]]] = []

    class Watching(FakeBackend):
        def score(self, batch: Any, candidates: Any, *, closed: bool = True) -> Any:
            prompts.extend((prompt_text(p), tuple(texts)) for p, texts in zip(batch, candidates, strict=True))
            return super().score(batch, candidates, closed=closed)

    requests = [case.request for case in cases(30)]
    strategy("likelihood-prior", Watching(), batch=7).answer(requests)
    bare = [(text, texts) for text, texts in prompts if "Film #" not in text]
    assert len({text for text, _ in bare}) == 1 and not any(f"s{n}" in bare[0][0].split() for n in range(30))
    titles = [title for _, texts in bare for title in texts]
    assert len(titles) == len(set(titles)) == len({item for request in requests for item in request.candidates or ()})


def test_pointwise_yes_scores_each_candidate_with_all_spellings() -> None:
    seen: list[str] = []

    def prefer(text: str, candidate: str) -> float:
        seen.append(text)
        (shown,) = listed(text).values()
        # Only lower-case spellings differ: a strategy that reads "Yes" alone would rank at random.
        return {"yes": -1.0 if shown == title("i03") else -4.0, "no": -2.0}.get(candidate, -30.0)

    request = Request(id="r", user_id="s", candidates=("i20", "i03", "i07"))
    answer = ranking(strategy("pointwise-yes", FakeBackend(prefer=prefer)), request)
    assert answer.items == ("i03", "i20", "i07")
    assert answer.scores == pytest.approx((1.0, -2.0, -2.0), abs=1e-9)
    assert all("Answer Yes or No." in text for text in seen)


def test_rejects_template_without_yes() -> None:
    direct = task("direct")
    chosen = direct._chosen.every["after-history"]
    plain = replace(chosen, user=chosen.user.split("{% if want")[0] + "Which one?")
    blind = type(direct).__new__(type(direct))
    blind.__dict__.update(direct.__dict__, _asks_yes=set())
    blind._chosen = replace(direct._chosen, every={**direct._chosen.every, "after-history": plain})
    one = Request(id="r", user_id="s", candidates=("i20",))
    with raises(
        RecipeError, Facts("unsupported", "direct/after-history", says=("'pointwise-yes'", '{% if want == "yes" %}'))
    ):
        blind.prompt(one, template="after-history", want="yes")
    with raises(LlmrecError, Facts("bad-value", column="candidates", says="the request has 2")):
        direct.prompt(replace(one, candidates=("i20", "i21")), template="after-history", want="yes")


def test_yes_examples_alternate() -> None:
    request = Request(id="r", user_id="s", candidates=("i20",))
    prompt = task("direct").prompt(request, template="after-history", shots=4, want="yes")
    assert [m.text for m in prompt.messages if m.role == "assistant"] == ["Yes", "No", "Yes", "No"]
    questions = [m.text for m in prompt.messages if m.role == "user"]
    assert all(len(listed(text)) == 1 for text in questions)


@pytest.mark.parametrize("name", ["label", "permutation", "window", "pairwise", "pointwise-yes"])
def test_examples_have_as_many_candidates_as_question(name: str) -> None:
    seen: list[Prompt] = []

    class Watching(FakeBackend):
        def score(self, prompts: Any, candidates: Any, *, closed: bool = True) -> Any:
            seen.extend(prompts)
            return super().score(prompts, candidates, closed=closed)

    predictor = strategy(name, Watching(), shots=2)
    (case,) = cases(1, 9)
    predictor.answer([case.request])
    assert predictor.first_prompt(case.request) == seen[0]
    for prompt in seen:
        users = [message.text for message in prompt.messages if message.role == "user"]
        assert len(users) == 3 and len({len(listed(text)) for text in users}) == 1


@pytest.mark.parametrize("name", [*SCORED, *TITLED])
def test_rejects_request_without_candidates(name: str) -> None:
    with raises(LlmrecError, Facts("missing-value", column="candidates")):
        strategy(name, FakeBackend()).answer([Request(id="r", user_id="s")])


def test_rejects_meaningless_settings() -> None:
    for settings, says in (({"window": 4, "window_step": 4}, "do not overlap"), ({"set_size": 1}, "set_size")):
        with pytest.raises(ValueError, match=says):
            EvalSection(**settings)  # type: ignore[arg-type]


def test_prompt_hash_covers_all_prompts() -> None:
    (case,) = cases(1, 5)
    asker = Prompting(backend=FakeBackend(), task=task("direct"), template="after-history")
    rankers = (*(label_ranker(asker, permutations=n) for n in (1, 2, 3)), permutation_ranker(asker, depth=1))
    hashes = {ranking(predictor, case.request).prompt_hash for predictor in rankers}
    assert len(hashes) == 4 and None not in hashes


def test_questions_are_scored_in_large_batches() -> None:
    backend = Counting()
    strategy("pairwise", backend, batch=3).answer([case.request for case in cases(3, 20)])
    assert sum(backend.calls) == 3 * 380 and len(backend.calls) == 3
    backend = Counting()
    strategy("window", backend, batch=16).answer([case.request for case in cases(16)])
    assert backend.calls == [16] * 4


# Twenty candidates with the recipe's defaults, or with the given keys.
FORWARDS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("likelihood", {}, 1),
    ("label", {"permutations": 3}, 3),
    ("permutation", {}, 10),
    ("permutation", {"depth": 40}, 19),
    ("permutation", {"depth": 4, "permutations": 2}, 8),
    ("window", {}, 4),
    ("window", {"window": 6, "window_step": 4, "permutations": 2}, 10),
    ("window", {"window": 30}, 1),
    ("pairwise", {"all_pairs": 19}, 290),
    ("pairwise", {"all_pairs": 0, "depth": 1}, 38),
    ("pointwise-yes", {}, 20),
)


@pytest.mark.parametrize(("name", "options", "forwards"), FORWARDS)
def test_forwards_and_tokens_of_a_request(name: str, options: dict[str, Any], forwards: int) -> None:
    backend = Counting()
    requests = [case.request for case in cases(2)]
    answers = strategy(name, backend, **options).answer(requests)
    assert [answer.cost.forwards for answer in answers] == [forwards] * 2
    assert sum(backend.calls) == 2 * forwards
    assert sum(answer.cost.prompt_tokens for answer in answers) == backend.read
    assert sum(answer.cost.completion_tokens for answer in answers) == backend.scored
    assert min(answer.cost.prompt_tokens for answer in answers) > 0
    if name != "likelihood":
        count = count_prompts(name, 20, EvalSection(**options))
        assert count is not None and count.prompts == forwards


def test_windows_by_formula() -> None:
    for n in range(1, 40):
        for w in range(2, 9):
            for s in range(1, w):
                bounds = list(window_bounds(n, w, s))
                assert len(bounds) == (0 if n == 1 else 1 if n <= w else -(-(n - w) // s) + 1)
                assert n == 1 or (bounds[-1][0] == 0 and bounds[0][1] == n)


@given(size=st.integers(1, 14), set_size=st.integers(2, 6), depth=st.integers(1, 16), seed=st.integers(0, 999))
def test_setwise_forwards_are_within_bounds(size: int, set_size: int, depth: int, seed: int) -> None:
    (case,) = cases(1, size, seed)
    backend = Counting()
    (answer,) = strategy("setwise", backend, set_size=set_size, depth=depth).answer([case.request])
    count = count_prompts("setwise", size, EvalSection(set_size=set_size, depth=depth))
    parents = -(-(size - 1) // (set_size - 1))
    # The last item is alone in the heap and needs no prompt.
    assert count is not None
    assert parents + max(0, min(depth, size - 1) - 1) <= answer.cost.forwards <= count.prompts
    assert answer.cost.forwards == sum(backend.calls)


@given(name=st.sampled_from([n for n in SCORED if n != "setwise"]), size=st.integers(1, 12), depth=st.integers(1, 14))
def test_forwards_equal_estimate(name: str, size: int, depth: int) -> None:
    (case,) = cases(1, size)
    section = EvalSection(depth=depth, all_pairs=6, permutations=1 + depth % 3, window=5, window_step=2)
    options = {
        "permutation": {"depth": depth, "permutations": section.permutations},
        "window": {"window": 5, "window_step": 2, "permutations": section.permutations},
        "pairwise": {"depth": depth, "all_pairs": 6},
        "label": {"permutations": section.permutations},
    }.get(name, {})
    (answer,) = strategy(name, FakeBackend(), **options).answer([case.request])
    count = count_prompts(name, size, section)
    assert count is not None and answer.cost.forwards == count.prompts


def test_shared_prompts_are_counted_once() -> None:
    requests = [case.request for case in cases(6)]
    backend = Counting()
    answers = strategy("likelihood-prior", backend, batch=3).answer(requests)
    titles = [len({i for r in part for i in r.candidates or ()}) for part in (requests[:3], requests)]
    # One slice of at most 64 titles for the new titles of each batch.
    assert [answer.cost.forwards for answer in answers] == [2, 1, 1, 2 if titles[1] > titles[0] else 1, 1, 1]
    assert sum(answer.cost.prompt_tokens for answer in answers) == backend.read
    backend = Counting()
    small = [case.request for case in cases(6, 10)]
    answers = strategy("label", backend, training=task("direct").questions(32)).answer(small)
    assert [answer.cost.forwards for answer in answers] == [33, 1, 1, 1, 1, 1]
    assert sum(answer.cost.completion_tokens for answer in answers) == backend.scored


def test_generated_list_costs_one_forward_per_token() -> None:
    (case,) = cases(1)
    (answer,) = strategy("list", pick_first()).answer([case.request])
    assert answer.cost.forwards == answer.cost.completion_tokens == 20
    (empty,) = strategy("list", FakeBackend(complete=lambda text: "")).answer([case.request])
    assert empty.cost.forwards == 1


def test_one_candidate_needs_no_comparison() -> None:
    one = Request(id="r", user_id="s", candidates=("i20",))
    for name, forwards in (("window", 0), ("setwise", 0), ("pairwise", 0), ("permutation", 0), ("label", 1)):
        (answer,) = strategy(name, FakeBackend()).answer([one])
        assert answer.cost.forwards == forwards and getattr(answer, "items", None) == ("i20",)
