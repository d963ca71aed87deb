from __future__ import annotations

from pathlib import Path

import pytest

from eval.benchmarks.make_reviews import generate, main, to_csv
from llmrec.data.sets.table import load_data
from llmrec.data.split import split_dataset
from llmrec.data.stats import statistics
from llmrec.errors import DataError
from llmrec.recipe.schema import Columns, DataSection, Split
from llmrec.resources import resource
from tests.facts import Facts, raises

SECTION = DataSection(source="made-reviews")


def test_shipped_file_is_reproduced_exactly(tmp_path: Path) -> None:
    path = tmp_path / "again.csv"
    assert main([str(path)]) == 0
    assert path.read_bytes() == resource("recipes", "made", "reviews.csv").read_bytes()
    readme = resource("recipes", "made", "README.md").read_text(encoding="utf-8")
    assert "python -m eval.benchmarks.make_reviews" in readme


def test_seed_changes_table() -> None:
    assert to_csv(generate(1)) != to_csv(generate(0))
    assert generate(1).equals(generate(1))


def test_source() -> None:
    data = load_data(SECTION, seed=0)
    assert (data.name, data.noun, data.made) == ("made-reviews", "kitchen products", True)
    assert data.rating_scale == (1.0, 5.0) and data.interactions["text"].null_count() == 0
    item = data.items["k01"]
    assert set(item.fields) == {"category", "brand", "price"} and item.fields["brand"] in item.title
    assert data.provenance["source"] == "made-reviews"
    assert load_data(SECTION.model_copy(update={"noun": "things"}), seed=0).noun == "things"
    assert statistics(split_dataset(data, Split(), seed=0))["test"] == 120


@pytest.mark.parametrize("keys", [{"path": "x.csv"}, {"items": "x.csv"}, {"columns": Columns(user="u")}])
def test_rejects_files(keys: dict[str, object]) -> None:
    with raises(DataError, Facts("contradiction", column="data")):
        load_data(SECTION.model_copy(update=keys), seed=0)
