"""Suites: measurement, tuning, resume, and pages."""

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
from llmrec.bench.engine import FinishedBenchmark
from llmrec.bench.models import Models
from llmrec.bench.references import reference
from llmrec.bench.run import run_benchmark
from llmrec.bench.suite import suite_cases
from llmrec.cli import main as cli
from llmrec.cli.check import CheckOptions, check
from llmrec.data.sets.table import load_data
from llmrec.data.split import split_dataset
from llmrec.ensembles.rankers import CatalogueEnsemble
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline.study import load_split
from llmrec.recipe.comparisons import Suite
from llmrec.recipe.load import detect_page_kind, load_chat_suite, load_recipe, load_suite
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
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FinishedBenchmark]:
    folder = tmp_path_factory.mktemp("suite")
    return folder, run_benchmark(Suite(**PAGE), out=folder / "out", results=folder / "eval" / "results")


def _again(folder: Path, **changed: Any) -> FinishedBenchmark:
    return run_benchmark(Suite(**PAGE | changed), out=folder / "out", results=folder / "eval" / "results")


def test_rows_have_both_tables_seeds_and_tie_rules(ran: tuple[Path, FinishedBenchmark]) -> None:
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
    items = ran[1].results.as_json()["data"]["items"]
    figure = rows["random"]["tables"]["included"]["metrics"]["HR@10"]
    assert figure["value"] == pytest.approx(10 / items) and "sd" not in figure


def test_rows_with_fewer_seeds(tmp_path: Path) -> None:
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


def test_limit_of_users_with_several_held_out_interactions() -> None:
    data = {"source": "made-reviews", "split": {"kind": "last_share", "valid": 0.2, "test": 0.4}}
    page = Suite(**PAGE | {"data": data, "users": 3})
    table = load_split(page.data, 0)
    every = suite_cases(Suite(**PAGE | {"data": data}), table)
    few = suite_cases(page, table)
    users = {case.request.user_id for case in few}
    assert len(users) == 3 and len(few) > 3
    assert [case.request.id for case in few] == [case.request.id for case in every if case.request.user_id in users]


def test_grid_is_tuned_on_validation(ran: tuple[Path, FinishedBenchmark]) -> None:
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


def test_each_table_has_its_best_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGE | {"seeds": [0], "split_seeds": [0], "rows": [{"baseline": "item-knn"}, {"baseline": "markov-1"}]}
    monkeypatch.setattr(ItemKNN, "GRID", {"history": (1, 2, 5, 30), "decay": (0.2, 0.6, 1.0)})
    row = run_benchmark(Suite(**page), out=tmp_path / "a", results=tmp_path / "r").results.rows[0]
    chosen = {seen: figures.parameters for seen, figures in row.tables.items()}
    assert chosen["excluded"] != chosen["included"]
    for seen, parameters in chosen.items():
        alone = page | {"seen": [seen], "rows": [{"baseline": "item-knn", "parameters": parameters}]}
        result = run_benchmark(Suite(**alone), out=tmp_path / seen, results=tmp_path / "r").results.rows[0]
        assert result.tables[seen].metrics == row.tables[seen].metrics


def test_min_history_excludes_users() -> None:
    by_time = {"source": "made-reviews", "split": {"kind": "global_time", "valid": 0.2, "test": 0.4}}
    page = PAGE | {"data": by_time, "rows": [{"baseline": "popularity"}]}
    data = load_split(Suite(**page).data, 0)
    lengths = [len(data.history(held.user_id, "test")) for held in data.holdouts("test")]
    assert 0 in lengths
    for least in (0, 1):
        cases = suite_cases(Suite(**page, min_history=least), data)
        assert len(cases) == sum(length >= least for length in lengths)
    with raises(RecipeError, Facts("too-few", column="min_history")):
        suite_cases(Suite(**page, min_history=10_000), data)


def test_resume_keeps_finished_grid_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    # The points 1 and 2 are stored; if one of them is the best, it is fitted once more for the test split.
    assert fits[:2] == [3, 5] and fits.count(1) + fits.count(2) <= 2


