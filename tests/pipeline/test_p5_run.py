"""All tasks of P5 in one run on a tiny random model, and its evaluation on another domain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrec.answer.prompting import rank_requests
from llmrec.answer.strategy import select_ranking_strategy
from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.data.requests import parse_request
from llmrec.errors import RecipeError
from llmrec.exports.card_facts import example_prompt
from llmrec.models.load import load_model, load_tokenizer
from llmrec.pipeline import bundle
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.leaks import audit_questions, audit_training_rows
from llmrec.pipeline.study import Study, build_study
from llmrec.prompts.template import load_templates
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import ModelSection, Recipe
from llmrec.types import Ranking
from tests.facts import Facts, raises
from tests.review_files import records, write

pytest.importorskip("trl", reason="the train extra is not installed")

PAGE = """
name: p5
data: {{source: amazon-reviews, path: {path}, noun: things}}
model: {{name: {model}, dtype: float32, max_length: 2048}}
{more}
train: {{steps: 3, batch_tokens: 2048, max_row_tokens: 1500, valid_rows: 3, lora: {{top_layers: 1}}}}
eval: {{users: 3, bootstrap: 20, backend: hf, candidates: {{count: 3}}, arms: [tuned]}}
"""
FAMILIES = """
index: {scheme: sequential}
tasks:
  rating: {templates: [p5], eval_templates: [name-item, title-name], strategies: [expected]}
  ctr: {templates: [p5], eval_templates: [name-title]}
  sequential: {templates: [p5], eval_templates: [user-history, history-name]}
  direct:
    templates: [p5]
    eval_templates: [name-history-among, user-choose, user-item]
    strategies: [likelihood, pointwise-yes]
  explanation: {templates: [p5], eval_templates: [name-title], max_tokens: 4}
  review: {templates: [p5], eval_templates: [name-headline], max_tokens: 4}
  stars: {templates: [p5], eval_templates: [user-stars, name-stars], strategies: [expected]}
"""
ANOTHER_DOMAIN = """
tasks:
  ctr: {eval_templates: [new-item-user, new-item-name]}
  rating: {eval_templates: [new-item-name, new-item-user], strategies: [expected]}
  explanation: {eval_templates: [new-item-name, new-item-feature-stars, new-title-name], max_tokens: 4}
