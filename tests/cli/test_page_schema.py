"""The JSON schemas of recipes and suites for editors: up to date, valid for every shipped file, and strict."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from llmrec.cli.schema import PageKind, schema_text
from llmrec.recipe.load import load_recipe
from llmrec.resources import resource
from tests.test_cli import HEADER, rows

pytest.importorskip("llmrec.start", reason="the extension is not there")

from llmrec.start.init import write_recipe

RECIPES, SUITES = resource("recipes").rglob("*.yaml"), resource("eval", "suites").glob("*.yaml")
PAGES = {"recipe": sorted(RECIPES), "suite": sorted(SUITES)}
LINE = "# yaml-language-server: $schema="


def stored(kind: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(resource("docs", "schema", f"{kind}.json").read_text(encoding="utf-8"))
    return result


@pytest.mark.parametrize("kind", ["recipe", "suite"])
def test_schema_is_current_and_accepts_every_shipped_page(kind: PageKind) -> None:
    assert resource("docs", "schema", f"{kind}.json").read_text(encoding="utf-8") == schema_text(kind), "run make docs"
    Draft7Validator.check_schema(stored(kind))
    reads = Draft7Validator(stored(kind))
    assert len(PAGES[kind]) > 25
    for page in PAGES[kind]:
        text = page.read_text(encoding="utf-8")
        assert [error.message for error in reads.iter_errors(yaml.safe_load(text))] == [], page
        first = text.splitlines()[0]
        assert first.startswith(LINE), page
        target = (page.parent / first.removeprefix(LINE)).resolve()
        assert target == resource("docs", "schema", f"{kind}.json").resolve(), page


GOOD = """
name: shop
data: {source: table, path: shop.csv, split: {kind: last_share}}
tasks:
  rating: {baselines: [mf, {name: svd, factors: 5}], strategies: [parsed], templates: [list-ratings]}
  sequential:
"""


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("name: shop\n", "", []),
        ("source: table", "source: tabel", ["data", "source"]),
        ("source: table", "source: table, nouns: films", ["data"]),
        ("sequential:", "sequentail:", ["tasks"]),
        ("list-ratings", "list-ratting", ["tasks", "rating", "templates", 0]),
        ("[parsed]", "[search]", ["tasks", "rating", "strategies", 0]),
        ("factors: 5", "factor: 5", ["tasks", "rating", "baselines", 1]),
        ("factors: 5", "factors: many", ["tasks", "rating", "baselines", 1, "factors"]),
    ],
)
def test_schema_locates_errors(old: str, new: str, where: list[str | int]) -> None:
    reads = Draft7Validator(stored("recipe"))
    assert list(reads.iter_errors(yaml.safe_load(GOOD))) == []
    assert old in GOOD
    result = list(reads.iter_errors(yaml.safe_load(GOOD.replace(old, new))))
    paths = [list(each.absolute_path) for error in result for each in (error, *(error.context or ()))]
    assert where in paths


def test_schema_describes_keys() -> None:
    result = stored("recipe")
    assert result["properties"]["train"]["description"] == "Fine-tuning."
    keys = result["$defs"]["TrainSection"]["properties"]
    assert "lora8" in keys["method"]["description"] and "lora8" in keys["method"]["enum"]
    # A recipe with a base needs no other key; names of plug-ins are valid.
    reads, plugin = Draft7Validator(result), {**yaml.safe_load(GOOD), "data": {"source": "mine:load"}}
    for page in ({"base": "shop.yaml", "train": {"steps": 3}}, plugin):
        assert list(reads.iter_errors(page)) == []


def test_init_writes_the_schema_next_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shop.csv").write_text(HEADER + "\n".join(rows()) + "\n", encoding="utf-8")
    result = write_recipe("shop.csv")
    text = result.recipe.read_text(encoding="utf-8")
    named = re.match(rf"{re.escape(LINE)}(\S+)\n", text)
    assert named is not None
    assert json.loads(Path(named[1]).read_text(encoding="utf-8")) == stored("recipe")
    assert list(Draft7Validator(stored("recipe")).iter_errors(yaml.safe_load(text))) == []
    assert load_recipe(result.recipe).name == "shop"
    Path(named[1]).write_text("mine", encoding="utf-8")
    write_recipe("shop.csv", force=True)
    assert Path(named[1]).read_text(encoding="utf-8") == "mine"
