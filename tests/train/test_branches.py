"""With packing, the families' rows of one user are drawn together and branch off one history."""

from __future__ import annotations

import collections
from itertools import islice, pairwise
from typing import Any

import pytest

from llmrec.backends.encode import Encoder, TokenRow
from llmrec.errors import DataError, RecipeError
from llmrec.pipeline.study import Study, build_study
from llmrec.pipeline.training import plan_training
from llmrec.recipe.load import load_recipe
from llmrec.tasks.task import Branching
from llmrec.train.rows import branching_rows
from tests.conftest import make_tokenizer
from tests.facts import Facts, raises
from tests.tasks.task_data import make_split, make_task

ONE = {"templates": ("one-history",), "history": 12}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(make_tokenizer(), max_length=4096)


def drawn(encoder: Encoder, weights: dict[str, float], count: int, **section: Any) -> list[tuple[str, TokenRow | None]]:
    data = make_split()
    tasks = {family: make_task(family, data, **(ONE | section)) for family in weights}
    rows = branching_rows(tasks, weights, data.users(), encoder, limit=4096, seed=0)
    return list(islice(rows, count))


def alike(one: TokenRow, two: TokenRow) -> float:
    shared = next((n for n, (a, b) in enumerate(zip(one.ids, two.ids, strict=False)) if a != b), len(two.ids))
    return shared / min(len(one.ids), len(two.ids))


def test_the_rows_of_a_user_share_their_history(encoder: Encoder) -> None:
    rows = drawn(encoder, {"sequential": 1.0, "rating": 1.0}, 200)
    pairs = [(a[1], b[1]) for a, b in pairwise(rows) if a[0] != b[0]]
    shares = sorted((alike(one, two) for one, two in pairs if one and two), reverse=True)
    # Every second pair is of one user; those of two users share the opening words.
    assert shares[len(shares) // 2 - 10] > 0.5
    assert shares[-1] < 0.4


@pytest.mark.parametrize("weights", [(1.0, 1.0), (5.0, 1.0), (1.0, 7.0)])
def test_shares_of_tokens_follow_the_weights(encoder: Encoder, weights: tuple[float, float]) -> None:
    named = dict(zip(("sequential", "rating"), weights, strict=True))
    rows = drawn(encoder, named, 600)
    served: collections.Counter[str] = collections.Counter()
    largest = max(len(row.ids) for _, row in rows if row)
    for family, row in rows:
        served[family] += len(row.ids) if row else 0
    level = [served[family] / weight for family, weight in named.items()]
    assert abs(level[0] - level[1]) <= 2 * largest / min(weights)


def test_rows_show_training_pairs_alone_and_ask_as_evaluation_asks() -> None:
    data = make_split()
    known = set(data.train.select("user_id", "item_id").iter_rows())
    for family in ("sequential", "rating"):
        task = make_task(family, data, **ONE)
        assert isinstance(task, Branching)
        assert task.branches
        rows = [row for number in range(5) for user in data.users() if (row := task.branch(number, user))]
        assert len({row.id for row in rows}) == len(rows) > 150
        for row in rows:
            assert set(row.pairs) <= known
            assert len(row.pairs) <= 13
            assert row.answer[-1].kind == "target"
        # Passes end histories elsewhere.
        assert len({row.messages for row in rows}) > 0.5 * len(rows)


def test_every_row_of_a_list_family_is_a_window() -> None:
    task = make_task("rating", templates=("list-ratings",))
    assert not task.branches
    mixed = make_task("sequential", templates=("continue-list", "one-history"))
    shapes = {row.ends_turn for user in make_split().users() if (row := mixed.branch(0, user))}
    assert mixed.branches
    assert shapes == {True, False}


@pytest.mark.parametrize(("family", "template"), [("sequential", "next-title"), ("rating", "rate-next")])
def test_a_past_that_is_summed_up_for_the_question_is_shared_with_nobody(family: str, template: str) -> None:
    plain, summed = (make_task(family, templates=(template,), history=3, past=past) for past in ("latest", "summary"))
    assert plain.branches and not summed.branches


def test_users_whom_no_family_knows_are_an_error(encoder: Encoder) -> None:
    tasks = {family: make_task(family, **ONE) for family in ("sequential", "rating")}
    rows = branching_rows(tasks, {"sequential": 1.0, "rating": 1.0}, ["nobody"], encoder, limit=100, seed=0)
    with raises(DataError, Facts("too-few", says="rating, sequential")):
        next(rows)


def study(packing: str, templates: str) -> Study:
    tasks = f"tasks={{sequential: {{templates: [{templates}]}}, rating: {{templates: [{templates}], history: 20}}}}"
    base = ["reviews=null", "data={source: made-reviews}", "eval.candidates.count=5", "eval.backend=hf", tasks]
    settings = ["train.steps=6", "train.batch_tokens=4096", "train.max_row_tokens=1024", f"train.packing={packing}"]
    return build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", [*base, *settings]))


def test_a_packed_plan_computes_fewer_tokens_for_as_many_rows(encoder: Encoder) -> None:
    plain, packed = (plan_training(study(packing, "one-history"), encoder) for packing in ("none", "tree"))
    spent = []
    for planned in (plain, packed):
        assert all(planned.rows.values())
        assert all(step.padded_tokens <= 4096 for step in planned.steps)
        spent.append(sum(step.padded_tokens for step in planned.steps) / sum(planned.rows.values()))
    assert spent[1] < 0.75 * spent[0]
    assert all(step.bins for step in packed.steps)
    assert not any(step.bins for step in plain.steps)


def test_packing_an_encoder_decoder_is_refused(encoder: Encoder) -> None:
    with raises(RecipeError, Facts("contradiction", column="train.packing", says="train.packing=none")):
        plan_training(study("tree", "one-history"), encoder, paired=True)
