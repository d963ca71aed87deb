"""Paths of a recipe: relative to the working folder, then to the folder of the recipe."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

import llmrec
from llmrec.errors import DataError, LlmrecError, ModelError
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import dump_recipe, load_recipe
from llmrec.recipe.schema import Recipe
from tests.facts import Facts, raises
from tests.test_cli import HEADER, rows

TABLE = HEADER + "\n".join(rows()) + "\n"


def page(folder: Path, path: str, **more: str) -> Path:
    folder.mkdir(exist_ok=True)
    columns = "columns: {user: user, item: item, rating: stars, time: day, title: title}"
    lines = "".join(f"{key}: {value}\n" for key, value in more.items())
    file = folder / "shop.yaml"
    file.write_text(
        f"name: shop\ndata:\n  source: table\n  path: {path!r}\n  {columns}\ntasks: {{rating: {{}}}}\n"
        f"eval: {{backend: fake, scorer: fake, arms: [zero-shot]}}\n{lines}"
    )
    return file


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder below the working folder, with a table."""
    monkeypatch.chdir(tmp_path)
    page(tmp_path / "shop", "orders.csv")
    (tmp_path / "shop" / "orders.csv").write_text(TABLE)
    return Path("shop")


def count(recipe: Recipe) -> int:
    return len(build_study(recipe).cases("rating"))


def test_path_in_the_folder_of_the_recipe(shop: Path) -> None:
    recipe = load_recipe(shop / "shop.yaml")
    assert recipe.data.path == "shop/orders.csv"
    assert count(recipe) == 8
    # A run folder has the path from the working folder.
    assert recipe.data.path in dump_recipe(recipe)


def test_working_folder_comes_first(shop: Path) -> None:
    Path("orders.csv").write_text(HEADER + "\n".join(rows()[:24]) + "\n")
    recipe = load_recipe(shop / "shop.yaml")
    assert recipe.data.path == "orders.csv"
    assert count(recipe) == 4


@pytest.mark.parametrize("path", ["order*.csv", "sqlite:///shop.db"])
def test_patterns_and_databases(shop: Path, path: str) -> None:
    more = {}
    if path.startswith("sqlite"):
        with sqlite3.connect(shop / "shop.db") as db:
            db.execute("create table t (user, item, stars, day, title)")
            db.executemany("insert into t values (?, ?, ?, ?, ?)", [row.split(",") for row in rows()])
        db.close()
        more = ["data.query=select * from t"]
    assert count(load_recipe(page(shop, path), more or ())) == 8


def test_paths_of_a_base(shop: Path) -> None:
    other = Path("other")
    other.mkdir()
    (other / "child.yaml").write_text("base: ../shop/shop.yaml\nname: child\n")
    assert count(load_recipe(other / "child.yaml")) == 8


def test_missing_path_names_both_folders(shop: Path) -> None:
    recipe = load_recipe(page(shop, "gone.csv"))
    assert recipe.data.path == "gone.csv"
    folders = (str(Path.cwd()), str(shop.resolve()))
    with raises(DataError, Facts("missing-file", "gone.csv", says=folders)):
        build_study(recipe)


def test_override_is_relative_to_the_working_folder(shop: Path) -> None:
    recipe = load_recipe(shop / "shop.yaml", ["data.path=orders.csv"])
    with pytest.raises(LlmrecError) as caught:
        build_study(recipe)
    assert (caught.value.kind, caught.value.file) == ("missing-file", "orders.csv")
    assert "to the recipe's folder" not in str(caught.value)


def test_names_are_no_paths(shop: Path) -> None:
    """A folder next to a recipe may have the name of a data set or a model."""
    (shop / "table").mkdir()
    (shop / "some").mkdir()
    recipe = load_recipe(page(shop, "orders.csv", model="{name: some}"))
    assert (recipe.data.source, recipe.model.name) == ("table", "some")


def test_model_folder_in_the_folder_of_the_recipe(shop: Path, llama_folder: Path) -> None:
    (shop / "model").symlink_to(llama_folder)
    file = page(shop, "orders.csv", model="{name: ./model}")
    assert llmrec.check(file).cases == {"rating": 8}
    (shop / "model").unlink()
    with raises(ModelError, Facts("missing-file", "./model", column="model.name", says=str(shop.resolve()))):
        llmrec.check(load_recipe(file))
