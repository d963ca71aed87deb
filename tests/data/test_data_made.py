from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import polars as pl
import pytest

from eval.benchmarks.make_reviews import COLUMNS, generate, main, to_csv
from llmrec.data.sets.table import load
from llmrec.data.split import split
from llmrec.data.stats import statistics
from llmrec.errors import DataError
from llmrec.recipe.schema import Columns, DataSection, Split
from llmrec.resources import resource
from tests.facts import Facts, raises

SECTION = DataSection(source="made-reviews")


@pytest.fixture(scope="module")
def shipped() -> pl.DataFrame:
    return pl.read_csv(resource("recipes", "made", "reviews.csv"))


def test_the_shipped_file_is_made_again_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "again.csv"
    assert main([str(path)]) == 0
    assert path.read_bytes() == resource("recipes", "made", "reviews.csv").read_bytes()


def test_the_command_in_the_readme_works(tmp_path: Path) -> None:
    command = "python -m eval.benchmarks.make_reviews"
    assert command in resource("recipes", "made", "README.md").read_text(encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "eval.benchmarks.make_reviews"], capture_output=True, check=True, timeout=60
    )
    assert done.stdout == resource("recipes", "made", "reviews.csv").read_bytes()


def test_another_seed_makes_another_table() -> None:
    assert to_csv(generate(1)) != to_csv(generate(0))
    assert generate(1).equals(generate(1))


def test_its_shape(shipped: pl.DataFrame) -> None:
    assert tuple(shipped.columns) == COLUMNS
    assert 1300 <= shipped.height <= 1600
    assert (shipped["user_id"].n_unique(), shipped["item_id"].n_unique(), shipped["title"].n_unique()) == (120, 40, 40)
    assert set(shipped["rating"]) == {1, 2, 3, 4, 5}
    assert shipped.select("user_id", "item_id").is_duplicated().sum() == 0
    assert shipped["timestamp"].is_sorted()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_texts_are_short_sentences_about_their_product(seed: int) -> None:
    for title, text in generate(seed).select("title", "text").iter_rows():
        assert 8 <= len(text.split()) <= 20
        assert text[0].isupper() and text.endswith(".") and "{" not in text
        assert title.split(" ", 2)[2].lower() in text


def test_texts_reflect_rating_and_a_stable_preference(shipped: pl.DataFrame) -> None:
    aspects = ("quiet", "easy to clean", "durable", "compact", "quick", "good-looking", "comfortable to hold", "safe")
    wishes: dict[str, Counter[str]] = defaultdict(Counter)
    for user, text in shipped.select("user_id", "text").iter_rows():
        wishes[user].update(aspect for aspect in aspects if aspect in text)
    assert all(1 <= len(found) <= 2 for found in wishes.values())
    assert len({found.most_common(1)[0][0] for found in wishes.values()}) == len(aspects)
    blamed = shipped.filter(pl.col("text").str.contains("but this|pity|sadly|Not happy|although|mind|even so|not only"))
    assert blamed["rating"].max() == 2
    assert shipped.filter(pl.col("text").str.contains("just right|It helps|Happy with it"))["rating"].min() >= 4


def test_the_user_says_more_about_a_rating_than_chance(shipped: pl.DataFrame) -> None:
    """Knowing what the writer cares about must help; this is what a model has to find in a history."""
    overall = float(shipped["rating"].std())  # type: ignore[arg-type]
    within = shipped.with_columns(gap=pl.col("rating") - pl.col("rating").mean().over("item_id"))
    assert 0.8 * overall < float(within["gap"].std()) < overall  # type: ignore[arg-type]


def test_the_source() -> None:
    data = load(SECTION, seed=0)
    assert (data.name, data.noun, data.made) == ("made-reviews", "kitchen products", True)
    assert data.rating_scale == (1.0, 5.0) and data.interactions["text"].null_count() == 0
    item = data.items["k01"]
    assert set(item.fields) == {"category", "brand", "price"} and item.fields["brand"] in item.title
    assert data.provenance["source"] == "made-reviews"
    assert load(SECTION.model_copy(update={"noun": "things"}), seed=0).noun == "things"
    assert statistics(split(data, Split(), seed=0))["test"] == 120


@pytest.mark.parametrize("keys", [{"path": "x.csv"}, {"items": "x.csv"}, {"columns": Columns(user="u")}])
def test_it_takes_no_files(keys: dict[str, object]) -> None:
    with raises(DataError, Facts("contradiction", column="data")):
        load(SECTION.model_copy(update=keys), seed=0)
