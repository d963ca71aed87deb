"""`llmrec.fit`: frames, recommendations, evaluation, comparison and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import llmrec
from llmrec.answer.loaded import Loaded
from llmrec.baselines.base import Catalogue, InteractionLog, NoParameters, ScoredBaseline, item_counts
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError, LlmrecError, RecipeError
from tests.facts import Facts, raises

pytest.importorskip("llmrec.start", reason="the extension is not there")

ROWS = [
    {"buyer": f"u{user}", "article": f"i{(user + step) % 12}", "day": step, "price": (user + step) % 3}
    for user in range(40)
    for step in range(6)
]
ITEMS = [{"article": f"i{n}", "title": f"Tale {n}", "genre": "odd" if n % 2 else "even"} for n in range(12)]
# Each user's next item, and for u0 also the one after it; a repeated pair counts once.
TEST = [{"buyer": f"u{user}", "article": f"i{(user + 6) % 12}"} for user in range(40)]
TEST += [{"buyer": "u0", "article": "i7"}, {"buyer": "u0", "article": "i7"}]
COLUMNS: dict[str, Any] = {"user": "buyer", "item": "article", "time": "day"}
KINDS = [pd.DataFrame, pl.DataFrame, pa.Table.from_pylist]


class Rare(ScoredBaseline[NoParameters, Any]):
    """Ranks the least popular items first."""

    name = "rare"
    Config = NoParameters

    def learn(self, data: SplitDataset) -> None:
        self.catalogue = Catalogue.of(data)
        self._model = self
        self.chosen = item_counts(InteractionLog.of(data, self.catalogue), self.catalogue)

    def scores(self, requests: Any) -> Any:
        return np.tile(1.0 / (1.0 + self.chosen), (len(requests), 1))


@pytest.fixture(scope="module")
def rec() -> Loaded:
    return llmrec.fit(pl.DataFrame(ROWS), pl.DataFrame(ITEMS), "item-knn", **COLUMNS)


def _lists(table: Any) -> list[dict[str, Any]]:
    return pl.DataFrame(table).to_dicts()


@pytest.mark.parametrize("make", KINDS)
def test_results_use_the_library_of_the_input(make: Any, rec: Loaded) -> None:
    frame = make(ROWS)
    recommender = llmrec.fit(frame, make(ITEMS), "item-knn", **COLUMNS)
    result = recommender.recommend(["u1", "u2"], k=2)
    assert type(result) is type(frame) and _lists(result) == _lists(rec.recommend(["u1", "u2"], k=2))
    assert list(pl.DataFrame(result).columns) == ["user_id", "rank", "item_id", "title", "score"]
    table = make([{"user_id": "u1"}, {"user_id": "u2"}])
    requests = recommender.recommend(table, k=2)
    assert type(requests) is type(frame)
    assert pl.DataFrame(requests).select(pl.DataFrame(result).columns).to_dicts() == _lists(result)


def test_kinds_of_user_arguments(rec: Loaded) -> None:
    expected = _lists(rec.recommend(["u1", "u2"], k=2))
    for users in (("u1", "u2"), pl.Series(["u1", "u2"]), np.array(["u1", "u2"])):
        assert _lists(rec.recommend(users, k=2)) == expected
    assert isinstance(rec.recommend(pd.Series(["u1"])), pd.DataFrame)
    assert isinstance(rec.recommend(pa.array(["u1"])), pa.Table)
    assert _lists(rec.recommend("u1", 2)) == expected[:2]
    everyone = rec.recommend(k=1)
    assert everyone["user_id"].to_list() == rec.users
    assert rec.recommend([]).is_empty()


def test_users_may_have_interacted_with_every_item() -> None:
    rows = [{"user_id": f"u{user}", "item_id": f"i{item}", "timestamp": item} for user in range(5) for item in range(6)]
    recommender = llmrec.fit(pl.DataFrame(rows), model="popularity")
    assert recommender.recommend("u0").is_empty()
    assert len(recommender.recommend("u0", exclude_seen=False)) == 6


def test_histories_exclusion_and_rules(rec: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    result = rec.recommend([["i1", "i2"], []], k=12)
    assert result.columns[0] == "id" and set(result["id"]) == {"0", "1"}
    assert not {"i1", "i2"} & set(result.filter(pl.col("id") == "0")["item_id"])
    assert {"i1", "i2"} <= set(rec.recommend([["i1", "i2"]], k=12, exclude_seen=False)["item_id"])
    even = rec.recommend(["u1"], where={"only": {"genre": ["even"]}})
    assert {int(item[1:]) % 2 for item in even["item_id"]} == {0}
    with raises(DataError, Facts(kind="unknown-name", column="only.colour")):
        rec.recommend(["u1"], where={"only": {"colour": ["red"]}})
    popular = rec.recommend(["stranger"], k=3)
    assert popular["item_id"].to_list() == [item.item_id for item in rec.rank(history=[], k=3)]
    assert "'stranger'" in caplog.text and len(caplog.messages) == 1


def test_ranks_candidates_and_renders_lists(rec: Loaded) -> None:
    ranking = rec.rank(["i9", "i8"], user="u2", k=1)
    assert ranking == rec.rank(candidates=["i8", "i9"], user="u2")[:1]
    assert "Tale" in repr(ranking) and ranking._repr_html_().count("<tr>") == 2
    assert {item.item_id for item in rec.similar(["i3"], k=2)} <= {f"i{n}" for n in range(12)}


def test_text_models_rank_new_items(tmp_path: Path) -> None:
    items = pl.DataFrame([*ITEMS, {"article": "new", "title": "Tale 3 again", "genre": "odd"}])
    rec = llmrec.fit(pl.DataFrame(ROWS), items, "content", **COLUMNS)
    assert rec.rank(history=["i3"], k=1)[0].item_id == "new"
    rec.save(tmp_path / "saved")
    with llmrec.load(tmp_path / "saved") as again:
        assert again.rank(history=["i3"], k=1)[0].item_id == "new"
    # Collaborative filtering cannot rank an item without interactions.
    assert "new" not in llmrec.fit(pl.DataFrame(ROWS), items, "item-knn", **COLUMNS).items


def test_evaluation_equals_metrics_of_lists(rec: Loaded) -> None:
    scores = rec.evaluate(pd.DataFrame(TEST), k=(1, 3), resamples=50)
    lists = rec.recommend(k=3).group_by("user_id", maintain_order=True).agg("item_id").rows()
    truth = {row["buyer"]: [other["article"] for other in TEST if other["buyer"] == row["buyer"]] for row in TEST}
    truth["u0"] = ["i6", "i7"]
    assert scores.metrics["NDCG@3"].value == pytest.approx(llmrec.metrics.ndcg(dict(lists), truth, k=3))
    assert (
        scores.relevant == 41
        and scores.users == 40
        and set(scores.metrics)
        == {f"{name}@{k}" for name in ("HR", "Recall", "Precision", "NDCG", "MRR", "MAP") for k in (1, 3)}
    )
    low, high = scores.metrics["NDCG@3"].low, scores.metrics["NDCG@3"].high
    assert low is not None and high is not None and low <= high
    with raises(RecipeError, Facts(kind="bad-value")):
        rec.evaluate(TEST, k=0)


def test_reports_unreachable_relevant_items(rec: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    again = [{"buyer": "u1", "article": "i1"}, {"buyer": "u2", "article": "i8"}]
    rec.evaluate(again, resamples=10, exclude_seen=False)
    assert not caplog.messages
    rec.evaluate(again, resamples=10)
    assert "1 of 2 relevant items are in the histories" in caplog.text


def test_compares_on_the_same_users(rec: Loaded, tmp_path: Path) -> None:
    other = llmrec.fit(pl.DataFrame(ROWS), model=llmrec.baselines.Popularity(), **COLUMNS)
    scores = llmrec.compare(rec, other, TEST, k=5, resamples=200)
    pair = scores.comparisons["NDCG@5"]
    assert (pair.a, pair.b) == ("item-knn", "popularity") and pair.p is not None and pair.low <= pair.value <= pair.high
    assert scores.comparisons["HR@5"].p is None and f"p {pair.p:.3g}" in repr(scores)
    assert pair.value == pytest.approx(
        rec.evaluate(TEST, k=5).metrics["NDCG@5"].value - other.evaluate(TEST, k=5).metrics["NDCG@5"].value  # type: ignore[operator]
    )
    assert {entry.name for entry in llmrec.compare(rec, rec, TEST).lists} == {"A: item-knn", "B: item-knn"}
    for arguments in ((rec, other), (tmp_path, tmp_path, TEST), (rec, tmp_path, TEST)):
        with raises(DataError, Facts(kind="contradiction", column="test")):
            llmrec.compare(*arguments)


@pytest.mark.parametrize("model", ["item-knn", "sasrec", "user-item-bias"])
def test_saved_recommender_gives_same_results(model: str, tmp_path: Path) -> None:
    method: Any = model
    columns = COLUMNS
    if model == "sasrec":
        pytest.importorskip("torch", reason="the train extra is not installed")
        method = llmrec.baselines.SASRec(dim=8, epochs=2, quiet=True)
    if model == "user-item-bias":
        columns = {**COLUMNS, "rating": "price"}
    recommender = llmrec.fit(pl.DataFrame(ROWS), pl.DataFrame(ITEMS), method, **columns)
    folder = recommender.save(tmp_path / "saved")
    with llmrec.load(folder) as again:
        assert again.models[0] == recommender.models[0] and again.users == recommender.users
        if model == "user-item-bias":
            assert again.rate("i3", user="u1") == pytest.approx(recommender.rate("i3", user="u1"))
            return
        assert again.rank(user="u1") == recommender.rank(user="u1") and again.items == recommender.items
        # A loaded recommender can be saved again, also over itself.
        assert again.save(folder) == folder
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with raises(DataError, Facts(kind="exists", column="folder")):
        recommender.save(tmp_path / "other")


def test_fits_tables_recipes_and_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, items = tmp_path / "table.csv", tmp_path / "items.csv"
    pl.DataFrame(ROWS).write_csv(table)
    pl.DataFrame(ITEMS).write_csv(items)
    rec = llmrec.fit(table, items, "popularity", **COLUMNS)
    assert isinstance(rec.recommend(["u1"]), pl.DataFrame) and rec.items["i3"].title == "Tale 3"
    recipe = {
        "data": {"source": "table", "columns": {**COLUMNS, "title": "title"}},
        "tasks": {
            "sequential": {"strategies": ["search"], "baselines": ["random", "popularity", "item-knn", "markov-1"]}
        },
        "eval": {"arms": [], "users": 40, "candidates": {"kind": "catalogue"}, "bootstrap": 50},
    }
    with llmrec.fit(pd.DataFrame(ROWS), items, recipe, out=tmp_path / "run", quiet=True) as recommender:
        assert isinstance(recommender.recommend(["u1"]), pd.DataFrame)
        assert {"popularity", "item-knn"} <= set(recommender.models)
        saved = recommender.save(tmp_path / "saved")
        with llmrec.load(saved) as again:
            assert [again.rank(user="u5", model=name) for name in recommender.models] == [
                recommender.rank(user="u5", model=name) for name in recommender.models
            ]
    seen: list[Any] = []
    monkeypatch.setattr("llmrec.start.functions.auto", lambda *args, **named: seen.append((args, named)) or result)
    result = type("Auto", (), {"folder": saved})
    with llmrec.fit(pd.DataFrame(ROWS), budget="90s", **COLUMNS) as recommender:
        assert isinstance(recommender.recommend(["u1"]), pd.DataFrame)
    assert seen[0][1] == {"budget": "90s", "out": None, "quiet": False, **COLUMNS}


@pytest.mark.parametrize("paths", [False, True])
def test_language_model_names_use_the_recipe_of_init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: bool
) -> None:
    saved = llmrec.fit(pl.DataFrame(ROWS), pl.DataFrame(ITEMS), "popularity", **COLUMNS).save(tmp_path / "saved")
    seen: list[Any] = []
    done = type("Run", (), {"folder": saved})
    monkeypatch.setattr("llmrec.start.functions.run", lambda *args, **named: seen.append((args, named)) or done)
    tables: list[Any] = [pl.DataFrame(ROWS), pl.DataFrame(ITEMS)]
    if paths:
        for n, name in enumerate(("rows.csv", "items.csv")):
            tables[n].write_csv(tmp_path / name)
            tables[n] = tmp_path / name
    with llmrec.fit(*tables, "smollm2-lora", **COLUMNS, fields="genre", out=tmp_path / "run") as recommender:
        assert recommender.models[0] == "popularity"
    ((recipe, out), named) = seen[0]
    assert (recipe.name, recipe.model.name, out) == ("smollm2-lora", "SmolLM2-135M-Instruct", tmp_path / "run")
    assert list(recipe.tasks.present()) == ["sequential"] and recipe.eval.arms == ("tuned",)
    assert (recipe.data.columns.item, recipe.data.columns.fields) == ("article", ("genre",))
    overrides = {"data.path": str(tables[0]), "data.items": str(tables[1])}
    assert named["overrides"] == (overrides if paths else {})
    assert (named["data"], named["items"]) == ((None, None) if paths else tuple(tables))
    alone = [{**row, "buyer": f"u{n // 2}", "article": f"i{n // 2 % 12}"} for n, row in enumerate(ROWS)]
    with raises(DataError, Facts(kind="too-few")):
        llmrec.fit(alone, ITEMS, "smollm2-lora", **COLUMNS)
    with raises(DataError, Facts("missing-value", column="interactions")):
        llmrec.fit(None, model="smollm2-lora")


def test_custom_baseline_needs_no_registry(tmp_path: Path) -> None:
    model = Rare().fit(pl.DataFrame(ROWS[:50]), **COLUMNS)
    (first, *_) = model.recommend(["u1"], k=3)["item_id"]
    assert model.recommender.models == (f"{__name__}:Rare",) and first
    with llmrec.load(model.recommender.save(tmp_path / "own")) as again:
        assert again.rank(user="u1", k=3)[0].item_id == first


def test_numeric_ids() -> None:
    rec = llmrec.fit({"user_id": [1, 1, 2, 2, 3], "item_id": [1, 2, 2, 3, 1]}, model="item-knn")
    assert rec.recommend([1, "2"], k=1) == {"user_id": ["1", "2"], "rank": [1, 1], "item_id": ["3", "1"]} | {
        name: rec.recommend([1, 2], k=1)[name] for name in ("title", "score")
    }
    assert rec.similar([2], k=1) == rec.similar(["2"], k=1)


def test_invalid_fits_are_refused() -> None:
    frame = pl.DataFrame(ROWS)
    with raises(RecipeError, Facts(kind="unknown-name", column="model", says="did you mean 'item-knn'?")):
        llmrec.fit(frame, model="item-kn")
    with raises(RecipeError, Facts(kind="bad-value", column="model")):
        llmrec.fit(frame, model=3)
    with raises(DataError, Facts(kind="missing-value", column="interactions")):
        llmrec.fit(model="item-knn")
    with pytest.raises(LlmrecError, match=r'user="COLUMN"'):
        llmrec.fit(pl.DataFrame({"a": [1, 2], "b": [3, 4]}), model="popularity")
