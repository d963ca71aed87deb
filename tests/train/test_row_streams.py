"""Streams of training rows: assembled from lines that were tokenised once, and by user for packed plans."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llmrec.pipeline.training as training
from llmrec.backends.encode import IGNORED, Encoder, TokenRow
from llmrec.errors import DataError, RecipeError
from llmrec.index.table import ItemIndex, level_token
from llmrec.pipeline.study import Study, build_study
from llmrec.pipeline.training import plan_training
from llmrec.prompts.template import Template, load_templates
from llmrec.recipe.load import load_recipe
from llmrec.tasks.base import ExampleDraw
from llmrec.tasks.sequential import SequentialTask
from llmrec.tasks.task import BranchingTask
from llmrec.train import rows as line_rows
from llmrec.train.batches import truncated_row
from llmrec.train.rows import ConcatenatedExamples, LineTable, RowStream, branching_rows, has_independent_lines
from llmrec.types import Example
from tests.conftest import make_tokenizer
from tests.facts import Facts, raises
from tests.tasks.making import make
from tests.tasks.task_data import make_split, make_task


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(make_tokenizer(), max_length=4096)


def from_words(task: SequentialTask, encoder: Encoder, limit: int, count: int) -> list[TokenRow | None]:
    return [truncated_row(example, encoder, limit) for example in islice(task.examples("train"), count)]


@pytest.mark.parametrize(
    ("settings", "limit"), [({}, 60), ({"window": 5, "warm_up": 3}, 4000), ({"templates": ("profile-list",)}, 200)]
)
def test_rows_equal_those_tokenised_as_a_whole(encoder: Encoder, settings: dict[str, Any], limit: int) -> None:
    """With special characters in titles, profiles, chat rows between lists, and truncated rows."""
    task = make_task("sequential", **settings)
    stream = RowStream(task, encoder, limit=limit, seed=0)
    rows = list(islice(stream, 400))
    assert rows == from_words(task, encoder, limit, 400)
    assert stream.gathered > 0
    assert all(table is not None for name, table in stream._tables.items() if "list" in name)


def listed(**parts: str) -> Template:
    values: dict[str, Any] = {"target": "{{ item.title }}", "tail": "\n", **parts}
    return Template(
        family="sequential", name="made", version=1, use="seen", shape="list", user="Go on with {{ noun }}.", **values
    )


def task_of(template: Template, **settings: Any) -> SequentialTask:
    task = make_task("sequential", templates=("continue-list",), **settings)
    object.__setattr__(task._chosen, "train", (template,))
    return task  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("parts", "warm_up"),
    [
        ({"lead": "Next of the {{ noun }}: "}, 2),
        ({"tail": "\n-\n"}, 0),
        ({"target": "{{ item.title }}{% if item.genres %} ({{ item.genres }}, {{ item.year }}){% endif %}"}, 2),
    ],
)
def test_templates_with_leads_tails_and_fields(encoder: Encoder, parts: dict[str, str], warm_up: int) -> None:
    task = task_of(listed(**parts), warm_up=warm_up)
    stream = RowStream(task, encoder, limit=4000, seed=0)
    assert list(islice(stream, 100)) == from_words(task, encoder, 4000, 100)
    assert (stream.gathered, stream.encoded) == (64 + 128, 0)


@pytest.mark.parametrize(
    "parts", [{"target": "{{ n }}. {{ item.title }}"}, {"tail": "\n- "}, {"lead": "{{ user_id }} took "}]
)
def test_lines_that_depend_on_more_than_the_item_are_tokenised_as_a_whole(
    encoder: Encoder, parts: dict[str, str]
) -> None:
    template = listed(**parts)
    assert not has_independent_lines(template)
    task = task_of(template)
    stream = RowStream(task, encoder, limit=4000, seed=0)
    assert list(islice(stream, 100)) == from_words(task, encoder, 4000, 100)
    assert stream.gathered == 0


def test_templates_of_codes(encoder: Encoder) -> None:
    index = ItemIndex(
        "made",
        {f"i{n:02d}": (level_token(0, n % 8), level_token(1, n // 8)) for n in range(60)},
        tokens=tuple(level_token(level, n) for level in range(2) for n in range(8)),
    )
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(index.tokens))
    coder = Encoder(tokenizer, max_length=2048)
    plain = make_task("sequential")
    for name in ("bare-codes", "continue-codes"):
        task = make(
            SequentialTask,
            plain._data,
            plain._section.model_copy(update={"templates": (name,)}),
            load_templates("sequential"),
            seed=0,
            index=index,
        )
        stream = RowStream(task, coder, limit=4000, seed=0)
        assert list(islice(stream, 100)) == from_words(task, coder, 4000, 100)
        assert stream.encoded == 0


class Contextual(Encoder):
    """Tokens of lines depend on their context, so that no table can contain them."""

    def row(self, example: Example) -> TokenRow:
        result = super().row(example)
        return TokenRow((*result.ids, len(result.ids)), (*result.labels, IGNORED))


def test_differing_rows_disable_the_table(caplog: pytest.LogCaptureFixture) -> None:
    task = make_task("sequential", templates=("continue-list",))
    contextual = Contextual(make_tokenizer(), max_length=2048)
    stream = RowStream(task, contextual, limit=4000, seed=0)
    with caplog.at_level("WARNING", logger=line_rows.__name__):
        rows = list(islice(stream, 300))
    assert rows == from_words(task, contextual, 4000, 300)
    assert stream.gathered == 0
    assert [record.message for record in caplog.records if "sequential/continue-list" in record.message]
    assert len(caplog.records) == 1


class Forbidding(Encoder):
    def piece(self, text: str) -> tuple[int, ...]:
        if "Film #59" in text:
            raise line_rows.BackendError("Film #59", kind="unsafe")
        return super().piece(text)


def test_rejected_line_is_an_error_at_its_row() -> None:
    task, strict = make_task("sequential", templates=("continue-list",)), Forbidding(make_tokenizer(), max_length=2048)
    examples = list(islice(task.examples("train"), 300))
    first = next(n for n, row in enumerate(examples) if any(item == "i59" for _, item in row.pairs))
    stream = iter(RowStream(task, strict, limit=4000, seed=0))
    assert list(islice(stream, first)) == [truncated_row(example, strict, 4000) for example in examples[:first]]
    with raises(line_rows.BackendError, Facts("unsafe", says="Film #59")):
        next(stream)


def test_each_line_is_tokenised_once(encoder: Encoder) -> None:
    task, read = make_task("sequential", templates=("continue-list",)), list[str]()

    def example(draw: ExampleDraw) -> Example:
        read.extend(event.item_id for event in draw.events)
        return task.example(draw)

    counting: Any = SimpleNamespace(draws=task.draws, example=example)
    table, draws = LineTable(counting, task._chosen.train[0], encoder), list(islice(task.draws(), 500))
    for start in range(0, 500, 100):
        table.gather(draws[start : start + 100])
    assert len(read) == len(set(read))
    assert set(read) == {event.item_id for draw in draws for event in draw.events}


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(1, 8))
def test_rows_are_truncated_like_fit_row(learned: Sequence[Sequence[bool]], limit: int) -> None:
    flat = [flag for row in learned for flag in row]
    ids = np.arange(len(flat), dtype=np.int32)
    labels = np.where(flat, ids, IGNORED).astype(np.int32)
    ends = np.cumsum([0, *map(len, learned)])
    expected = []
    for start, end in pairwise(ends):
        cut = slice(start, min(end, start + limit))
        row = TokenRow(tuple(ids[cut].tolist()), tuple(labels[cut].tolist()))
        expected.append(row if row.targets else None)
    assert ConcatenatedExamples(ids, labels, ends).rows(limit) == expected


def planned(study: Study, encoder: Encoder) -> Any:
    plan = training.plan_training(study, encoder)
    return list(plan.steps), plan.rows, plan.dropped


def test_plan_is_equal_without_the_table(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = "tasks={rating: {}, sequential: {weight: 3}, direct: {weight: 0.5}}"
    base = ["reviews=null", "data={source: made-reviews}", "eval.candidates.count=5", "eval.backend=hf", tasks]
    study = build_study(
        load_recipe("recipes/movielens-100k/four-tasks.yaml", [*base, "train.steps=4", "train.max_row_tokens=160"])
    )
    with_pieces = planned(study, encoder)
    monkeypatch.setattr(line_rows, "has_independent_lines", lambda template: False)
    assert planned(study, encoder) == with_pieces
    assert with_pieces[1]["sequential"] > 5
    monkeypatch.undo()
    monkeypatch.setattr(line_rows.LineTable, "gather", lambda self, draws: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        planned(study, encoder)


ONE = {"templates": ("one-history",), "history": 12}


def drawn(encoder: Encoder, weights: dict[str, float], count: int, **section: Any) -> list[tuple[str, TokenRow | None]]:
    data = make_split()
    tasks = {family: make_task(family, data, **(ONE | section)) for family in weights}
    rows = branching_rows(tasks, weights, data.users(), encoder, limit=4096, seed=0)
    return list(islice(rows, count))


def alike(one: TokenRow, two: TokenRow) -> float:
    shared = next((n for n, (a, b) in enumerate(zip(one.ids, two.ids, strict=False)) if a != b), len(two.ids))
    return shared / min(len(one.ids), len(two.ids))


def test_rows_of_a_user_share_their_history(encoder: Encoder) -> None:
    rows = drawn(encoder, {"sequential": 1.0, "rating": 1.0}, 200)
    pairs = [(a[1], b[1]) for a, b in pairwise(rows) if a[0] != b[0]]
    shares = sorted((alike(one, two) for one, two in pairs if one and two), reverse=True)
    # Every second pair belongs to one user; pairs of two users share only the opening words.
    assert shares[len(shares) // 2 - 10] > 0.5
    assert shares[-1] < 0.4


@pytest.mark.parametrize("weights", [(5.0, 1.0), (1.0, 7.0)])
def test_shares_of_tokens_follow_the_weights(encoder: Encoder, weights: tuple[float, float]) -> None:
    named = dict(zip(("sequential", "rating"), weights, strict=True))
    rows = drawn(encoder, named, 600)
    served: collections.Counter[str] = collections.Counter()
    largest = max(len(row.ids) for _, row in rows if row)
    for family, row in rows:
        served[family] += len(row.ids) if row else 0
    level = [served[family] / weight for family, weight in named.items()]
    assert abs(level[0] - level[1]) <= 2 * largest / min(weights)


def test_rows_contain_only_training_pairs() -> None:
    data = make_split()
    known = set(data.train.select("user_id", "item_id").iter_rows())
    for family in ("sequential", "rating"):
        task = make_task(family, data, **ONE)
        assert isinstance(task, BranchingTask)
        assert task.branches
        rows = [row for number in range(5) for user in data.users() if (row := task.branch(number, user))]
        assert len({row.id for row in rows}) == len(rows) > 150
        for row in rows:
            assert set(row.pairs) <= known
            assert len(row.pairs) <= 13
            assert row.answer[-1].kind == "target"
        # Each pass ends the histories at other events.
        assert len({row.messages for row in rows}) > 0.5 * len(rows)


def test_templates_decide_whether_rows_share_a_history() -> None:
    assert not make_task("rating", templates=("list-ratings",)).branches
    mixed = make_task("sequential", templates=("continue-list", "one-history"))
    shapes = {row.ends_turn for user in make_split().users() if (row := mixed.branch(0, user))}
    assert mixed.branches and shapes == {True, False}
    for family, template in (("sequential", "next-title"), ("rating", "rate-next")):
        plain, summed = (
            make_task(family, templates=(template,), history=3, past=past) for past in ("latest", "summary")
        )
        assert plain.branches and not summed.branches


def test_rejects_unknown_users(encoder: Encoder) -> None:
    tasks = {family: make_task(family, **ONE) for family in ("sequential", "rating")}
    rows = branching_rows(tasks, {"sequential": 1.0, "rating": 1.0}, ["unknown"], encoder, limit=100, seed=0)
    with raises(DataError, Facts("too-few", says="rating, sequential")):
        next(rows)


def study(packing: str, templates: str) -> Study:
    tasks = f"tasks={{sequential: {{templates: [{templates}]}}, rating: {{templates: [{templates}], history: 20}}}}"
    base = ["reviews=null", "data={source: made-reviews}", "eval.candidates.count=5", "eval.backend=hf", tasks]
    settings = ["train.steps=6", "train.batch_tokens=4096", "train.max_row_tokens=1024", f"train.packing={packing}"]
    return build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", [*base, *settings]))


def test_packed_plan_computes_fewer_tokens_per_row(encoder: Encoder) -> None:
    plain, packed = (plan_training(study(packing, "one-history"), encoder) for packing in ("none", "tree"))
    costs = []
    for planned in (plain, packed):
        assert all(planned.rows.values())
        assert all(step.padded_tokens <= 4096 for step in planned.steps)
        costs.append(sum(step.padded_tokens for step in planned.steps) / sum(planned.rows.values()))
    assert costs[1] < 0.75 * costs[0]
    assert all(step.bins for step in packed.steps)
    assert not any(step.bins for step in plain.steps)


def test_rejects_packing_of_encoder_decoder(encoder: Encoder) -> None:
    with raises(RecipeError, Facts("contradiction", column="train.packing", says="train.packing=none")):
        plan_training(study("tree", "one-history"), encoder, paired=True)
