"""New items of a run: held out by the split, with similar items and the lists that contain them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.errors import ModelError
from llmrec.pipeline import examples
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.examples import SHOWN_RANKS
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import load_stored_recipe

USERS, ITEMS, PER_USER = 60, 30, 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run baselines on data with a fifth of the items held out."""
    folder, rng = tmp_path_factory.mktemp("new"), np.random.default_rng(0)
    chosen = [rng.permutation(ITEMS)[:PER_USER].tolist() for _ in range(USERS)]
    rows = [(f"u{user}", f"i{item}", float(at)) for user, items in enumerate(chosen) for at, item in enumerate(items)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    entries = pl.DataFrame(
        {"item_id": [f"i{n}" for n in range(ITEMS)], "title": [f"Kind {n % 3}" for n in range(ITEMS)]}
    )
    recipe = {
        "data": {"source": "table", "noun": "things", "split": {"kind": "cold_items", "test": 0.2, "valid": 0.1}},
        "tasks": {"sequential": {"baselines": ["random", "popularity", "item-knn", "markov-1"]}},
        "eval": {"arms": [], "candidates": {"kind": "catalogue"}},
        "encoder": "chance",
    }
    return pipeline.run(recipe, folder / "run", data=frame, items=entries, quiet=True)


def test_new_items_are_the_held_out_ones(run: Any) -> None:
    newcomers, lines = run.results["newcomers"], pl.read_parquet(run.folder / "predictions.parquet")
    one = lines.filter(pl.col("predictor") == "random")
    assert newcomers and all(each["task"] == "sequential" for each in newcomers)
    for each in newcomers:
        item = each["item"]["id"]
        assert set(one.filter(pl.col("item_id") == item)["item_training"]) == {0}
        assert each["wanted"] == (one["item_id"] == item).sum() > 0
        # Random vectors have no meaning, but equal words have equal vectors.
        assert each["neighbours"][0]["title"] == each["item"]["title"] and each["neighbours"][0]["cosine"] > 0.99


def test_lists_match_predictions(run: Any) -> None:
    lines, seen = pl.read_parquet(run.folder / "predictions.parquet"), 0
    for each in run.results["newcomers"]:
        for name, count in each["lists"].items():
            rows = lines.filter(pl.col("row_id") == name)
            firsts = [json.loads(parsed)["items"][:SHOWN_RANKS] for parsed in rows["parsed"]]
            assert count == sum(each["item"]["id"] in first for first in firsts)
            visits = each["visits"].get(name, [])
            assert bool(visits) == bool(count) and len({visit["user"]["id"] for visit in visits}) == len(visits)
            for visit in visits:
                users = zip(rows["user_id"], firsts, strict=True)
                theirs = [first for user, first in users if user == visit["user"]["id"]]
                assert any(
                    first[visit["place"] - 1] == each["item"]["id"] for first in theirs if len(first) >= visit["place"]
                )
                seen += 1
    assert seen


def test_neighbours_are_empty_without_encoder(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise ModelError("no text encoder", kind="missing-file")

    monkeypatch.setattr(examples, "lazy_item_vectors", none)
    study = build_study(load_stored_recipe(run.folder))
    assert examples._similar_items(study, "sequential", ["i0", "i1"]) == {"i0": (), "i1": ()}
