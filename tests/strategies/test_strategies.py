"""Every ranking strategy: chance under position bias, an oracle's pick first, permutations, shuffles, corrections."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from llmrec.backends.encode import Encoder
from llmrec.backends.fake import FakeBackend, text_of
from llmrec.errors import LlmrecError, RecipeError
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.recipe.schema import EvalSection
from llmrec.strategies.asking import Prompting
from llmrec.strategies.rounds import label_ranker, permutation_ranker
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


# ------------------------------------------------------------------ position bias and the oracle


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in DIRECT), ("pairwise", {"all_pairs": 0}), ("label", {"permutations": 3})],
)
def test_a_model_that_picks_the_first_label_scores_chance(name: str, options: dict[str, Any]) -> None:
    asked = cases(30 if name == "pairwise" else 100)
    found = evaluate(
        strategy(name, pick_first(), **options),
        asked,
        name="direct",
        kind=family_of("direct").answer,
        protocol=PROTOCOL,
    )
    values = found.values["NDCG@10"]
    assert found.figures.parse_rate == 1.0
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - CHANCE) <= 2.6 * error + 1e-9


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in (*DIRECT, *TITLED)),
        ("pairwise", {"all_pairs": 0}),
        ("permutation", {"depth": 1}),
        ("setwise", {"set_size": 2, "depth": 20}),
        ("window", {"window": 5, "window_step": 4, "permutations": 3}),
    ],
)
def test_what_an_oracle_likes_comes_first(name: str, options: dict[str, Any]) -> None:
    for case in cases(6):
        truth = title(str(case.truth))
        # Without a history in the prompt the oracle knows nothing, so that a prior takes nothing from it.
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
def test_a_model_with_a_taste_is_followed_all_the_way(name: str) -> None:
    """With a depth as long as the list, every place is what the model would have there."""
    worth = {title(f"i{n:02d}"): float(rank) for rank, n in enumerate(random.Random(3).sample(range(60), 60))}
    options: dict[str, Any] = {
        "window": {"window": 20, "window_step": 19},
        "setwise": {"depth": 20},
        "permutation": {"depth": 20},
    }.get(name, {})
    for case in cases(5):
        answer = ranking(strategy(name, knowing(worth.__getitem__), **options), case.request)
        assert list(answer.items) == sorted(case.request.candidates or (), key=lambda item: -worth[title(item)])


def test_passes_over_neighbours_decide_the_places_that_they_are_asked_for() -> None:
    worth = {title(f"i{n:02d}"): float(rank) for rank, n in enumerate(random.Random(4).sample(range(60), 60))}
    for case in cases(5):
        best = sorted(case.request.candidates or (), key=lambda item: -worth[title(item)])
        for name in ("pairwise", "setwise"):
            options = {"all_pairs": 0} if name == "pairwise" else {}
            answer = ranking(strategy(name, knowing(worth.__getitem__), depth=4, **options), case.request)
            assert list(answer.items[:4]) == best[:4]
            assert set(answer.scores[4:]) == {0.0} and len(set(answer.scores[:4])) == 4


# ------------------------------------------------------------------ permutations


@given(
    name=st.sampled_from(SCORED),
    size=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    depth=st.integers(1, 15),
    permutations=st.integers(1, 3),
)
def test_an_answer_is_a_permutation_of_the_candidates(
    name: str, size: int, seed: int, depth: int, permutations: int
) -> None:
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


def test_a_permutation_is_written_label_by_label_behind_a_prefix_that_only_grows() -> None:
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
        given_part = "".join(segment.text for segment in prompt.answer_prefix)
        assert given_part == (", ".join(written[:step]) + "," if step else "")
        assert [text.strip() for text in texts] == [label for label in "ABCDEF" if label not in written[:step]]
        assert all(text.startswith(" ") == bool(step) for text in texts)
        assert "Order all labels" in prompt.messages[-1].text
        ids = encoder.prompt(prompt)
        assert ids[: len(before)] == before and len(ids) > len(before)
        before = ids
    assert len(seen) == 4


# ------------------------------------------------------------------ order, batches, shuffles


@pytest.mark.parametrize("name", SCORED)
def test_requests_of_a_batch_do_not_touch_each_other(name: str) -> None:
    asked = [case.request for case in cases(7, 9)]
    one, many = (strategy(name, FakeBackend(), batch=batch).answer(asked) for batch in (1, 5))
    assert one == many
    assert strategy(name, FakeBackend()).answer(asked[::-1])[::-1] == one


@pytest.mark.parametrize("name", TITLED)
def test_likelihoods_do_not_depend_on_the_order_of_candidates(name: str, llama_folder: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmrec.backends.hf.backend import HFBackend

    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    backend = HFBackend(model, Encoder(AutoTokenizer.from_pretrained(llama_folder), max_length=4096))
    (case,) = cases(1, 8)
    first = ranking(strategy(name, backend), case.request)
    for seed in range(3):
        pool = list(case.request.candidates or ())
        random.Random(seed).shuffle(pool)
        other = ranking(strategy(name, backend), replace(case.request, candidates=tuple(pool)))
        assert other.items == first.items
        assert other.scores == pytest.approx(first.scores, abs=1e-3)


@pytest.mark.parametrize("name", ["window", "setwise"])
def test_where_an_item_stood_does_not_show_in_the_next_question(name: str) -> None:
    """What a set of items is shown as depends on the set alone, not on the order that was found so far."""
    shown: dict[frozenset[str], set[tuple[str, ...]]] = {}

    def backend(sign: int) -> FakeBackend:
        def prefer(text: str, candidate: str) -> float:
            titles = tuple(listed(text).values())
            shown.setdefault(frozenset(titles), set()).add(titles)
            return sign * float(hash(listed(text)[candidate]) % 97)

        return FakeBackend(prefer=prefer)

    for case in cases(10):
        for sign in (1, -1):
            strategy(name, backend(sign)).answer([case.request])
        assert all(len(orders) == 1 for orders in shown.values())
        shown.clear()


def biased(quality: dict[str, float], worth: list[float]) -> FakeBackend:
    """Adds what a position is worth to what stands there."""

    def prefer(text: str, candidate: str) -> float:
        shown = listed(text)
        return quality[shown[candidate.strip()]] + worth[list(shown).index(candidate.strip())]

    return FakeBackend(prefer=prefer)


def planted() -> tuple[dict[str, float], list[float]]:
    rng = random.Random(11)
    quality = {title(f"i{n:02d}"): rng.gauss(0, 1) for n in range(60)}
    return quality, [6.0 * rng.random() - 3.0 * (place / 19) for place in range(20)]


@pytest.mark.parametrize("name", ["label", "permutation", "window", "setwise"])
def test_averaging_over_orders_steadies_the_ranks_of_a_biased_model(name: str) -> None:
    backend = biased(*planted())
    (case,) = cases(1)
    spreads = []
    for permutations in (1, 8):
        predictor = strategy(name, backend, permutations=permutations)
        ranks = []
        for seed in range(16):
            pool = list(case.request.candidates or ())
            random.Random(seed).shuffle(pool)
            answer = ranking(predictor, replace(case.request, candidates=tuple(pool)))
            ranks.append([answer.items.index(item) for item in case.request.candidates or ()])
        spreads.append(np.var(np.array(ranks), axis=0).mean())
    # One pass of a window leaves the end of the list much as it came, whatever the model is.
    assert spreads[1] < (0.8 if name == "window" else 0.5) * spreads[0]


@pytest.mark.parametrize("name", ["label", "window", "setwise", "permutation"])
def test_the_measured_correction_takes_a_planted_bias_away(name: str) -> None:
    quality, worth = planted()
    training = task("direct").questions(400)
    # Questions of 10 candidates as the stored sets have them: so are those that are asked here.
    asked = [case.request for case in cases(30, 10)]
    agreement = []
    for questions in ((), training):
        options: dict[str, Any] = {"depth": 10} if name in ("permutation", "setwise") else {}
        answers = strategy(name, biased(quality, worth), training=questions, **options).answer(asked)
        agreement.append(
            np.mean([spearmanr([quality[title(i)] for i in a.items], range(10, 0, -1)).statistic for a in answers])
        )
    assert agreement[1] > 0.9 and agreement[1] > agreement[0] + 0.2


def test_questions_for_the_correction_ask_about_training_events_alone() -> None:
    held = data().held_out
    questions = task("direct").questions(120)
    assert len(questions) == 120 and len({question.id for question in questions}) == 120
    for question in questions:
        trained = [event.item_id for event in data().train_events(question.user_id)]
        assert [event.item_id for event in question.history] == trained[: len(question.history)]
        # What is held out is neither shown nor the answer; it may be a drawn negative (tests/tasks).
        assert not {(question.user_id, event.item_id) for event in question.history} & held
        (chosen,) = set(question.candidates or ()) & set(trained)
        assert (question.user_id, chosen) not in held
        assert trained[len(question.history)] in (question.candidates or ())
    firsts = [(q.candidates or ()).index(data().train_events(q.user_id)[len(q.history)].item_id) for q in questions]
    assert len(set(firsts)) == 10
    assert task("direct").questions(5) == questions[:5]


def test_a_correction_needs_questions_as_large_as_the_requests() -> None:
    (case,) = cases(1, 20)
    with raises(LlmrecError, Facts("too-few", column="eval.debias", says=("20 candidates", "eval.candidates.count"))):
        strategy("label", FakeBackend(), training=task("direct").questions(4)).answer([case.request])


# ------------------------------------------------------------------ priors, yes, few shots


def test_a_prior_takes_away_what_a_title_is_worth_to_anybody() -> None:
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


def test_a_prior_is_asked_once_a_title_and_shows_no_user() -> None:
    prompts: list[tuple[str, tuple[str, ...]]] = []

    class Watching(FakeBackend):
        def score(self, asked: Any, candidates: Any, *, closed: bool = True) -> Any:
            prompts.extend((text_of(p), tuple(texts)) for p, texts in zip(asked, candidates, strict=True))
            return super().score(asked, candidates, closed=closed)

    asked = [case.request for case in cases(30)]
    strategy("likelihood-prior", Watching(), batch=7).answer(asked)
    bare = [(text, texts) for text, texts in prompts if "Film #" not in text]
    assert len({text for text, _ in bare}) == 1 and not any(f"s{n}" in bare[0][0].split() for n in range(30))
    once = [title for _, texts in bare for title in texts]
    assert len(once) == len(set(once)) == len({item for request in asked for item in request.candidates or ()})


def test_yes_is_asked_of_each_candidate_alone_and_all_spellings_count() -> None:
    seen: list[str] = []

    def prefer(text: str, candidate: str) -> float:
        seen.append(text)
        (shown,) = listed(text).values()
        # Only the small spellings tell: a strategy that reads "Yes" alone would rank at random.
        return {"yes": -1.0 if shown == title("i03") else -4.0, "no": -2.0}.get(candidate, -30.0)

    request = Request(id="r", user_id="s", candidates=("i20", "i03", "i07"))
    answer = ranking(strategy("pointwise-yes", FakeBackend(prefer=prefer)), request)
    assert answer.items == ("i03", "i20", "i07")
    assert answer.scores == pytest.approx((1.0, -2.0, -2.0), abs=1e-9)
    assert all("Answer Yes or No." in text for text in seen)


def test_templates_without_words_for_yes_are_refused() -> None:
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


def test_examples_before_a_yes_answer_yes_and_no_in_turn() -> None:
    request = Request(id="r", user_id="s", candidates=("i20",))
    prompt = task("direct").prompt(request, template="after-history", shots=4, want="yes")
    assert [m.text for m in prompt.messages if m.role == "assistant"] == ["Yes", "No", "Yes", "No"]
    questions = [m.text for m in prompt.messages if m.role == "user"]
    assert all(len(listed(text)) == 1 for text in questions)


@pytest.mark.parametrize("name", SCORED)
def test_examples_show_as_many_candidates_as_the_question(name: str) -> None:
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


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", [*SCORED, *TITLED])
def test_a_request_without_candidates_is_refused(name: str) -> None:
    with raises(LlmrecError, Facts("missing-value", column="candidates")):
        strategy(name, FakeBackend()).answer([Request(id="r", user_id="s")])


def test_recipes_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="do not overlap"):
        EvalSection(window=4, window_step=4)
    with pytest.raises(ValueError, match="window"):
        EvalSection(window=1)
    with pytest.raises(ValueError, match="set_size"):
        EvalSection(set_size=1)


def test_the_hash_of_several_prompts_sees_each_of_them() -> None:
    (case,) = cases(1, 5)
    asker = Prompting(backend=FakeBackend(), task=task("direct"), template="after-history")
    hashes = {
        ranking(predictor, case.request).prompt_hash
        for predictor in (
            label_ranker(asker),
            label_ranker(asker, permutations=2),
            label_ranker(asker, permutations=3),
            permutation_ranker(asker, depth=1),
        )
    }
    assert len(hashes) == 4 and None not in hashes


def test_many_questions_reach_the_backend_in_large_calls() -> None:
    backend = Counting()
    strategy("pairwise", backend, batch=4).answer([case.request for case in cases(4, 20)])
    assert sum(backend.calls) == 4 * 380 and len(backend.calls) == 3
    backend = Counting()
    strategy("window", backend, batch=16).answer([case.request for case in cases(16)])
    assert backend.calls == [16] * 4
