"""Tasks on reviews: headlines, stars, explanations with hints, and no text of held-out reviews."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from task_data import CLASSES, asking, example_text, prompt_text, targets

from llmrec.data.dataset import Review
from llmrec.data.sets.table import load_data
from llmrec.data.split import SplitDataset, split_dataset, with_review_part
from llmrec.errors import DataError, RecipeError
from llmrec.prompts.template import Template, load_templates
from llmrec.recipe.schema import DataSection, Split
from llmrec.types import Case, Rating, Request, Text
from tests.facts import Facts, raises
from tests.review_files import HOSTILE, marks, records, write
from tests.tasks.making import make as built

ROWS = 400
PARTS = {"explanation": "sentence", "review": "headline"}
FAMILIES = ("explanation", "review", "stars", "rating")


@pytest.fixture(scope="module")
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SplitDataset]:
    folder = tmp_path_factory.mktemp("reviews")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_CACHE", str(folder))
        path = write(folder / "reviews.json", records())
        dataset = load_data(DataSection(source="amazon-reviews", path=str(path), noun="things"), seed=0)
    yield split_dataset(dataset, Split(kind=getattr(request, "param", "leave_one_out"), valid=0.2, test=0.2), seed=0)


def plain_templates(family: str) -> dict[str, Template]:
    return {name: template for name, template in load_templates(family).items() if not template.writes_codes}


def data_of(family: str, data: SplitDataset) -> SplitDataset:
    return with_review_part(data, PARTS[family]) if family in PARTS else data  # type: ignore[arg-type]


def make(family: str, data: SplitDataset, **section: Any) -> Any:
    task, kind = CLASSES[family]
    used = data_of(family, data)
    return built(task, used, kind(**section), plain_templates(family), seed=0)


@pytest.mark.parametrize("data", ["leave_one_out", "user_disjoint"], indirect=True)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_training_row_shows_a_held_out_review(family: str, data: SplitDataset) -> None:
    secrets = [mark for pair in data.held_out for mark in marks(*pair)]
    rows = list(islice(make(family, data).examples("train"), ROWS))
    for row in rows:
        shown = example_text(row).casefold()
        assert not [mark for mark in secrets if mark in shown], row.id
        assert not set(row.pairs) & data.held_out
    everything = "\n".join(example_text(row) for row in rows).casefold()
    assert family == "rating" or any(mark in everything for pair in row.pairs for mark in marks(*pair))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("data", "choice"), [("user_disjoint", "random"), ("leave_one_out", "own")], indirect=["data"])
def test_no_shot_shows_a_held_out_review(family: str, choice: str, data: SplitDataset) -> None:
    kind, section = CLASSES[family]
    task = built(kind, data_of(family, data), section(), plain_templates(family), seed=0, shot_choice=choice)
    for case in task.cases("test"):
        own_pair = (case.request.user_id, str(case.request.item))
        for name in asking(family):
            shown = prompt_text(task.prompt(case.request, template=name, shots=2)).casefold()
            held = data.held_out - {own_pair} - {(own_pair[0], event.item_id) for event in case.request.history}
            assert not [mark for pair in held for mark in marks(*pair) if mark in shown]


def test_explanation_prompt_shows_named_parts_only(data: SplitDataset) -> None:
    templates = plain_templates("explanation")
    for name, template in templates.items():
        task = make("explanation", data, eval_templates=(name,))
        assert task.cases("test")
        for case in task.cases("test"):
            request = case.request
            text, sentence, headline = marks(request.user_id, str(request.item))
            shown = prompt_text(task.prompt(request, template=name)).casefold()
            assert text not in shown and sentence not in shown
            review = data.dataset.reviews[request.user_id, str(request.item)]
            named = template.names("system", "user")
            assert (headline in shown) == ("headline" in named)
            assert (request.context.get("feature") == review.feature) == ("feature" in named)
            assert bool({"headline", "feature", "rating"} & named) == bool(template.leak)


def test_headline_prompt_does_not_show_the_headline(data: SplitDataset) -> None:
    for name in plain_templates("review"):
        task = make("review", data)
        for case in task.cases("test"):
            text, _, headline = marks(case.request.user_id, str(case.request.item))
            shown = prompt_text(task.prompt(case.request, template=name)).casefold()
            assert text in shown and headline not in shown
            assert headline in str(case.truth).casefold()


def test_truths_come_from_the_review(data: SplitDataset) -> None:
    rated = {row[:2]: row[2] for row in data.test.select("user_id", "item_id", "rating").iter_rows()}
    for family in ("explanation", "review", "stars"):
        cases = make(family, data).cases("test")
        assert len(cases) == len(rated)
        for case in cases:
            pair = (case.request.user_id, str(case.request.item))
            review = data.dataset.reviews[pair]
            truths = {"explanation": review.sentence, "review": review.headline, "stars": rated[pair]}
            assert case.truth == truths[family]
            assert case.request.history == data_of(family, data).history(pair[0], "test")


def test_long_and_missing_reviews(data: SplitDataset) -> None:
    task = make("stars", data, shown=24)
    for case in task.cases("test"):
        assert len(case.request.context["review"]) <= 24
    pair = next(iter(data.test.select("user_id", "item_id").iter_rows()))
    reviews = {**data.dataset.reviews, pair: Review(text="", headline="above nothing")}
    less = replace(data, dataset=replace(data.dataset, reviews=reviews))
    for family in ("review", "stars"):
        cases = make(family, less).cases("test")
        assert len(cases) == len(data.test) - 1
        assert pair not in {(case.request.user_id, case.request.item) for case in cases}


def test_parses_stars_and_headlines(data: SplitDataset) -> None:
    stars, review = make("stars", data), make("review", data)
    request = stars.cases("test")[0].request
    assert stars.continuations(request, template="user-stars") == ("1", "2", "3", "4", "5")
    assert stars.parse("4 stars", request, template="user-stars") == Rating(request_id=request.id, value=4.0)
    assert stars.parse("9", request, template="user-stars") is None
    assert review.continuations(request, template="user-headline") == ()
    assert review.parse(" Good\n strap ", request, template="user-headline") == Text(
        request_id=request.id, text="Good strap"
    )
    assert review.parse("\n", request, template="user-headline") is None
    case = Case(request=request, truth="good strap")
    assert review.reward(Text(request_id=request.id, text="Good strap!"), case) == 1.0
    assert review.reward(Rating(request_id=request.id, value=1.0), case) == 0.0
    assert stars.reward(Rating(request_id=request.id, value=3.0), Case(request=request, truth=5.0)) == 0.5
    assert stars.reward(Text(request_id=request.id, text="5"), Case(request=request, truth=5.0)) == 0.0


@pytest.mark.parametrize(("answer", "text"), [
    ("4: It holds.", "It holds."), (" 5 stars: 3 of 4 hold.", "3 of 4 hold."), ("It holds: 4.", None), ("4:", None),
    ("4 holds", None),
])  # fmt: skip
def test_parses_text_after_stars(answer: str, text: str | None, data: SplitDataset) -> None:
    task = make("explanation", data)
    request = task.cases("test")[0].request
    parsed = task.parse(answer, request, template="name-item-both")
    assert (parsed.text if parsed else None) == text
    rows = [row for row in islice(task.examples("train"), ROWS) if row.template == "explanation/name-item-both"]
    for row in rows:
        (target,) = targets(row)
        stars, _, sentence = target.partition(": ")
        assert stars in {"1", "2", "3", "4", "5"}
        assert task.parse(target, request, template="name-item-both").text == sentence
    assert task.parse("4: It holds.", request, template="name-title").text == "4: It holds."
    assert rows


def test_templates_without_reviews(data: SplitDataset) -> None:
    bare = replace(data, dataset=replace(data.dataset, reviews={}))
    kind, section = CLASSES["explanation"]
    task = built(kind, bare, section(), plain_templates("explanation"), seed=0)
    used = {row.template for row in islice(task.examples("train"), ROWS)}
    assert used == {f"explanation/{name}" for name in ("in-own-words", "plain", "why-chosen", "with-rating")}
    with raises(RecipeError, Facts("unsupported", "explanation/name-title", says="amazon-reviews")):
        built(kind, bare, section(templates=("name-title",)), plain_templates("explanation"), seed=0)
    with raises(DataError, Facts("unsupported", "amazon-reviews", column="tasks.review")):
        built(CLASSES["review"][0], bare, CLASSES["review"][1](), plain_templates("review"), seed=0)


def test_invalid_use_is_refused(data: SplitDataset) -> None:
    task, section = CLASSES["review"]
    templates = plain_templates("review")
    with raises(DataError, Facts("missing-value", column="review", says="context['review']")):
        make("review", data).prompt(Request(id="q", user_id="U00", item="B00"), template="user-headline")
    mixed = {**templates, "x": Template("review", "x", 1, "seen", "chat", "{{ review }}", "{{ rating }}")}
    with raises(RecipeError, Facts("contradiction", column="target", says=("prompts/review", "prompts/stars"))):
        built(task, data, section(), mixed, seed=0)
    silent = replace(data, train=data.train.with_columns(text=pl.lit(None, pl.String)))
    with raises(DataError, Facts("missing-value", "amazon-reviews", column="tasks.review")):
        built(task, silent, section(), templates, seed=0)
    half = data.train.with_columns(rating=pl.when(pl.int_range(pl.len()) > 3).then("rating"))
    with raises(
        DataError,
        Facts(
            "missing-value", "amazon-reviews", column="tasks.explanation.templates", says="explanation/name-item-both"
        ),
    ):
        make("explanation", replace(data, train=half))


@pytest.mark.parametrize("family", ["explanation", "review", "stars"])
def test_hostile_reviews_stay_on_one_line(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    path = write(tmp_path / "reviews.json", records(hostile=True))
    dataset = load_data(DataSection(source="amazon-reviews", path=str(path), noun="things"), seed=0)
    used, (kind, section) = data_of(family, split_dataset(dataset, Split(), seed=0)), CLASSES[family]
    templates, shown = plain_templates(family), 0
    for name in templates:
        task = built(kind, used, section(eval_templates=(name,)), templates, seed=0)
        for case in task.cases("test"):
            for message in task.prompt(case.request, template=name, shots=1).messages:
                assert all("\n" not in segment.text for segment in message.segments if segment.kind == "item")
                assert "49" not in message.text
                shown += "{{ 7*7 }}" in message.text
    for row in islice(built(kind, used, section(), templates, seed=0).examples("train"), ROWS):
        assert all("\n" not in segment.text for segment in row.answer)
    assert shown and "{{ 7*7 }}" in HOSTILE
