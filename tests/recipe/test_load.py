"""Loading recipes: errors with file, line and key; overrides; bases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from llmrec.errors import RecipeError
from llmrec.recipe.load import as_recipe, dump_recipe, load_recipe, load_suite, recipe_hash
from llmrec.resources import resource
from tests.facts import Facts, raises

GOOD = "name: x\ndata: {source: movielens-100k}\ntasks:\n  sequential: {}\ntrain:\n  learning_rate: 1e-4\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_shipped_recipes_load() -> None:
    recipes = sorted(resource("recipes").rglob("*.yaml"))
    assert resource("recipes", "quickstart.yaml") in recipes
    for file in recipes:
        assert load_recipe(file).name


def test_numbers_as_yaml_writes_them(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, GOOD)).train.learning_rate == 1e-4


def test_shipped_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/quickstart.yaml").name == "quickstart"


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (GOOD + "  lora:\n    rnak: 3\n", Facts("unknown-key", line=8, column="train.lora.rnak", says="mean 'rank'")),
        (GOOD + "  steps: 0\n", Facts("bad-value", line=7, column="train.steps", says="greater than 0")),
        (GOOD + "  steps: many\n", Facts("bad-value", line=7, column="train.steps", says="'many'")),
        ("name: x\ntasks: {rating: {}}\n", Facts("missing-key", column="data")),
        (GOOD.replace("\n  sequential: {}", " {}"), Facts("contradiction", column="tasks", says="at least one of")),
        (GOOD + "train:\n  steps: 3\n", Facts("duplicate", line=7, column="train")),
        (GOOD + "  method: full\n  lora: {rank: 4}\n", Facts("contradiction", column="train.lora", says="full")),
        ("name: [\n", Facts("syntax", line=2)),
        ("", Facts("wrong-format")),
        ("- a\n", Facts("wrong-format")),
        (GOOD.replace("name: x", "name: ../x"), Facts("bad-value", line=1, column="name")),
    ],
)
def test_errors_name_line_and_key(tmp_path: Path, text: str, facts: Facts) -> None:
    file = write(tmp_path, text)
    with raises(RecipeError, replace(facts, file=file)):
        load_recipe(file)


def test_overrides(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    recipe = load_recipe(file, ["train.steps=7", "eval.cutoffs=[1, 3]", "tasks.rating={}", "model.revision="])
    assert (recipe.train.steps, recipe.eval.cutoffs, recipe.model.revision) == (7, (1, 3), None)
    assert set(recipe.tasks.present()) == {"rating", "sequential"}
    parts = ("override 'train.stepz=7'", "did you mean 'steps'")
    with raises(RecipeError, Facts("unknown-key", file, column="train.stepz", says=parts)) as caught:
        load_recipe(file, ["train.stepz=7"])
    assert caught.value.line is None
    with raises(RecipeError, Facts("syntax", column="train.steps", says="key=value")):
        load_recipe(file, ["train.steps"])
    with raises(RecipeError, Facts("syntax", column="=7")):
        load_recipe(file, ["=7"])


def test_base(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    child = tmp_path / "child.yaml"
    child.write_text("base: recipe.yaml\nname: y\ntrain: {steps: 9}\n", encoding="utf-8")
    recipe = load_recipe(child)
    assert (recipe.name, recipe.train.steps, recipe.train.learning_rate) == ("y", 9, 1e-4)
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("base: child.yaml\n", encoding="utf-8")
    with raises(RecipeError, Facts("contradiction", grandchild, column="base")):
        load_recipe(grandchild)


def test_dump_has_every_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    text = dump_recipe(recipe)
    assert "max_grad_norm" in text
    again = load_recipe(write(tmp_path, text))
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe) != recipe_hash(recipe.model_copy(update={"seed": 1}))


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with raises(RecipeError, Facts("missing-file", "no.yaml", says=("does not exist", "recipes/quickstart.yaml"))):
        load_recipe(tmp_path / "no.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe name: x")
    with raises(RecipeError, Facts("encoding", "b.yaml")):
        load_recipe(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("name", "close"),
    [("mine.yml", "mine.yaml"), ("recipes/quikstart.yaml", "recipes/quickstart.yaml"), ("other.yaml", None)],
)
def test_misspelled_page_names_the_closest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, close: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, GOOD).rename(tmp_path / "mine.yaml")
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert ("did you mean" in str(caught.value)) is bool(close) and len(str(caught.value)) < 200
    assert close is None or f"did you mean '{close}'" in str(caught.value)


@pytest.mark.parametrize("override", ["data.colums.user=thing", "evl.server.key=sk-abc"])
def test_unknown_section_in_override(tmp_path: Path, override: str) -> None:
    key, _, value = override.partition("=")
    with raises(RecipeError, Facts("unknown-key", says=(f"override of {key}: ", "did you mean"))) as caught:
        load_recipe(write(tmp_path, GOOD), [override])
    assert value not in str(caught.value)


def test_single_override(tmp_path: Path) -> None:
    page = write(tmp_path, GOOD)
    assert load_recipe(page, "train.steps=5").train.steps == 5
    with raises(RecipeError, Facts("bad-value", column="eval.arms", says="write a list in brackets")):
        load_recipe(page, "eval.arms=none")


def test_wrong_list_entry_is_one_error(tmp_path: Path) -> None:
    page = tmp_path / "s.yaml"
    page.write_text("suite: s\ndata: {source: movielens-100k}\nseeds: [a]\nrows: [{baseline: random}]\n")
    with pytest.raises(RecipeError) as caught:
        load_suite(page)
    assert "seeds.0" in str(caught.value) and "at least 1" not in str(caught.value)


def test_overrides_may_be_a_mapping() -> None:
    """Values keep their types, also those that YAML would change."""
    changed = {"train.steps": 5, "train.learning_rate": 1e-5, "train.start": None, "description": "yes: [no]"}
    changed |= {"eval.arms": ["zero-shot"], "data.filter": {"min_rating": 4}}
    page = "recipes/quickstart.yaml"
    for recipe in (
        load_recipe(page, changed),
        as_recipe(page, changed),
        as_recipe(load_recipe(page), changed),
        as_recipe(as_recipe(yaml.safe_load(Path(page).read_text())), changed),
    ):
        assert (recipe.train.steps, recipe.train.learning_rate, recipe.train.start) == (5, 1e-5, None)
        assert (recipe.description, recipe.eval.arms, recipe.data.filter.min_rating) == ("yes: [no]", ("zero-shot",), 4)
    with raises(RecipeError, Facts("unknown-key", "quickstart.yaml", column="train.stpes", says="'steps'")):
        load_recipe(page, {"train.stpes": 5})