def test_fusion_weights_use_other_users_than_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"baseline": "popularity"}, {"baseline": "item-knn"}, {"baseline": "als", "parameters": {"factors": 8}}]
    rows += [{"name": "all", "fuse": ["popularity", "item-knn", "als"]}]
    page = PAGE | {"seeds": [0, 1], "split_seeds": [0], "rows": rows, "pairs": [["all", "item-knn"]]}
    tuned, weighted = set(), set()
    genuine, fit = tuning.ranking_cases, CatalogueEnsemble.fit
    monkeypatch.setattr(ItemKNN, "GRID", {"history": (1, 5, 30), "decay": (0.5, 1.0)})
    monkeypatch.setattr(ALS, "GRID", {"alpha": (1.0, 10.0)})

    def tuning_cases(data: Any, limit: int | None = None) -> list[Any]:
        cases = genuine(data, limit)
        tuned.update(case.request.user_id for case in cases)
        return cases

    def record_users(self: CatalogueEnsemble, cases: Any, **more: bool) -> None:
        weighted.update(case.request.user_id for case in cases)
        fit(self, cases, **more)

    monkeypatch.setattr(tuning, "ranking_cases", tuning_cases)
    monkeypatch.setattr(CatalogueEnsemble, "fit", record_users)
    ran = run_benchmark(Suite(**page), out=tmp_path / "out", results=tmp_path / "r")
    assert tuned and weighted and not tuned & weighted
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
    # Without an ensemble, no users are reserved, so the rows are tuned again.
    tuned.clear()
    run_benchmark(Suite(**page | {"rows": rows[1:2], "pairs": []}), out=tmp_path / "out", results=tmp_path / "r")
    data = load_split(Suite(**PAGE).data, 0)
    assert tuned == set(data.valid["user_id"])


def test_fusion_uses_a_ranker_unless_excluded(tmp_path: Path) -> None:
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
        "seen": ["included"], "seeds": [0], "split_seeds": [0], "rows": rows, "pairs": [["learned", "linear"]],
    }  # fmt: skip
    ran = run_benchmark(Suite(**page), out=tmp_path / "out", results=tmp_path / "r")
    tables = {row.name: row.tables["included"] for row in ran.results.rows}
    learned, linear = tables["learned"], tables["linear"]
    assert learned.parameters["form"] == "ranker" != linear.parameters["form"]
    assert learned.metrics["NDCG@10"].value > linear.metrics["NDCG@10"].value
    assert learned.fusion is not None and "history: length" in {item.name for item in learned.fusion.features}
    assert "These features of the ensemble have the largest share of the gain" in page_of(ran.results)


def test_suites_of_ratings_and_likes(tmp_path: Path) -> None:
    common = {"suite": "s", "data": {"source": "made-reviews"}, "bootstrap": 60}
    members = ["user-mean", "user-item-bias"]
    rated: list[dict[str, Any]] = [*({"baseline": name} for name in members), {"name": "both", "fuse": members}]
    result = run_benchmark(
        Suite(**common, task="rating", rows=rated), out=tmp_path / "a", results=tmp_path / "r"
    ).results
    weights = result.rows[-1].tables["rating"].fusion
    assert weights is not None and weights.form in ("ridge", "alone") and result.rows[-1].chosen_by == "RMSE"
    assert result.rows[-1].trials[0].values["rating"] > 0
    assert [(table.name, table.metrics) for table in result.tables] == [("rating", ("MAE", "RMSE"))]
    assert {line.metric for line in result.comparisons} == {"RMSE"}
    judged = [
        {"baseline": "like-ratio"},
        {"baseline": "logistic"},
        {"name": "both", "fuse": ["like-ratio", "logistic"]},
    ]
    split = {"data": {"source": "made-reviews", "split": {"kind": "global_time", "valid": 0.3, "test": 0.2}}}
    page = Suite(**common | split, task="ctr", liked=4, rows=judged)
    result = run_benchmark(page, out=tmp_path / "b", results=tmp_path / "r").results
    weights = result.rows[-1].tables["yes-no"].fusion
    assert weights is not None and weights.form in ("logit", "alone") and result.rows[-1].chosen_by == "LogLoss"
    logistic = result.rows[1].tables
    assert set(logistic) == {"yes-no"} and logistic["yes-no"].parameters["liked"] == 4
    assert 0 <= (logistic["yes-no"].metrics["AUC"].value or 0) <= 1


def test_fusion_names_earlier_rows() -> None:
    with pytest.raises(ValueError, match="no earlier model"):
        Suite(**PAGE | {"rows": [{"baseline": "popularity"}, {"name": "all", "fuse": ["popularity", "ease"]}]})
    with pytest.raises(ValueError, match="at least two members"):
        Suite(**PAGE | {"rows": [{"baseline": "popularity"}, {"name": "all", "fuse": ["popularity"]}]})
    with pytest.raises(ValueError, match="two models are called 'ease'"):
        Suite(**PAGE | {"rows": [{"baseline": "ease"}, {"baseline": "popularity", "name": "ease"}]})


def test_best_row_is_compared_with_all_others(ran: tuple[Path, FinishedBenchmark]) -> None:
    results = ran[1].results.as_json()
    best = max(results["rows"], key=lambda row: row["tables"]["excluded"]["metrics"]["NDCG@10"]["value"])["name"]
    result = [line for line in results["comparisons"] if line["table"] == "excluded"]
    assert {line["a"] for line in result} == {best} and len(result) == len(PAGE["rows"]) - 1
    assert all(line["value"] >= 0 and not {"p", "verdict"} & set(line) for line in result)  # picked on test
    assert "an unadjusted 95 % interval" in results["tables"][0]["detectable"]


