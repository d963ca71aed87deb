"""Settings of new models, and templates of bare codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrec.errors import RecipeError
from llmrec.index.table import ItemIndex, level_token
from llmrec.prompts.template import load_templates
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe, SequentialSection
from llmrec.tasks.sequential import SequentialTask
from llmrec.tasks.templates import select_task_templates
from tests.facts import Facts, raises
from tests.tasks.making import make
from tests.tasks.task_data import make_split

GOOD = "name: x\ndata: {source: movielens-100k}\ntasks:\n  sequential: {}\n"
NEW = GOOD + "train: {method: full}\nmodel:\n  name: new\n  shape: "


def load(folder: Path, text: str) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file)


def test_shape(tmp_path: Path) -> None:
    recipe = load(tmp_path, NEW + "{kind: encoder-decoder, width: 128, heads: 6, head_width: 64}\n")
    assert recipe.model.shape is not None and recipe.model.shape.head_width == 64
    # Six heads of 64 are wider than the model.
    assert recipe.model.shape.heads * recipe.model.shape.head_width != recipe.model.shape.width


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (NEW + "{widht: 3}\n", Facts("unknown-key", column="model.shape.widht", says="did you mean 'width'")),
        (NEW + "{width: 100, heads: 8}\n", Facts("contradiction", column="model.shape.heads")),
        (NEW + "{head_width: 8}\n", Facts("contradiction", column="model.shape.head_width")),
        (
            GOOD + "train: {method: full}\nmodel: {name: new}\n",
            Facts("contradiction", column="model.shape", says="set both, or neither"),
        ),
        (
            GOOD + "train: {method: full}\nmodel: {shape: {}}\n",
            Facts("contradiction", column="model.shape", says="model.name=new"),
        ),
        (
            NEW.replace("method: full", "method: lora") + "{}\n",
            Facts("contradiction", column="train.method", says="set train.method=full"),
        ),
    ],
)
def test_errors_name_key_and_advice(tmp_path: Path, text: str, facts: Facts) -> None:
    with raises(RecipeError, facts):
        load(tmp_path, text)


BARE = ("bare-codes", "bare-next-code")


def indexes() -> dict[str, ItemIndex]:
    items = sorted(make_split().dataset.items)
    names = tuple(level_token(0, n) for n in range(len(items)))
    return {
        "tokens": ItemIndex("token", {item: (names[n],) for n, item in enumerate(items)}, tokens=names),
        "numbers": ItemIndex("random", {item: (str(1000 + n),) for n, item in enumerate(items)}),
    }


def task(name: str, index: ItemIndex) -> SequentialTask:
    section = SequentialSection(templates=(name,), strategies=("search",))
    return make(SequentialTask, make_split(), section, load_templates("sequential"), seed=0, index=index)


@pytest.mark.parametrize("name", BARE)
def test_bare_codes_require_item_tokens(name: str) -> None:
    codes = indexes()
    assert load_templates("sequential")[name].bare
    assert task(name, codes["tokens"]).eval_templates == (name,)
    facts = Facts("contradiction", f"sequential/{name}", column="tasks.sequential.templates", says="scheme: token")
    with raises(RecipeError, facts):
        task(name, codes["numbers"])


def test_bare_templates_are_used_by_name_only() -> None:
    templates = load_templates("sequential")
    assert {name for name, template in templates.items() if template.bare} == set(BARE)
    for index in indexes().values():
        chosen = select_task_templates("sequential", SequentialSection(), templates, index)
        assert chosen.train and not any(template.bare for template in chosen.train)
        assert not set(chosen.evaluate) & set(BARE)
