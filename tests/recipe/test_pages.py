"""Hostile or malformed YAML gives one error with its line, without delay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llmrec.answer.strategy import parse_strategy_settings
from llmrec.errors import RecipeError
from llmrec.prompts.template import load_templates
from llmrec.recipe.load import detect_page_kind, load_benchmark, load_recipe, load_suite
from llmrec.recipe.pages import MAX_CHARACTERS
from tests.facts import Facts, raises

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 11)
)
ODD = [
    pytest.param(BOMB, Facts("too-large", line=5), id="aliases that unfold to billions"),
    pytest.param("x:\n- &a {b: *a}\n", Facts("too-large", line=2), id="a mapping of itself"),
    pytest.param("x: " + "[" * 500 + "]" * 500, Facts("too-large", line=1), id="nested brackets"),
    pytest.param("x: " + "[" * 50_000, Facts("too-large", line=1), id="many open brackets"),
    pytest.param("x: " + "y" * MAX_CHARACTERS, Facts("too-large"), id="a megabyte"),
    pytest.param("x: 2024-99-99\n", Facts("syntax", line=1, says="2024-99-99"), id="an impossible date"),
    pytest.param("x: !!int abc\n", Facts("syntax", line=1, says="'abc' is not a valid int"), id="letters as a number"),
    pytest.param("x: !!bool abc\n", Facts("syntax", line=1), id="letters as a boolean"),
    pytest.param("y: 1\nx: " + "9" * 5000, Facts("syntax", line=2, says="…"), id="5,000 digits"),
    pytest.param("x: " + "9" * 19, Facts("syntax", line=1), id="a number beyond 64 bits"),
    pytest.param("x: !!python/object/apply:os.system [ls]\n", Facts("syntax", line=1), id="an object"),
    pytest.param("? [a, b]\n: 3\n", Facts("syntax", line=1), id="a list as a key"),
    pytest.param("x: \0", Facts("syntax"), id="NUL"),
    pytest.param("".join(f"k{n}: 1\n" for n in range(20_000)), Facts("too-large", line=10_001), id="many keys"),
]


@pytest.mark.parametrize(("text", "facts"), ODD)
def test_malformed_yaml(text: str, facts: Facts, tmp_path: Path) -> None:
    page = tmp_path / "odd.yaml"
    page.write_text(text, encoding="utf-8")
    with raises(RecipeError, replace(facts, file=page)):
        load_recipe(str(page))
    assert detect_page_kind(page) == "recipe"


def load_template(page: str) -> object:
    return load_templates("rating", Path(page).parents[1])


@pytest.mark.parametrize("load", [load_suite, load_benchmark, load_template])
def test_malformed_yaml_in_other_pages(load: Callable[[str], object], tmp_path: Path) -> None:
    page = tmp_path / "rating" / "odd.yaml"
    page.parent.mkdir()
    for text, facts in ((BOMB, Facts("too-large", "odd.yaml", line=5)), ("x: !!int abc\n", Facts("syntax", line=1))):
        page.write_text(text, encoding="utf-8")
        with raises(RecipeError, facts):
            load(str(page))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (BOMB, "too-large"),
        ("2024-99-99", "bad-value"),
        ("!!int abc", "bad-value"),
        ("9" * 5000, "bad-value"),
    ],
)
def test_malformed_values_of_overrides(value: str, kind: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipes/movielens-100k/four-tasks.yaml", [f"seed={value}"])
    assert (caught.value.kind, caught.value.column) == (kind, "seed")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["a/" * 3000, "é" * 130])
def test_rejects_impossible_folder_names(name: str) -> None:
    with raises(RecipeError, Facts("bad-value", column="model.name")) as caught:
        load_recipe("recipes/movielens-100k/four-tasks.yaml", [f"model.name={name}"])
    assert len(str(caught.value)) < 1000


def test_malformed_values_of_options() -> None:
    with raises(RecipeError, Facts("too-large", column="eval.window")):
        parse_strategy_settings("window", ["eval.window=" + "[" * 5000])


def test_merge_key_is_not_a_duplicate(tmp_path: Path) -> None:
    page = tmp_path / "merged.yaml"
    page.write_text(
        "name: x\ndata: {source: movielens-100k}\ntasks:\n  sequential: &a {history: 7, weight: 2}\n"
        "  direct: {<<: *a, weight: 3}\n",
        encoding="utf-8",
    )
    direct = load_recipe(page).tasks.direct
    assert direct is not None
    assert (direct.history, direct.weight) == (7, 3)


@pytest.mark.parametrize(
    ("base", "kind"), [("a" * 5000, "missing-file"), ("broken.yaml", "syntax"), ("list.yaml", "wrong-format")]
)
def test_error_of_base_names_page(base: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("name: [\n", encoding="utf-8")
    (tmp_path / "list.yaml").write_text("- a\n", encoding="utf-8")
    page = tmp_path / "page.yaml"
    page.write_text(f"name: x\nbase: {base}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(page)
    assert caught.value.kind == kind
    assert Path(caught.value.file or "").name == Path(base).name
    assert str(caught.value).startswith(f"{page}, line 2: base: ")


def test_wrong_value_of_base_names_both_pages(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(
        "name: b\n\ndata: {source: movielens-100k}\ntasks: {rating: {}}\ntrain:\n  steps: many\n", encoding="utf-8"
    )
    page = tmp_path / "page.yaml"
    page.write_text("base: below.yaml\nname: x\n", encoding="utf-8")
    facts = Facts("bad-value", tmp_path / "below.yaml", line=6, column="train.steps", says=f"is the base of {page}")
    with raises(RecipeError, facts):
        load_recipe(page)


ADDRESSES = [
    *("http://[/v1", "http://127.0.0.1:abc/v1", "http://[::1]:99999/v1", "http://a:0/v1", "http://:80/v1"),
    *("http://a..b/v1", "http://[1::2::3]/v1", "ftp://a/v1", f"http://{'a' * 64}/v1", f"http://{'a.' * 200}a/v1"),
    *("http://u:p@a/v1", "http://a/v1?key=x"),
]


@pytest.mark.parametrize("url", ADDRESSES)
def test_rejects_malformed_addresses(url: str) -> None:
    server = ["eval.arms=[zero-shot]", "eval.backend=openai", "eval.server.model=m", f"eval.server.url={url}"]
    with raises(RecipeError, Facts("contradiction", column="eval.server.url")) as caught:
        load_recipe("recipes/movielens-100k/four-tasks.yaml", server)
    assert url not in str(caught.value)


@pytest.mark.parametrize("url", ["http://[::1]:8000/v1", "https://api.example.com/v1", "http://my_host:80"])
def test_valid_addresses(url: str) -> None:
    server = ["eval.arms=[zero-shot]", "eval.backend=openai", "eval.server.model=m", f"eval.server.url={url}"]
    section = load_recipe("recipes/movielens-100k/four-tasks.yaml", server).eval.server
    assert section is not None
    assert section.url == url


UNREASONABLE = [
    *("eval.bootstrap=1000000", "eval.users=99999999999999999999", "seed=4294967296", "name=" + "a" * 300),
    *("train.learning_rate=.inf", "train.learning_rate=.nan", "train.learning_rate=yes", "train.steps=1:20", "seed=on"),
    *("model.max_length=1", "model.shape.width=1000000000", "train.batch_tokens=1"),
]


@pytest.mark.parametrize("override", UNREASONABLE)
def test_rejects_unreasonable_values(override: str) -> None:
    with raises(RecipeError, Facts("bad-value", column=override.partition("=")[0])):
        load_recipe("recipes/quickstart.yaml", [override])


def test_numbers_and_booleans() -> None:
    changes = ["train.steps=010", "eval.enforce_eager=yes", "seed=0x10", "train.learning_rate=1.5e-3"]
    recipe = load_recipe("recipes/quickstart.yaml", changes)
    assert (recipe.train.steps, recipe.seed, recipe.train.learning_rate) == (10, 16, 0.0015)
    assert recipe.eval.enforce_eager


@pytest.mark.parametrize(("key", "path"), [("prompts", "/dev/zero"), ("plugins", "/dev/null")])
def test_rejects_devices(key: str, path: str) -> None:
    with raises(RecipeError, Facts("wrong-format", path, column=key)):
        load_recipe("recipes/quickstart.yaml", [f"{key}={path}"])


def test_error_lists_some_of_many_faults(tmp_path: Path) -> None:
    page = tmp_path / "page.yaml"
    page.write_text("name: x\n" + "".join(f"k{n}: 1\n" for n in range(2000)))
    with raises(RecipeError, Facts("missing-key", says="and 1,982 more")) as caught:
        load_recipe(page)
    assert len(str(caught.value)) < 5000
