"""Suites: what is measured, what is tuned on, what a killed one keeps, and what its page prints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrec.baselines import tune as tuning
from llmrec.baselines.factors import ALS
from llmrec.baselines.knn import ItemKNN
from llmrec.baselines.markov import Markov
from llmrec.baselines.tune import tune
from llmrec.bench import suite as suites
from llmrec.bench.engine import Ran
from llmrec.bench.models import Models
from llmrec.bench.recipes import points, recipe_of
from llmrec.bench.references import reference
from llmrec.bench.run import run_benchmark
from llmrec.bench.suite import cases_of
from llmrec.cli import main as cli
from llmrec.cli.check import CheckOptions, check
from llmrec.data.sets.table import load
from llmrec.data.split import split
from llmrec.ensembles.rankers import CatalogueEnsemble
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline.study import load_split
from llmrec.recipe.comparisons import Suite
from llmrec.recipe.load import kind_of_page, load_benchmark, load_chat, load_recipe, load_suite
from llmrec.registry import BASELINES
from llmrec.report.wording import DASH
from llmrec.resources import resource
from llmrec.tasks.family import family_of
from tests import planted
from tests.bench.suites import page_of
from tests.facts import Facts, raises

PAGE: dict[str, Any] = {
    "suite": "made",
    "description": "A made table.",
    "data": {"source": "made-reviews"},
    "seeds": [0, 1],
    "split_seeds": [0, 1],
    "bootstrap": 60,
    "rows": [
        {"baseline": "random"},
        {"baseline": "popularity"},
        {"baseline": "item-knn", "parameters": {"history": 10}},
        {"baseline": "markov-1"},
        {"baseline": "als", "parameters": {"factors": 8, "iterations": 4}, "tune": False},
        {"baseline": "ease", "tune": False},
    ],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    folder = tmp_path_factory.mktemp("suite")
    return folder, run_benchmark(Suite(**PAGE), out=folder / "out", results=folder / "eval" / "results")


def _again(folder: Path, **changed: Any) -> Ran:
    return run_benchmark(Suite(**PAGE | changed), out=folder / "out", results=folder / "eval" / "results")


def test_every_row_has_both_treatments_of_the_history_seeds_and_tie_rules(ran: tuple[Path, Ran]) -> None:
    rows = {row["name"]: row for row in ran[1].results.as_json()["rows"]}
    assert list(rows) == [row["baseline"] for row in PAGE["rows"]]
    for name, row in rows.items():
        assert set(row["tables"]) == {"excluded", "included"}
        for table in row["tables"].values():
            figure = table["metrics"]["NDCG@10"]
            assert figure["range"][0] <= figure["range"][1] and "cand:full" in figure["signature"]
            assert ("sd" in figure) == (name == "als")
        assert row["seeds"] == (2 if name == "als" else 1)
        assert row["memory_gb"] > 0 and {"tune", "fit", "answer"} <= set(row["seconds"])


def test_a_row_can_have_fewer_seeds_and_the_page_says_so(tmp_path: Path) -> None:
    als = {"baseline": "als", "parameters": {"factors": 4, "iterations": 2}, "tune": False}
    rows = [{"baseline": "markov-1"}, {**als, "name": "all seeds"}, {**als, "name": "one seed", "seeds": 1}]
    rows += [{"fuse": ["markov-1", one], "name": f"with {one}"} for one in ("all seeds", "one seed")]
    page = Suite(**PAGE | {"split_seeds": [0], "rows": rows})
    ran = run_benchmark(page, out=tmp_path / "out", results=tmp_path / "eval" / "results")
    few = {"one seed", "with one seed"}
    assert {row.name: row.seeds for row in ran.results.rows if row.name != "markov-1"} == {
        name: 1 if name in few else 2 for name in ("all seeds", "one seed", "with all seeds", "with one seed")
    }
    assert {row["name"] for row in ran.results.as_json()["rows"] if row.get("fewer_seeds")} == few
    assert "because they have fewer than 3 training seeds: one seed (1), with one seed (1)." in ran.files[
        "page"
    ].read_text("utf-8")


def test_users_are_counted_where_each_has_several_held_out_interactions() -> None:
    data = {"source": "made-reviews", "split": {"kind": "last_share", "valid": 0.2, "test": 0.4}}
    page = Suite(**PAGE | {"data": data, "users": 3})
    whole = load_split(page.data, 0)
    every = cases_of(Suite(**PAGE | {"data": data}), whole)
    few = cases_of(page, whole)
    users = {case.request.user_id for case in few}
    assert len(users) == 3 and len(few) > 3
    assert [case.request.id for case in few] == [case.request.id for case in every if case.request.user_id in users]


def test_chance_has_neither_seed_nor_spread(ran: tuple[Path, Ran]) -> None:
    (chance,) = [row for row in ran[1].results.as_json()["rows"] if row["name"] == "random"]
    items = ran[1].results.as_json()["data"]["items"]
    assert chance["tables"]["included"]["metrics"]["HR@10"]["value"] == pytest.approx(10 / items)
    assert chance["seeds"] == 1 and all("sd" not in table["metrics"]["HR@10"] for table in chance["tables"].values())


def test_the_grid_is_tried_on_validation_and_the_rest_of_the_row_stays(ran: tuple[Path, Ran]) -> None:
    rows = {row["name"]: row for row in ran[1].results.as_json()["rows"]}
    data = load_split(Suite(**PAGE).data, 0)
    grid = ItemKNN.GRID | {"history": (10,)}
    expected = tune("item-knn", data, seed=0, tables=("excluded", "included"), grid=grid)
    row = rows["item-knn"]
    for seen, choice in expected.choices.items():
        assert row["tables"][seen]["parameters"] == choice.parameters
        assert row["tables"][seen]["border"] == list(choice.border)
    assert [trial["values"] for trial in row["trials"]] == [dict(trial.values) for trial in expected.trials]
    assert row["chosen_by"] == "NDCG@10" and len(row["trials"]) >= 2
    (fixed,) = rows["ease"]["trials"]
    (trial,) = tune("ease", data, seed=0, tables=("excluded", "included"), grid={}).trials
    assert fixed == {"parameters": {}, "values": dict(trial.values)}
    assert rows["ease"]["tables"]["excluded"]["parameters"] == {}


def test_each_table_has_the_parameters_that_were_chosen_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGE | {"seeds": [0], "split_seeds": [0], "rows": [{"baseline": "item-knn"}, {"baseline": "markov-1"}]}
    monkeypatch.setattr(ItemKNN, "GRID", {"history": (1, 2, 5, 30), "decay": (0.2, 0.6, 1.0)})
    row = run_benchmark(Suite(**page), out=tmp_path / "a", results=tmp_path / "r").results.rows[0]
    chosen = {seen: figures.parameters for seen, figures in row.tables.items()}
    assert chosen["excluded"] != chosen["included"]
    for seen, parameters in chosen.items():
        alone = page | {"seen": [seen], "rows": [{"baseline": "item-knn", "parameters": parameters}]}
        found = run_benchmark(Suite(**alone), out=tmp_path / seen, results=tmp_path / "r").results.rows[0]
        assert found.tables[seen].metrics == row.tables[seen].metrics


def test_requests_of_users_without_a_history_can_be_left_out(tmp_path: Path) -> None:
    by_time = {"source": "made-reviews", "split": {"kind": "global_time", "valid": 0.2, "test": 0.4}}
    page = PAGE | {"seeds": [0], "split_seeds": [0], "data": by_time, "rows": [{"baseline": "popularity"}]}
    data = load_split(Suite(**page).data, 0)
    lengths = [len(data.history(held.user_id, "test")) for held in data.holdouts("test")]
    assert 0 in lengths
    for least in (0, 1):
        found = run_benchmark(Suite(**page, min_history=least), out=tmp_path / "out", results=tmp_path / "r").results
        assert found.protocol.requests == sum(length >= least for length in lengths)
        assert found.protocol.min_history == least
    with raises(RecipeError, Facts("too-few", column="min_history")):
        run_benchmark(Suite(**page, min_history=10_000), out=tmp_path / "out", results=tmp_path / "r")


def test_a_killed_row_does_not_fit_its_points_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGE | {"seeds": [0], "split_seeds": [0], "rows": [{"baseline": "markov"}]}
    monkeypatch.setattr(Markov, "GRID", {"order": (1, 2, 3, 5)})
    monkeypatch.setattr(Markov, "AT_ANSWER", frozenset())
    fits: list[int] = []
    genuine = Markov.fit

    def fit(self: Markov, data: Any) -> None:
        if len(fits) == 2:
            raise KeyboardInterrupt
        fits.append(self.config.order)
        genuine(self, data)

    monkeypatch.setattr(Markov, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(Suite(**page), out=tmp_path / "out", results=tmp_path / "r")
    fits.clear()
    monkeypatch.setattr(Markov, "fit", lambda self, data: (fits.append(self.config.order), genuine(self, data))[1])
    row = run_benchmark(Suite(**page), out=tmp_path / "out", results=tmp_path / "r").results.rows[0]
    assert [trial.parameters["order"] for trial in row.trials] == [1, 2, 3, 5]
    # The points 1 and 2 are known; a chosen one of them is fitted once more for the test.
    assert fits[:2] == [3, 5] and fits.count(1) + fits.count(2) <= 2


def test_a_fusion_is_weighed_by_users_that_chose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"baseline": "popularity"}, {"baseline": "item-knn"}, {"baseline": "als", "parameters": {"factors": 8}}]
    rows += [{"name": "all", "fuse": ["popularity", "item-knn", "als"]}]
    page = PAGE | {"seeds": [0, 1], "split_seeds": [0], "rows": rows, "pairs": [["all", "item-knn"]]}
    chose, weighed = set(), set()
    genuine, fit = tuning.ranking_cases, CatalogueEnsemble.fit
    monkeypatch.setattr(ItemKNN, "GRID", {"history": (1, 5, 30), "decay": (0.5, 1.0)})
    monkeypatch.setattr(ALS, "GRID", {"alpha": (1.0, 10.0)})

    def choosing(data: Any, limit: int | None = None) -> list[Any]:
        cases = genuine(data, limit)
        chose.update(case.request.user_id for case in cases)
        return cases

    def weighing(self: CatalogueEnsemble, cases: Any, **more: bool) -> None:
        weighed.update(case.request.user_id for case in cases)
        fit(self, cases, **more)

    monkeypatch.setattr(tuning, "ranking_cases", choosing)
    monkeypatch.setattr(CatalogueEnsemble, "fit", weighing)
    ran = run_benchmark(Suite(**page), out=tmp_path / "out", results=tmp_path / "r")
    assert chose and weighed and not chose & weighed
    board = page_of(ran.results)
    fused = ran.results.rows[-1]
    assert [row.reads for row in ran.results.rows] == ["events"] * 4
    assert fused.seeds == 2 and {pair.a for pair in ran.results.pairs} == {"all"}
    for seen in ("excluded", "included"):
        best = max(trial.values[seen] for trial in fused.trials if seen in trial.values)
        (kept,) = [trial for trial in fused.trials if trial.values.get(seen) == best][:1]
        assert fused.tables[seen].parameters["form"] == kept.parameters["form"]
        weights = fused.tables[seen].fusion
        assert weights is not None and [part.name for part in weights.parts] == rows[-1]["fuse"]
        assert (weights.repeat is None) == (seen == "excluded")
        assert ("all uses a single member" if weights.form == "alone" else "the weights of all (") in board
    # Nothing is reserved where nothing is fused, so that rows are chosen anew.
    chose.clear()
    run_benchmark(Suite(**page | {"rows": rows[:3], "pairs": []}), out=tmp_path / "out", results=tmp_path / "r")
    data = load_split(Suite(**PAGE).data, 0)
    assert chose == set(data.valid["user_id"])


def test_a_ranker_is_a_row_unless_the_row_rules_it_out(tmp_path: Path) -> None:
    pytest.importorskip("lightgbm", reason="the ranker extra is not installed")
    data = planted.write(tmp_path / "data")
    columns = {"user": "user_id", "item": "item_id", "time": "timestamp"}
    members = ["popularity", "markov-1", "content"]
    rows: list[dict[str, Any]] = [{"baseline": name, "tune": False} for name in members]
    rows += [{"name": "learned", "fuse": members}, {"name": "linear", "ranker": False, "fuse": members}]
    page = PAGE | {
        "data": {
            "source": "table", "path": f"{data}/events.csv", "items": f"{data}/items.csv", "columns": columns,
        },
        "seeds": [0], "split_seeds": [0], "rows": rows, "pairs": [["learned", "linear"]],
    }  # fmt: skip
    ran = run_benchmark(Suite(**page), out=tmp_path / "out", results=tmp_path / "r")
    tables = {row.name: row.tables for row in ran.results.rows if row.name in ("learned", "linear")}
    for seen in ("excluded", "included"):
        learned, linear = (tables[name][seen] for name in ("learned", "linear"))
        assert learned.parameters["form"] == "ranker" != linear.parameters["form"]
        assert learned.metrics["NDCG@10"].value > linear.metrics["NDCG@10"].value
        assert learned.fusion is not None and "history: length" in {item.name for item in learned.fusion.features}
    assert "These features of the ensemble have the largest share of the gain" in page_of(ran.results)


def test_ratings_and_yes_no_are_fused_too(tmp_path: Path) -> None:
    common = {"suite": "s", "data": {"source": "made-reviews"}, "bootstrap": 60}
    rated = [{"baseline": "user-mean"}, {"baseline": "item-mean"}, {"name": "both", "fuse": ["user-mean", "item-mean"]}]
    found = run_benchmark(
        Suite(**common, task="rating", rows=rated), out=tmp_path / "a", results=tmp_path / "r"
    ).results
    weights = found.rows[-1].tables["rating"].fusion
    assert weights is not None and weights.form in ("ridge", "alone") and found.rows[-1].chosen_by == "RMSE"
    assert found.rows[-1].trials[0].values["rating"] > 0
    judged = [
        {"baseline": "like-ratio"},
        {"baseline": "logistic", "tune": False},
        {"name": "both", "fuse": ["like-ratio", "logistic"]},
    ]
    split = {"data": {"source": "made-reviews", "split": {"kind": "global_time", "valid": 0.3, "test": 0.2}}}
    page = Suite(**common | split, task="ctr", liked=4, rows=judged)
    found = run_benchmark(page, out=tmp_path / "b", results=tmp_path / "r").results
    weights = found.rows[-1].tables["yes-no"].fusion
    assert weights is not None and weights.form in ("logit", "alone") and found.rows[-1].chosen_by == "LogLoss"


def test_a_fusion_names_rows_above_it() -> None:
    with pytest.raises(ValueError, match="no earlier model"):
        Suite(**PAGE | {"rows": [{"baseline": "popularity"}, {"name": "all", "fuse": ["popularity", "ease"]}]})
    with pytest.raises(ValueError, match="at least two members"):
        Suite(**PAGE | {"rows": [{"baseline": "popularity"}, {"name": "all", "fuse": ["popularity"]}]})
    with pytest.raises(ValueError, match="two models are called 'ease'"):
        Suite(**PAGE | {"rows": [{"baseline": "ease"}, {"baseline": "popularity", "name": "ease"}]})


def test_the_best_row_is_compared_with_every_other(ran: tuple[Path, Ran]) -> None:
    results = ran[1].results.as_json()
    best = max(results["rows"], key=lambda row: row["tables"]["excluded"]["metrics"]["NDCG@10"]["value"])["name"]
    found = [line for line in results["comparisons"] if line["table"] == "excluded"]
    assert {line["a"] for line in found} == {best} and len(found) == len(PAGE["rows"]) - 1
    assert all(line["value"] >= 0 and not {"p", "verdict"} & set(line) for line in found)  # picked on test
    assert "an unadjusted 95 % interval" in results["tables"][0]["detectable"]


def test_cold_and_warm_items_have_planned_comparisons_of_their_own(tmp_path: Path) -> None:
    table = tmp_path / "events.csv"
    steps = [(user, place, (user + place) % 9) for user in range(40) for place in range(4)]
    lines = [f"u{user},i{item},{place},word{item}" for user, place, item in steps]
    # The last event of a quarter of the users is of two items that nobody else has.
    lines += [f"u{user},new{user % 2},9,word{3 + user % 2}" for user in range(10)]
    table.write_text("\n".join(["user,item,time,title", *lines]) + "\n")
    columns = {"user": "user", "item": "item", "time": "time", "title": "title"}
    data = {"source": "table", "path": str(table), "columns": columns}
    rows = [{"baseline": "content", "tune": False}, {"baseline": "markov-1"}]
    pairs = [["content", "markov-1"], *({"rows": ["content", "markov-1"], "items": part} for part in ("cold", "warm"))]
    page = {"suite": "s", "data": data, "seen": ["included"], "bootstrap": 60, "rows": rows, "pairs": pairs}
    found = run_benchmark(Suite(**page), out=tmp_path / "o", results=tmp_path / "r").results
    every, cold, warm = found.pairs
    assert (every.items, every.n) == (None, None) and (cold.items, cold.n) == ("cold", 10) and warm.n == 30
    assert every.value is not None and cold.value is not None and warm.value is not None
    assert 40 * every.value == pytest.approx(10 * cold.value + 30 * warm.value)
    content, markov = ((row.tables["included"].cold or {})["NDCG@10"] for row in found.rows)
    assert cold.value == pytest.approx(content - markov) and cold.value > 0
    board = page_of(found)
    few = "the 10 requests for items without training interactions, 2 items, clustered by item, exploratory"
    assert f"{few}: content − markov-1" in board
    assert "10 requests for items without training interactions. Models" in board
    assert not cold.slices and not warm.slices
    for kind in ("count", "words", "history"):
        parts = [part for part in every.slices if part.name.startswith(kind)]
        assert sum(part.n for part in parts) == 40
        # Fewer than twenty requests say nothing.
        assert all((part.value is None) == (part.n < 20) for part in parts)
    assert "content (interactions and texts, pretrained encoder) − markov-1 (interactions only), NDCG@10:" in board
    assert f"| Targets without training interactions | 10 | 2 | {DASH} |" in board
    # What was thought of later is described, and is no part of the family.
    later = Suite(**page | {"pairs": pairs[:1], "explored": pairs[1:]})
    again = run_benchmark(later, out=tmp_path / "o", results=tmp_path / "r").results
    assert len(again.pairs) == 1 and [pair.items for pair in again.explored] == ["cold", "warm"]
    assert all(pair.p is None and pair.verdict is None for pair in again.explored)
    assert again.explored[0].value == cold.value and "Exploratory comparisons, added after the test split" in page_of(
        again
    )
    # Without a cold item there is no figure, and the page says so.
    table.write_text("\n".join(["user,item,time,title", *lines[:160]]) + "\n")
    none = run_benchmark(Suite(**page), out=tmp_path / "n", results=tmp_path / "r").results
    assert [(pair.items, pair.n) for pair in none.pairs] == [(None, None), ("cold", 0), ("warm", 40)]
    assert none.pairs[1].value is None and "content − markov-1: no such requests" in page_of(none)
    with pytest.raises(ValueError, match="requires task: ranking"):
        Suite(**page | {"task": "rating"})


def test_rows_that_are_skipped_are_named_and_their_comparisons_counted(tmp_path: Path) -> None:
    rows = [
        *({"baseline": name} for name in ("popularity", "markov-1", "markov")),
        {"name": "both", "fuse": ["popularity", "markov"]},
    ]
    pairs = [["markov-1", "popularity"], ["markov", "popularity"], ["both", "markov-1"]]
    page = {"suite": "s", "data": {"source": "made-reviews"}, "seen": ["included"], "rows": rows, "pairs": pairs}
    page |= {"bootstrap": 60, "seeds": [0]}
    some = run_benchmark(Suite(**page, skip=["markov"]), out=tmp_path / "o", results=tmp_path / "r").results
    assert [row.name for row in some.rows] == ["popularity", "markov-1"] and some.skipped == ("markov", "both")
    (pair,) = some.pairs
    assert some.unrun == 2 and pair.p is not None and pair.p_raw is not None
    assert pair.p == pytest.approx(min(1.0, 3 * pair.p_raw))
    board = page_of(some)
    assert "Not run: markov, both. The Holm correction counts 2 planned comparisons with them as if tested" in board
    # The rest is run later, and what was run is not run again.
    whole = run_benchmark(Suite(**page), out=tmp_path / "o", results=tmp_path / "r").results
    assert len(whole.pairs) == 3 and whole.unrun == 0 and not whole.skipped
    for wrong, said in (
        (["markof"], "there is no model 'markof'"),
        (["popularity", "markov-1", "markov"], "all models are skipped"),
    ):
        with pytest.raises(ValueError, match=said):
            Suite(**page, skip=wrong)


def test_lists_are_measured_and_their_diversity_by_what_the_suite_says(tmp_path: Path) -> None:
    page = {**PAGE, "seeds": [0], "split_seeds": [0], "rows": [{"baseline": "popularity"}], "cutoffs": [5]}
    listed = {f"{name}@5" for name in ("Precision", "MAP", "Coverage", "Novelty", "Gini", "PopularityLift")}
    signed = {}
    for diversity in (None, {"field": "category"}, {"encoder": "chance"}):
        ran = run_benchmark(Suite(**page, diversity=diversity), out=tmp_path / "out", results=tmp_path / "results")
        metrics = ran.results.rows[0].tables["excluded"].metrics
        assert listed | {"Serendipity@5", "RankAUC"} <= metrics.keys()
        signed[str(diversity)] = metrics["ILD@5"].signature if "ILD@5" in metrics else ""
    plain, words, vectors = signed.values()
    assert plain == "" and "how:jaccard-category" in words and "how:cosine-chance" in vectors
    with raises(LlmrecError, Facts("unknown-name", "made-reviews", says="'colour'")):
        run_benchmark(Suite(**page, diversity={"field": "colour"}), out=tmp_path / "out", results=tmp_path / "results")
    with pytest.raises(ValueError, match="set either field or encoder"):
        Suite(**page, diversity={})


def test_a_second_run_computes_nothing_and_a_changed_row_only_itself(
    ran: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, first = ran
    made: list[str] = []
    genuine = suites.make_row

    def counted(suite: Suite, row: Any, *rest: Any) -> dict[str, Any]:
        made.append(row.baseline)
        return genuine(suite, row, *rest)

    monkeypatch.setattr(suites, "make_row", counted)
    caplog.set_level("INFO")
    again = _again(folder)
    assert made == [] and again.results.rows == first.results.rows and "other settings" not in caplog.text
    rows = [*PAGE["rows"][:-1], {"baseline": "ease", "parameters": {"penalty": 500.0}, "tune": False}]
    assert _again(folder, rows=rows).results.rows[-1].tables["excluded"].parameters == {"penalty": 500.0}
    assert made == ["ease"] and "made.json contains results of other settings" in caplog.text
    made.clear()
    _again(folder, bootstrap=61)
    assert made == [row["baseline"] for row in PAGE["rows"]]


def test_ratings_and_yes_no_have_suites_of_their_own(tmp_path: Path) -> None:
    common = {"suite": "s", "data": {"source": "made-reviews"}, "bootstrap": 60}
    rating = Suite(**common, task="rating", rows=[{"baseline": "user-mean"}, {"baseline": "user-item-bias"}])
    found = run_benchmark(rating, out=tmp_path / "a", results=tmp_path / "r").results.as_json()
    assert [(table["name"], table["metrics"]) for table in found["tables"]] == [("rating", ["MAE", "RMSE"])]
    assert {line["metric"] for line in found["comparisons"]} == {"RMSE"}
    liked = Suite(
        **common | {"data": {"source": "made-reviews", "split": {"kind": "global_time", "valid": 0.2, "test": 0.2}}},
        task="ctr",
        liked=4,
        rows=[{"baseline": "like-ratio"}, {"baseline": "logistic"}],
    )
    found = run_benchmark(liked, out=tmp_path / "b", results=tmp_path / "r").results.as_json()
    assert (
        found["rows"][1]["tables"]["yes-no"]["parameters"]["liked"] == 4 and found["rows"][1]["chosen_by"] == "LogLoss"
    )
    assert set(found["rows"][0]["tables"]) == {"yes-no"}
    assert 0 <= found["rows"][1]["tables"]["yes-no"]["metrics"]["AUC"]["value"] <= 1


def test_a_difference_in_auc_is_that_of_the_figures_and_not_of_an_ensemble(tmp_path: Path) -> None:
    judged = [
        {"baseline": "like-ratio"},
        {"baseline": "deepfm", "tune": False, "parameters": {"epochs": 1, "dim": 4, "quiet": True}},
    ]
    page = {
        "suite": "s",
        "data": {"source": "made-reviews", "split": {"kind": "global_time", "valid": 0.3, "test": 0.2}},
        "bootstrap": 60,
        "task": "ctr",
        "liked": 4,
        "rows": judged,
        "pairs": [["deepfm", "like-ratio"]],
    }
    for _ in ("made", "read back"):
        found = run_benchmark(Suite(**page), out=tmp_path / "a", results=tmp_path / "r").results
        one, other = (row.tables["yes-no"].metrics["AUC"] for row in reversed(found.rows))
        assert one.sd and one.value is not None and other.value is not None
        assert found.pairs[0].value == pytest.approx(one.value - other.value, abs=1e-9)


def test_a_row_of_a_recipe_is_made_again_where_a_file_that_it_names_has_changed(tmp_path: Path) -> None:
    prompt = tmp_path / "mine.yaml"
    page = resource("prompts", "sequential", "next-title.yaml").read_text(encoding="utf-8")
    text = page.replace("name: next-title", "name: mine")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: r\ndata: {{source: made-reviews}}\nprompts: [{prompt}]\nmodel: {{name: new, shape: {{layers: 1}}}}\n"
        "tasks: {sequential: {templates: [mine], strategies: [search]}}\ntrain: {method: full, steps: 1}\n"
        "eval: {candidates: {kind: catalogue}}\n",
        encoding="utf-8",
    )
    suite = Suite(**PAGE | {"rows": [{"name": "tuned", "recipe": str(recipe)}]})
    seen = []
    for change in ("", " Please."):
        prompt.write_text(text.replace("target:", f"system: Rank.{change}\ntarget:"), encoding="utf-8")
        seen.append(Models(suite, tmp_path).inputs(suite.rows[0]))
    assert seen[0] != seen[1] and seen[0]["recipe"] == seen[1]["recipe"]


@pytest.mark.parametrize(
    ("changed", "facts"),
    [
        (
            {"rows": [{"baseline": "user-mean"}]},
            Facts("unsupported", "made", column="rows", says=("'user-mean'", "choose from random")),
        ),
        (
            {"rows": [{"baseline": "ease", "parameters": {"penalti": 5}}]},
            Facts(
                "unknown-key",
                column="parameters",
                says=("'penalti' (did you mean 'penalty'?)", "it takes penalty, decay, dtype"),
            ),
        ),
        (
            {"rows": [{"baseline": "ease", "grid": {"penalti": [5]}}]},
            Facts("unknown-key", column="grid", says="'penalti' (did you mean 'penalty'?)"),
        ),
        (
            {"references": ["nowhere"]},
            Facts("unknown-name", column="references", says=("'nowhere'", "known: amazon14-beauty")),
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_measured(
    tmp_path: Path, changed: dict[str, Any], facts: Facts
) -> None:
    with raises(RecipeError, facts):
        _again(tmp_path, **changed)
    assert not (tmp_path / "out" / "rows").exists()


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        ([{"baseline": "user-mean"}], Facts("unsupported", column="rows", says="choose from random")),
        ([{"baseline": "markv-1"}], Facts("unsupported", column="rows", says="did you mean 'markov-1'")),
        ([{"baseline": "ease", "grid": {"penalti": [5]}}], Facts("unknown-key", column="grid", says="row 'ease'")),
    ],
)
def test_check_refuses_the_rows_that_eval_refuses(tmp_path: Path, rows: list[dict[str, Any]], facts: Facts) -> None:
    page = tmp_path / "s.yaml"
    controls = [{"baseline": name} for name in ("random", "popularity", "item-knn", "markov-1", "sasrec")]
    controls += [] if rows[0]["baseline"] == "ease" else [{"baseline": "ease"}]
    page.write_text(yaml.safe_dump({"suite": "s", "data": {"source": "made"}, "rows": [*controls, *rows]}))
    with raises(RecipeError, facts):
        check(CheckOptions(recipe=str(page)))


def test_a_row_names_the_values_to_choose_among(tmp_path: Path) -> None:
    row = {"baseline": "item-knn", "grid": {"history": [20, 5], "decay": [1.0]}, "parameters": {"shrinkage": 0.0}}
    page = PAGE | {"split_seeds": [0], "rows": [*PAGE["rows"][:1], row]}
    (_, found) = run_benchmark(Suite(**page), out=tmp_path / "out", results=tmp_path / "r").results.rows
    assert {trial.parameters["history"] for trial in found.trials} <= {5, 20}
    assert {(trial.parameters["decay"], trial.parameters["shrinkage"]) for trial in found.trials} == {(1.0, 0.0)}
    for wrong, said in (
        ({"grid": {"history": [5]}, "parameters": {"history": 5}}, "keep one"),
        ({"tune": False}, "drop the grid"),
    ):
        with pytest.raises(ValueError, match=said):
            Suite(**page | {"rows": [row | wrong]})


def test_the_command_writes_results_and_their_page_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "made.yaml"
    page.write_text(yaml.safe_dump(PAGE | {"split_seeds": [0], "rows": PAGE["rows"][:2]}), encoding="utf-8")
    results = tmp_path / "eval" / "results"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["llmrec", "eval", str(page), "seeds=[3]", "--results", str(results)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "popularity" in capsys.readouterr().out
    assert json.loads((results / "made.json").read_text(encoding="utf-8"))["protocol"]["seeds"] == [3]
    board = (tmp_path / "eval" / "made.md").read_text(encoding="utf-8")
    assert "# made" in board and "Seen items filtered" in board and "| popularity |" in board


PAGES = sorted(resource("eval", "suites").glob("*.yaml"))
SUITES = [page for page in PAGES if kind_of_page(page) == "suite"]
TALKS = [page for page in PAGES if kind_of_page(page) == "chat"]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (*SUITES, *TALKS)], ids=lambda page: page.stem)
def test_a_shipped_benchmark_can_be_read_and_its_recipes_too(page: Path) -> None:
    benchmark = load_benchmark(page)
    assert benchmark.benchmark == page.stem
    for point in points(benchmark):
        assert recipe_of(benchmark, point, Path("runs")).tasks.present()


@pytest.mark.parametrize("page", TALKS, ids=lambda page: page.stem)
def test_a_shipped_suite_of_conversations_can_be_read_and_names_what_exists(page: Path) -> None:
    talks = load_chat(page)
    assert talks.chat == page.stem and load_recipe(talks.recipe, talks.overrides).tasks.present()
    assert {"history", "rules"} <= {row.manager for row in talks.rows} and talks.recommender in BASELINES


@pytest.mark.parametrize("page", SUITES, ids=lambda page: page.stem)
def test_a_shipped_suite_can_be_read_and_names_what_exists(page: Path) -> None:
    suite = load_suite(str(page))
    assert suite.suite == page.stem
    family = "sequential" if suite.task == "ranking" else suite.task
    names = [row.baseline for row in suite.rows if row.baseline is not None]
    assert all(load_recipe(row.recipe, row.overrides).tasks.sequential for row in suite.rows if row.recipe)
    assert set(names) <= set(family_of(family).baselines) <= set(BASELINES)
    for name in suite.references:
        assert reference(name).rows
    if suite.task == "ranking":
        assert {"random", "popularity", "item-knn", "markov-1", "ease", "sasrec"} <= set(names)


@pytest.mark.skipif("LLMREC_DATA" not in os.environ, reason="LLMREC_DATA names no folder with the Amazon sequences")
@pytest.mark.parametrize("name", ["beauty", "toys"])
def test_the_sequences_are_those_of_the_published_figures(name: str) -> None:
    suite = load_suite(str(resource("eval", "suites") / f"{name}.yaml"))
    data = split(load(suite.data, seed=0), suite.data.split, seed=0)
    counts = reference(f"amazon14-{name}").counts
    assert len(data.dataset.items) == counts["items"]
    assert data.dataset.interactions["user_id"].n_unique() == counts["users"]
    assert len(data.dataset.interactions) == counts["interactions"]
