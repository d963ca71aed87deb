"""List rows put together from lines that were tokenised once are the rows that their words give, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llmrec.pipeline.training as training
from llmrec.backends.encode import IGNORED, Encoder, TokenRow
from llmrec.index.table import ItemIndex, token
from llmrec.pipeline.study import Study, build_study
from llmrec.prompts.template import Template, load_templates
from llmrec.recipe.load import load_recipe
from llmrec.tasks.base import Draw
from llmrec.tasks.sequential import SequentialTask
from llmrec.train import rows as line_rows
from llmrec.train.batches import fit_row
from llmrec.train.rows import Gathered, LineTable, RowStream, takes_pieces
from llmrec.types import Event, Example
from tests.conftest import make_tokenizer
from tests.facts import Facts, raises
from tests.tasks.making import make
from tests.tasks.task_data import make_task


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(make_tokenizer(), max_length=2048)


def from_words(task: SequentialTask, encoder: Encoder, limit: int, count: int) -> list[TokenRow | None]:
    return [fit_row(example, encoder, limit) for example in islice(task.examples("train"), count)]


@pytest.mark.parametrize("settings", [{}, {"window": 5, "warm_up": 3}, {"templates": ("profile-list",)}])
@pytest.mark.parametrize("limit", [60, 200, 4000])
def test_every_row_is_the_row_of_its_words(encoder: Encoder, settings: dict[str, Any], limit: int) -> None:
    """Hostile titles, profiles, chats in between, cut rows: 700 of 700, none of them by falling back."""
    task = make_task("sequential", **settings)
    stream = RowStream(task, encoder, limit=limit, seed=0)
    rows = list(islice(stream, 700))
    assert rows == from_words(task, encoder, limit, 700)
    assert stream.gathered > 0
    assert all(table is not None for name, table in stream._tables.items() if "list" in name)


def listed(**parts: str) -> Template:
    values: dict[str, Any] = {"target": "{{ item.title }}", "tail": "\n", **parts}
    return Template(
        family="sequential", name="made", version=1, use="seen", shape="list", user="Go on with {{ noun }}.", **values
    )


def made_task(template: Template, **settings: Any) -> SequentialTask:
    """A task over one template, which may have a lead; the chosen templates are put in its place."""
    task = make_task("sequential", templates=("continue-list",), **settings)
    object.__setattr__(task._chosen, "train", (template,))
    return task  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "parts",
    [
        {"lead": "Next of the {{ noun }}: "},
        {"tail": "\n\n"},
        {"tail": "\n-\n"},
        {"target": "{{ item.title }}{% if item.genres %} ({{ item.genres }}, {{ item.year }}){% endif %}"},
    ],
)
@pytest.mark.parametrize("warm_up", [0, 2])
def test_leads_tails_and_fields(encoder: Encoder, parts: dict[str, str], warm_up: int) -> None:
    task = made_task(listed(**parts), warm_up=warm_up)
    stream = RowStream(task, encoder, limit=4000, seed=0)
    assert list(islice(stream, 200)) == from_words(task, encoder, 4000, 200)
    assert (stream.gathered, stream.encoded) == (64 + 128 + 256, 0)


@pytest.mark.parametrize(
    "parts", [{"target": "{{ n }}. {{ item.title }}"}, {"tail": "\n- "}, {"lead": "{{ user_id }} took "}]
)
def test_lines_that_hang_on_more_than_their_item_are_encoded_from_words(
    encoder: Encoder, parts: dict[str, str]
) -> None:
    template = listed(**parts)
    assert not takes_pieces(template)
    task = made_task(template)
    stream = RowStream(task, encoder, limit=4000, seed=0)
    assert list(islice(stream, 100)) == from_words(task, encoder, 4000, 100)
    assert stream.gathered == 0


def test_codes_one_behind_the_other(encoder: Encoder) -> None:
    index = ItemIndex(
        "made",
        {f"i{n:02d}": (token(0, n % 8), token(1, n // 8)) for n in range(60)},
        tokens=tuple(token(level, n) for level in range(2) for n in range(8)),
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


class Moody(Encoder):
    """A tokenizer's lines that depend on what stands around them: no table can hold them."""

    def row(self, example: Example) -> TokenRow:
        found = super().row(example)
        return TokenRow((*found.ids, len(found.ids)), (*found.labels, IGNORED))