def test_planned_comparisons_of_cold_and_warm_items(tmp_path: Path) -> None:
    table = tmp_path / "events.csv"
    steps = [(user, step, (user + step) % 9) for user in range(40) for step in range(4)]
    lines = [f"u{user},i{item},{step},word{item}" for user, step, item in steps]
    # For a quarter of the users, the last event is on one of two new items.
    lines += [f"u{user},new{user % 2},9,word{3 + user % 2}" for user in range(10)]
    table.write_text("\n".join(["user,item,time,title", *lines]) + "\n")
    columns = {"user": "user", "item": "item", "time": "time", "title": "title"}
    data = {"source": "table", "path": str(table), "columns": columns}
    rows = [{"baseline": "content", "tune": False}, {"baseline": "markov-1"}]
    pairs = [["content", "markov-1"], *({"rows": ["content", "markov-1"], "items": part} for part in ("cold", "warm"))]
    page = {"suite": "s", "data": data, "seen": ["included"], "bootstrap": 60, "rows": rows, "pairs": pairs}
    result = run_benchmark(Suite(**page), out=tmp_path / "o", results=tmp_path / "r").results
    every, cold, warm = result.pairs
    assert (every.items, every.n) == (None, None) and (cold.items, cold.n) == ("cold", 10) and warm.n == 30
    assert every.value is not None and cold.value is not None and warm.value is not None
    assert 40 * every.value == pytest.approx(10 * cold.value + 30 * warm.value)
    content, markov = ((row.tables["included"].cold or {})["NDCG@10"] for row in result.rows)
    assert cold.value == pytest.approx(content - markov) and cold.value > 0
    board = page_of(result)
    few = "the 10 requests for items without training interactions, 2 items, clustered by item, exploratory"
    assert f"{few}: content − markov-1" in board
    assert "10 requests for items without training interactions. Models" in board
    assert not cold.slices and not warm.slices
    for kind in ("count", "words", "history"):
        parts = [part for part in every.slices if part.name.startswith(kind)]
        assert sum(part.n for part in parts) == 40
        # Slices of fewer than twenty requests have no value.
        assert all((part.value is None) == (part.n < 20) for part in parts)
    assert "content (interactions and texts, pretrained encoder) − markov-1 (interactions only), NDCG@10:" in board
    assert f"| Targets without training interactions | 10 | 2 | {DASH} |" in board
    # Comparisons that are added later are exploratory and not in the family.
    later = Suite(**page | {"pairs": pairs[:1], "explored": pairs[1:]})
    again = run_benchmark(later, out=tmp_path / "o", results=tmp_path / "r").results
    assert len(again.pairs) == 1 and [pair.items for pair in again.explored] == ["cold", "warm"]
    assert all(pair.p is None and pair.verdict is None for pair in again.explored)
    assert again.explored[0].value == cold.value and "Exploratory comparisons, added after the test split" in page_of(
        again
    )
    # Without cold-start items there is no value.
    table.write_text("\n".join(["user,item,time,title", *lines[:160]]) + "\n")
    none = run_benchmark(Suite(**page), out=tmp_path / "n", results=tmp_path / "r").results
    assert [(pair.items, pair.n) for pair in none.pairs] == [(None, None), ("cold", 0), ("warm", 40)]
    assert none.pairs[1].value is None and "content − markov-1: no such requests" in page_of(none)
    with pytest.raises(ValueError, match="requires task: ranking"):
        Suite(**page | {"task": "rating"})


def test_comparisons_of_skipped_rows_count_in_the_family(tmp_path: Path) -> None:
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
    # The rest is run later.
    complete = run_benchmark(Suite(**page), out=tmp_path / "o", results=tmp_path / "r").results
    assert len(complete.pairs) == 3 and complete.unrun == 0 and not complete.skipped
    for wrong, message in (
        (["markof"], "there is no model 'markof'"),
        (["popularity", "markov-1", "markov"], "all models are skipped"),
    ):
        with pytest.raises(ValueError, match=message):
            Suite(**page, skip=wrong)


def test_list_metrics_and_diversity(tmp_path: Path) -> None:
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


