"""What each strategy costs a request: forwards by formula, tokens summed over all that was asked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.fake import FakeBackend
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.recipe.schema import EvalSection
from llmrec.strategies.counting import questions_of
from llmrec.strategies.rounds import window_bounds
from llmrec.tasks.family import family_of
from llmrec.types import Request
from tests.strategies.strategy_cases import SCORED, Counting, cases, pick_first, strategy, task

# Twenty candidates under the recipe's defaults, or under the keys that follow.
FORWARDS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("likelihood", {}, 1),
    ("label", {}, 1),
    ("label", {"permutations": 3}, 3),
    ("permutation", {}, 10),
    ("permutation", {"depth": 40}, 19),
    ("permutation", {"depth": 4, "permutations": 2}, 8),
    ("window", {}, 4),
    ("window", {"window": 10, "window_step": 5}, 3),
    ("window", {"window": 6, "window_step": 4, "permutations": 2}, 10),
    ("window", {"window": 30}, 1),
    ("pairwise", {}, 380),
    ("pairwise", {"all_pairs": 19}, 290),
    ("pairwise", {"all_pairs": 0, "depth": 1}, 38),
    ("pointwise-yes", {}, 20),
)


@pytest.mark.parametrize(("name", "options", "forwards"), FORWARDS)
def test_forwards_and_tokens_of_a_request(name: str, options: dict[str, Any], forwards: int) -> None:
    backend = Counting()
    asked = [case.request for case in cases(3)]
    answers = strategy(name, backend, **options).answer(asked)
    assert [answer.cost.forwards for answer in answers] == [forwards] * 3
    assert sum(backend.calls) == 3 * forwards
    assert sum(answer.cost.prompt_tokens for answer in answers) == backend.read
    assert sum(answer.cost.completion_tokens for answer in answers) == backend.scored
    assert min(answer.cost.prompt_tokens for answer in answers) > 0
    if name != "likelihood":
        count = questions_of(name, 20, EvalSection(**options))
        assert count is not None and count.prompts == forwards


def test_windows_by_formula() -> None:
    for n in range(1, 60):
        for w in range(2, 12):
            for s in range(1, w):
                places = list(window_bounds(n, w, s))
                assert len(places) == (0 if n == 1 else 1 if n <= w else -(-(n - w) // s) + 1)
                assert n == 1 or (places[-1][0] == 0 and places[0][1] == n)


@given(size=st.integers(1, 14), set_size=st.integers(2, 6), depth=st.integers(1, 16), seed=st.integers(0, 999))
def test_a_heap_asks_at_least_once_a_place_and_at_most_what_is_counted(
    size: int, set_size: int, depth: int, seed: int
) -> None:
    (case,) = cases(1, size, seed)
    backend = Counting()
    (answer,) = strategy("setwise", backend, set_size=set_size, depth=depth).answer([case.request])
    count = questions_of("setwise", size, EvalSection(set_size=set_size, depth=depth))
    parents = -(-(size - 1) // (set_size - 1))
    # The last item is alone in the heap and takes no question.
    assert count is not None
    assert parents + max(0, min(depth, size - 1) - 1) <= answer.cost.forwards <= count.prompts
    assert answer.cost.forwards == sum(backend.calls)


@given(name=st.sampled_from([n for n in SCORED if n != "setwise"]), size=st.integers(1, 12), depth=st.integers(1, 14))
def test_other_strategies_ask_exactly_what_is_counted(name: str, size: int, depth: int) -> None:
    (case,) = cases(1, size)
    section = EvalSection(depth=depth, all_pairs=6, permutations=1 + depth % 3, window=5, window_step=2)
    options = {
        "permutation": {"depth": depth, "permutations": section.permutations},
        "window": {"window": 5, "window_step": 2, "permutations": section.permutations},
        "pairwise": {"depth": depth, "all_pairs": 6},
        "label": {"permutations": section.permutations},
    }.get(name, {})
    (answer,) = strategy(name, FakeBackend(), **options).answer([case.request])
    count = questions_of(name, size, section)
    assert count is not None and answer.cost.forwards == count.prompts


def test_what_is_asked_for_all_requests_is_booked_once() -> None:
    asked = [case.request for case in cases(6)]
    backend = Counting()
    answers = strategy("likelihood-prior", backend, batch=3).answer(asked)
    titles = [len({i for r in part for i in r.candidates or ()}) for part in (asked[:3], asked)]
    # One slice of at most 64 titles for what is new in each batch.
    assert [answer.cost.forwards for answer in answers] == [2, 1, 1, 2 if titles[1] > titles[0] else 1, 1, 1]
    assert sum(answer.cost.prompt_tokens for answer in answers) == backend.read
    backend = Counting()
    small = [case.request for case in cases(6, 10)]
    answers = strategy("label", backend, training=task("direct").questions(32)).answer(small)
    assert [answer.cost.forwards for answer in answers] == [33, 1, 1, 1, 1, 1]
    assert sum(answer.cost.completion_tokens for answer in answers) == backend.scored


def test_a_generated_list_costs_a_forward_a_token() -> None:
    (case,) = cases(1)
    (answer,) = strategy("list", pick_first()).answer([case.request])
    assert answer.cost.forwards == answer.cost.completion_tokens == 20
    (empty,) = strategy("list", FakeBackend(complete=lambda text: "")).answer([case.request])
    assert empty.cost.forwards == 1


def test_a_row_adds_forwards_up() -> None:
    protocol = EvalProtocol(split="made", candidates="made", cutoffs=(10,), resamples=20, seed=0, catalogue=60)
    found = evaluate(
        strategy("window", FakeBackend()), cases(8), name="direct", kind=family_of("direct").answer, protocol=protocol
    )
    assert found.figures.cost.forwards == 32


def test_one_candidate_takes_no_comparison() -> None:
    one = Request(id="r", user_id="s", candidates=("i20",))
    for name, forwards in (("window", 0), ("setwise", 0), ("pairwise", 0), ("permutation", 0), ("label", 1)):
        (answer,) = strategy(name, FakeBackend()).answer([one])
        assert answer.cost.forwards == forwards and getattr(answer, "items", None) == ("i20",)
