"""A recipe on reviews end to end on a tiny random model: four tasks, derived fields and leaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from llmrec.pipeline import run as pipeline
from llmrec.pipeline.leaks import (
    _HeldOutTexts,
    audit_few_shot_examples,
    audit_profiles,
    audit_questions,
    audit_training_rows,
)
from llmrec.pipeline.study import Study, build_study
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.types import Segment
from tests.review_files import marks, records, write

pytest.importorskip("trl", reason="the train extra is not installed")

SMALL = (
    *("train.steps=3", "train.batch_tokens=1024", "train.max_row_tokens=1000", "train.valid_rows=4"),
    *("train.valid_every=3", "train.save_every=3", "train.lora.top_layers=1", "tasks.explanation.max_tokens=4"),
    *("tasks.review.max_tokens=4", "eval.users=5", "eval.bootstrap=50", "eval.backend=hf"),
    "eval.arms=[few-shot, tuned]",
)
FAMILIES = ("rating", "explanation", "review", "stars")


@pytest.fixture(scope="module")
def recipe(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipe]:
    folder = tmp_path_factory.mktemp("reviews")
    path = write(folder / "reviews.jsonl.gz", records())
    changes = [f"model.name={llama_folder}", "model.dtype=float32", f"data.path={path}", *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_CACHE", str(folder))
        yield load_recipe("recipes/reviews/musical-instruments.yaml", changes)


@pytest.fixture(scope="module")
def study(recipe: Recipe) -> Study:
    return build_study(recipe)


@pytest.fixture(scope="module")
def done(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Run:
    return pipeline.run(recipe, tmp_path_factory.mktemp("run") / "r", quiet=True)


def test_every_task_has_rows_and_metrics(done: pipeline.Run) -> None:
    rows = {row["id"]: row for row in done.results["rows"]}
    for name in ("user-headline", "in-few-words"):
        assert rows[f"review/tuned/text/{name}"]["inputs"] == "text of the review"
    for name in ("user-stars", "name-stars"):
        figures = rows[f"stars/few-shot/expected/{name}"]
        assert 0 < figures["metrics"]["RMSE"]["value"] < 4 and figures["parse_rate"] == 1.0
        assert figures["inputs"] == "text of the review, 2 solved examples"
    assert rows["explanation/tuned/text/name-item-feature-stars"]["template_use"] == "unseen"
    assert {row["task"] for row in rows.values()} == set(FAMILIES)
    assert rows["review/baseline/nearest-text"]["metrics"]["ROUGE-L"]["value"] > 0
    # These baselines do not read the review, so they equal those of the rating task.
    for name in ("global-mean", "user-mean", "item-mean"):
        assert (
            rows[f"stars/baseline/{name}"]["metrics"]["RMSE"]["value"]
            == rows[f"rating/baseline/{name}"]["metrics"]["RMSE"]["value"]
        )


def test_notes_name_derived_fields_and_leaking_templates(done: pipeline.Run) -> None:
    notes = done.results["notes"]
    assert any("derived: titles" in note and "pseudonyms" in note for note in notes)
    leaks = [note for note in notes if "could reveal the answer" in note]
    assert len(leaks) == 2 and "explanation/user-title-feature" in leaks[0]
    assert "titles" in done.results["data"]["main"]["derived"]
    page = (done.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "Rating from a review" in page and "derived: titles" in page


def test_audit_has_no_leaks(study: Study) -> None:
    for family in FAMILIES:
        assert audit_training_rows(study, family, 60).verdict == "clean"
        assert audit_questions(study, family).verdict == "clean"
        assert audit_few_shot_examples(study, family).verdict == "clean"
    assert audit_profiles(study.data).verdict == "clean"


@pytest.mark.parametrize("part", range(3))
def test_audit_finds_text_sentence_and_headline(part: int, study: Study) -> None:
    held = study.data.holdouts("test")[0]
    review = study.data.dataset.reviews[held.user_id, held.item_id]
    text = (review.text, review.sentence, review.headline + " and more")[part]
    long = replace(review, headline="A headline that is long enough to tell " + marks(held.user_id, held.item_id)[2])
    data = replace(
        study.data,
        dataset=replace(study.data.dataset, reviews={**study.data.dataset.reviews, (held.user_id, held.item_id): long}),
    )
    segment = Segment("item", long.headline if part == 2 else text)
    assert list(_HeldOutTexts(data).shown(held.user_id, [segment]))
    assert not list(_HeldOutTexts(data).shown(held.user_id, [Segment("item", "a text that is in no review")]))


def test_no_training_row_has_words_of_held_out_reviews(study: Study) -> None:
    secrets = [mark for pair in study.data.held_out for mark in marks(*pair)]
    for family in FAMILIES:
        for row in islice(study.training_examples(family), 150):
            segments = [segment for message in row.messages for segment in message.segments] + list(row.answer)
            shown = "".join(segment.text for segment in segments).casefold()
            assert not [mark for mark in secrets if mark in shown]


def test_texts_of_tasks(study: Study) -> None:
    pair = next(iter(study.data.train.select("user_id", "item_id").iter_rows()))
    review = study.data.dataset.reviews[pair]

    def text(family: str) -> str:
        rows = study.task_data(family).train
        return str(rows.row(0, named=True)["text"])

    assert text("explanation") == review.sentence and text("review") == review.headline
    assert text("stars") == text("rating") == review.text
    assert study.task_data("review") is study.task_data("review")