"""


def read(folder: Path, path: Path, model: Path, more: str, *changes: str) -> Recipe:
    page = folder / "page.yaml"
    page.write_text(PAGE.format(path=path, model=model, more=more), encoding="utf-8")
    return load_recipe(str(page), changes)


@pytest.fixture(scope="module")
def recipe(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipe]:
    folder = tmp_path_factory.mktemp("p5")
    path = write(folder / "reviews.jsonl", records())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_CACHE", str(folder))
        yield read(folder, path, llama_folder, FAMILIES)


@pytest.fixture(scope="module")
def study(recipe: Recipe) -> Study:
    return build_study(recipe)


@pytest.fixture(scope="module")
def done(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Run:
    return pipeline.run(recipe, tmp_path_factory.mktemp("run") / "r", quiet=True)


def test_all_tasks_train_and_templates_have_fitting_strategies(done: pipeline.Run) -> None:
    rows = {row["id"]: row for row in done.results["rows"] if row["arm"] == "tuned"}
    assert {name for name in rows if name.startswith("direct")} == {
        "direct/tuned/likelihood/name-history-among",
        "direct/tuned/likelihood/user-choose",
        "direct/tuned/pointwise-yes/user-item",
    }
    for name in ("user-history", "history-name"):
        assert rows[f"sequential/tuned/likelihood/{name}"]["parse_rate"] == 1.0
    assert {name.partition("/")[0] for name in rows} == set(done.results["training"]["rows"])
    assert len(done.results["training"]["rows"]) == 7 and all(done.results["training"]["rows"].values())
    assert {name for name, row in rows.items() if row["template_use"] == "unseen"} == {
        "rating/tuned/expected/title-name",
        "sequential/tuned/likelihood/history-name",
        "direct/tuned/likelihood/user-choose",
        "stars/tuned/expected/name-stars",
    }
    audit = json.loads((done.folder / "audit.json").read_text("utf-8"))
    assert not [check for check in audit["checks"] if check["verdict"] == "leak"]


def test_audit_checks_rows_and_questions_of_p5(study: Study) -> None:
    for family in ("rating", "ctr", "sequential", "direct", "explanation"):
        assert audit_training_rows(study, family, 200).verdict == "clean"
        assert audit_questions(study, family).verdict == "clean"


def test_requests_use_a_strategy_that_fits_the_template(done: pipeline.Run) -> None:
    stored = bundle.read(str(done.folder / "merged"))
    way = select_ranking_strategy(stored, task="direct")
    assert (way.template, way.strategy, way.by_title) == ("name-history-among", "likelihood", False)
    assert select_ranking_strategy(stored, template="direct/user-item").strategy == "pointwise-yes"
    assert select_ranking_strategy(stored, template="direct/shortlist").strategy == "label"
    assert select_ranking_strategy(stored, task="sequential").by_title
    with raises(RecipeError, Facts("contradiction", "direct/user-item", says=("'label'", "use 'pointwise-yes'"))):
        select_ranking_strategy(stored, template="direct/user-item", strategy="label")
    with raises(RecipeError, Facts("contradiction", "direct/shortlist", says=("'likelihood'", "use 'label'"))):
        select_ranking_strategy(stored, template="direct/shortlist", strategy="likelihood")


def test_request_is_ranked_by_codes(done: pipeline.Run) -> None:
    folder = str(done.folder / "merged")
    stored = bundle.read(folder)
    section = ModelSection(name=folder, dtype="float32")
    encoder = Encoder(load_tokenizer(folder, section), max_length=2048)
    backend = HFBackend(load_model(folder, section), encoder)
    items = [{"item_id": f"B{n:02d}", "title": f"Thing {n}"} for n in range(8)]
    record = {"id": "r", "user_id": "U01", "history": items[:2], "candidates": items[2:]}
    request = parse_request(record, 1, None)
    for template in ("name-history-among", "user-item"):
        way = select_ranking_strategy(stored, template=f"direct/{template}")
        (answer,) = rank_requests(stored, [request], way=way, backend=backend, encoder=encoder, batch=1)
        assert isinstance(answer, Ranking), answer
        assert sorted(answer.items) == [f"B{n:02d}" for n in range(2, 8)]
        assert answer.cost.forwards == (1 if template == "name-history-among" else 6)


@pytest.mark.parametrize("template", ["name-history-among", "user-item", "name-title"])
def test_model_card_shows_prompt_of_template(done: pipeline.Run, template: str) -> None:
    stored = bundle.read(str(done.folder / "merged"))
    section = stored.tasks.present()["direct"].model_copy(update={"eval_templates": (template,), "strategies": ()})
    shown = example_prompt(
        {"direct": section}, stored.templates, noun="things", scale=stored.rating_scale, seed=0, index=stored.index
    )
    words = "".join(message.text for message in shown.prompt.messages)
    assert (shown.candidates[0] in words) == (template == "name-title")
    assert (shown.max_tokens > 16) == (template == "name-history-among")


def test_tuned_model_is_evaluated_on_another_domain(
    done: pipeline.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Family Z: shared users, items with fields, and no training in that domain."""
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    reviews = [{**record, "asin": record["asin"].replace("B", "C")} for record in records()]
    path = write(tmp_path / "other.jsonl", reviews)
    names = sorted({record["asin"] for record in reviews})
    table = ["item_id,title,brand,price", *(f"{name},Thing {name},Maker {name},{n}.50" for n, name in enumerate(names))]
    (tmp_path / "items.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    changes = (f"data.items={tmp_path / 'items.csv'}", "data.columns.fields=[brand, price]", "eval.arms=[zero-shot]")
    other = read(tmp_path, path, done.folder / "merged", ANOTHER_DOMAIN, *changes)
    ran = pipeline.run(other, tmp_path / "other", quiet=True)
    rows = {row["id"]: row for row in ran.results["rows"] if row["arm"] == "zero-shot"}
    expected = {
        template.id: number
        for family in ("ctr", "rating", "explanation")
        for template in load_templates(family).values()
        if (number := template.sets.get("p5", "")).startswith("Z")
    }
    assert {row["template"] for row in rows.values()} == set(expected) and len(expected) == 7
    assert all(row["template_use"] == "unseen" for row in rows.values())
    assert all(0 < row["metrics"]["RMSE"]["value"] < 4 for row in rows.values() if row["task"] == "rating")
    shown = {example["template"]: example["prompt"] for example in ran.results["examples"]}
    for template, number in expected.items():
        assert "Thing C" in shown[template]
        assert ("brand: Maker C" in shown[template] and "price: " in shown[template]) == (number != "Z-7")