def test_only_changed_rows_are_computed_again(
    ran: tuple[Path, FinishedBenchmark], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, first = ran
    added: list[str] = []
    genuine = suites.evaluate_row

    def counted(suite: Suite, row: Any, *rest: Any) -> dict[str, Any]:
        added.append(row.baseline)
        return genuine(suite, row, *rest)

    monkeypatch.setattr(suites, "evaluate_row", counted)
    caplog.set_level("INFO")
    again = _again(folder)
    assert added == [] and again.results.rows == first.results.rows and "other settings" not in caplog.text
    rows = [*PAGE["rows"][:-1], {"baseline": "ease", "parameters": {"penalty": 500.0}, "tune": False}]
    assert _again(folder, rows=rows).results.rows[-1].tables["excluded"].parameters == {"penalty": 500.0}
    assert added == ["ease"] and "made.json contains results of other settings" in caplog.text
    added.clear()
    _again(folder, bootstrap=61, rows=PAGE["rows"][:2])
    assert added == ["random", "popularity"]


def test_difference_in_auc_is_that_of_the_mean_values(tmp_path: Path) -> None:
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
        result = run_benchmark(Suite(**page), out=tmp_path / "a", results=tmp_path / "r").results
        one, other = (row.tables["yes-no"].metrics["AUC"] for row in reversed(result.rows))
        assert one.sd and one.value is not None and other.value is not None
        assert result.pairs[0].value == pytest.approx(one.value - other.value, abs=1e-9)


def test_changed_prompt_file_changes_the_inputs_of_a_row(tmp_path: Path) -> None:
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


def test_rejects_wrong_rows_before_the_first_row(tmp_path: Path) -> None:
    unknown = ("'penalti' (did you mean 'penalty'?)", "it takes penalty, decay, dtype")
    wrong: list[tuple[dict[str, Any], Facts]] = [
        (
            {"rows": [{"baseline": "user-mean"}]},
            Facts("unsupported", "made", column="rows", says=("'user-mean'", "choose from random")),
        ),
        (
            {"rows": [{"baseline": "ease", "parameters": {"penalti": 5}}]},
            Facts("unknown-key", column="parameters", says=unknown),
        ),
        (
            {"rows": [{"baseline": "ease", "grid": {"penalti": [5]}}]},
            Facts("unknown-key", column="grid", says=unknown[0]),
        ),
        (
            {"references": ["nowhere"]},
            Facts("unknown-name", column="references", says=("'nowhere'", "known: amazon14-beauty")),
        ),
    ]
    for changed, facts in wrong:
        with raises(RecipeError, facts):
            _again(tmp_path, **changed)
    assert not (tmp_path / "out" / "rows").exists()


def test_check_rejects_the_rows_that_eval_rejects(tmp_path: Path) -> None:
    page = tmp_path / "s.yaml"
    rows = [
        {"baseline": name} for name in ("random", "popularity", "item-knn", "markov-1", "sasrec", "ease", "markv-1")
    ]
    page.write_text(yaml.safe_dump({"suite": "s", "data": {"source": "made"}, "rows": rows}))
    with raises(RecipeError, Facts("unsupported", column="rows", says="did you mean 'markov-1'")):
        check(CheckOptions(recipe=str(page)))


def test_grid_of_a_row(tmp_path: Path) -> None:
    row = {"baseline": "item-knn", "grid": {"history": [20, 5], "decay": [1.0]}, "parameters": {"shrinkage": 0.0}}
    page = PAGE | {"split_seeds": [0], "rows": [*PAGE["rows"][:1], row]}
    (_, result) = run_benchmark(Suite(**page), out=tmp_path / "out", results=tmp_path / "r").results.rows
    assert {trial.parameters["history"] for trial in result.trials} <= {5, 20}
    assert {(trial.parameters["decay"], trial.parameters["shrinkage"]) for trial in result.trials} == {(1.0, 0.0)}
    for wrong, message in (
        ({"grid": {"history": [5]}, "parameters": {"history": 5}}, "keep one"),
        ({"tune": False}, "drop the grid"),
    ):
        with pytest.raises(ValueError, match=message):
            Suite(**page | {"rows": [row | wrong]})


def test_command_writes_results_and_page(
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
SUITES = [page for page in PAGES if detect_page_kind(page) == "suite"]
TALKS = [page for page in PAGES if detect_page_kind(page) == "chat"]


@pytest.mark.parametrize("page", TALKS, ids=lambda page: page.stem)
def test_committed_conversation_suites_are_valid(page: Path) -> None:
    talks = load_chat_suite(page)
    assert talks.chat == page.stem and load_recipe(talks.recipe, talks.overrides).tasks.present()
    assert {"history", "rules"} <= {row.manager for row in talks.rows} and talks.recommender in BASELINES


@pytest.mark.parametrize("page", SUITES, ids=lambda page: page.stem)
def test_committed_suites_are_valid(page: Path) -> None:
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
def test_sequences_equal_those_of_the_published_results(name: str) -> None:
    suite = load_suite(str(resource("eval", "suites") / f"{name}.yaml"))
    data = split_dataset(load_data(suite.data, seed=0), suite.data.split, seed=0)
    counts = reference(f"amazon14-{name}").counts
    assert len(data.dataset.items) == counts["items"]
    assert data.dataset.interactions["user_id"].n_unique() == counts["users"]
    assert len(data.dataset.interactions) == counts["interactions"]