def test_a_difference_ends_the_use_of_the_table(caplog: pytest.LogCaptureFixture) -> None:
    task, moody = make_task("sequential", templates=("continue-list",)), Moody(make_tokenizer(), max_length=2048)
    stream = RowStream(task, moody, limit=4000, seed=0)
    with caplog.at_level("WARNING", logger=line_rows.__name__):
        rows = list(islice(stream, 300))
    assert rows == from_words(task, moody, 4000, 300)
    assert stream.gathered == 0
    assert [record.message for record in caplog.records if "sequential/continue-list" in record.message]
    assert len(caplog.records) == 1


class Forbidding(Encoder):
    """Refuses one line."""

    def piece(self, text: str) -> tuple[int, ...]:
        if "Film #59" in text:
            raise line_rows.BackendError("Film #59", kind="unsafe")
        return super().piece(text)


def test_a_line_that_cannot_be_tokenised_is_an_error_only_where_its_row_is_reached() -> None:
    task, strict = make_task("sequential", templates=("continue-list",)), Forbidding(make_tokenizer(), max_length=2048)
    examples = list(islice(task.examples("train"), 300))
    first = next(n for n, row in enumerate(examples) if any(item == "i59" for _, item in row.pairs))
    stream = iter(RowStream(task, strict, limit=4000, seed=0))
    assert list(islice(stream, first)) == [fit_row(example, strict, 4000) for example in examples[:first]]
    with raises(line_rows.BackendError, Facts("unsafe", says="Film #59")):
        next(stream)


def test_a_line_is_tokenised_once(encoder: Encoder) -> None:
    asked: list[str] = []

    class Counting:
        def __init__(self, task: SequentialTask) -> None:
            self._task = task

        def draws(self, limit: int | None = None) -> Iterator[Draw]:
            return self._task.draws(limit)

        def example(self, draw: Draw) -> Example:
            asked.extend(event.item_id for event in draw.events)
            return self._task.example(draw)

    task = make_task("sequential", templates=("continue-list",))
    table = LineTable(Counting(task), task._chosen.train[0], encoder)
    draws = list(islice(task.draws(), 500))
    for start in range(0, 500, 100):
        table.gather(draws[start : start + 100])
    assert len(asked) == len(set(asked))
    assert set(asked) == {event.item_id for draw in draws for event in draw.events}


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(1, 8))
def test_rows_are_cut_as_fit_row_cuts(learned: Sequence[Sequence[bool]], limit: int) -> None:
    flat = [flag for row in learned for flag in row]
    ids = np.arange(len(flat), dtype=np.int32)
    labels = np.where(flat, ids, IGNORED).astype(np.int32)
    ends = np.cumsum([0, *map(len, learned)])
    wanted = []
    for start, end in pairwise(ends):
        cut = slice(start, min(end, start + limit))
        row = TokenRow(tuple(ids[cut].tolist()), tuple(labels[cut].tolist()))
        wanted.append(row if row.targets else None)
    assert Gathered(ids, labels, ends).rows(limit) == wanted


def planned(study: Study, encoder: Encoder) -> Any:
    made = training.plan_training(study, encoder)
    return list(made.steps), made.rows, made.dropped


def test_a_plan_is_the_same_with_and_without(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same rows in the same steps, over a mixture of three families with several templates each."""
    tasks = "tasks={rating: {}, sequential: {weight: 3}, direct: {weight: 0.5}}"
    base = ["reviews=null", "data={source: made-reviews}", "eval.candidates.count=5", "eval.backend=hf", tasks]
    study = build_study(
        load_recipe("recipes/movielens-100k/four-tasks.yaml", [*base, "train.steps=8", "train.max_row_tokens=160"])
    )
    encoder = Encoder(encoder.tokenizer, max_length=2048)
    with_pieces = planned(study, encoder)
    monkeypatch.setattr(line_rows, "takes_pieces", lambda template: False)
    assert planned(study, encoder) == with_pieces
    assert with_pieces[1]["sequential"] > 5
    monkeypatch.undo()
    monkeypatch.setattr(line_rows.LineTable, "gather", lambda self, draws: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        planned(study, encoder)


def test_rows_without_events_are_their_question(encoder: Encoder) -> None:
    task = make_task("sequential", templates=("continue-list",))
    template = task._chosen.train[0]
    draws = [Draw("a", "u00", template, (), 0), Draw("b", "u00", template, (Event(item_id="i01"),), 0)]
    empty, one = LineTable(task, template, encoder).gather(draws).rows(1000)
    assert empty is None
    assert one == encoder.row(task.example(draws[1]))
