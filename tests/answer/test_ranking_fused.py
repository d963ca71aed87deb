"""`llmrec rank --fuse`: the lists of an ensemble equal those that its run evaluated, to the last digit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from llmrec.answer.known import read_known_entities
from llmrec.answer.rank.run import rank_file
from llmrec.baselines.validation import ranking_cases
from llmrec.data.split import split_validation_users
from llmrec.durable import parse_checked_json
from llmrec.ensembles.carried import USER_ID_PREFIX, read_training_data
from llmrec.errors import DataError, RecipeError
from llmrec.exports.export import export
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import load_recipe, load_stored_recipe
from tests.answer.rank_cases import TRAINED, evaluated_lists, evaluated_requests, jsonl, lines, options, pairs
from tests.facts import Facts, raises

pytest.importorskip("trl", reason="the train extra is not installed")

CONTROLS, JOINED = "sequential/baseline/fusion with texts", "sequential/tuned/fusion with models/continue-list"
BASELINES = ["popularity", "item-knn(history=5)", "markov-1", "markov", "content"]


@pytest.fixture(scope="module", params=["trained_run", pytest.param("ranker_run", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a linear ensemble, and one with a learned ranker."""
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path_factory.mktemp("run") / "r")


def results_of(run: Path) -> dict[str, Any]:
    return parse_checked_json((run / "results.json").read_bytes())


@pytest.mark.parametrize(("fuse", "row"), [("baselines", CONTROLS), ("model", JOINED)])
def test_fused_lists_equal_the_evaluation(run: Path, tmp_path: Path, fuse: str, row: str) -> None:
    requests = jsonl(tmp_path / "requests.jsonl", evaluated_requests(run))
    rank_file(options(run, requests, tmp_path / "out.jsonl", fuse=fuse, batch=64))
    known, results = evaluated_lists(run, row), lines(tmp_path / "out.jsonl")
    assert len(results) == len(known) == 12
    for line in results:
        assert pairs(line) == known[line["request_id"]]


def test_unknown_item_is_last(run: Path, tmp_path: Path) -> None:
    requests = evaluated_requests(run)
    for each in requests:
        each["candidates"] = [{"title": "A thing of tomorrow"}, *each["candidates"]]
    rank_file(options(run, jsonl(tmp_path / "requests.jsonl", requests), tmp_path / "o.jsonl", fuse="baselines"))
    known, results = evaluated_lists(run, CONTROLS), lines(tmp_path / "o.jsonl")
    assert len(results) == len(known) == 12
    for line in results:
        assert line["items"][:-1] == [item for item, _ in known[line["request_id"]]]
        assert line["titles"][-1] == "A thing of tomorrow"


def test_export_with_interactions_gives_same_lists(run: Path, tmp_path: Path) -> None:
    requests = jsonl(tmp_path / "requests.jsonl", evaluated_requests(run))
    bare: dict[str, Any] = {"dtype": "float32", "check_users": 0, "licence": "mit", "base_licence": "mit"}
    with raises(RecipeError, Facts(kind="missing-value", column="--fuse")):
        export(run, tmp_path / "bare", **bare)
        rank_file(options(tmp_path / "bare", requests, tmp_path / "o.jsonl", fuse="baselines"))
    export(run, tmp_path / "whole", with_interactions=True, **bare)
    carried = pl.read_parquet(tmp_path / "whole" / "interactions.parquet")
    # Users are exported as numbers, although their original ids decide which users select the epoch.
    recipe = load_stored_recipe(run)
    choosing = split_validation_users(build_study(recipe).data, recipe.eval.fusion.reserved)[0]
    kept = ranking_cases(choosing, 9)
    names = dict(enumerate(sorted({*choosing.train["user_id"], *choosing.valid["user_id"]})))
    there = read_training_data(tmp_path / "whole", seed=recipe.seed)
    assert there is not None
    known = read_known_entities(str(tmp_path / "whole"), None).histories
    assert len(known.users) == 0 and not any(known.of_user(user) for user in (carried["user_id"][0], "1", "01"))
    cases = [
        (names[int(case.request.user_id.removeprefix(USER_ID_PREFIX))], case.truth) for case in ranking_cases(there, 9)
    ]
    assert cases == [(case.request.user_id, case.truth) for case in kept]
    assert all(name.removeprefix(USER_ID_PREFIX).isdigit() for name in carried["user_id"])
    assert set(carried["part"]) == {"train", "valid"}
    # No hash is exported, because it would allow guessed user ids to be verified.
    assert sorted(carried["drawn"].drop_nulls()) == list(range(choosing.valid.height))
    for fuse, row in (("baselines", CONTROLS), ("model", JOINED)):
        rank_file(options(tmp_path / "whole", requests, tmp_path / f"{fuse}.jsonl", fuse=fuse, batch=64))
        known = evaluated_lists(run, row)
        for line in lines(tmp_path / f"{fuse}.jsonl"):
            assert pairs(line) == known[line["request_id"]]


def test_results_list_members_of_ensembles(run: Path) -> None:
    rows = {row["id"]: row for row in results_of(run)["rows"]}
    events, alone, joined = rows["sequential/baseline/fusion"], rows[CONTROLS], rows[JOINED]
    assert [part["name"] for part in events["fusion"]["parts"]] == BASELINES[:-1] and events["reads"] == "events"
    names = BASELINES
    assert [part["name"] for part in alone["fusion"]["parts"]] == names
    assert [part["name"] for part in joined["fusion"]["parts"]] == [*names, "likelihood"]
    assert (alone["reads"], joined["reads"]) == ("texts", "language model")
    if events["fusion"]["form"] == "ranker":
        # A model with little information is added to the ranker with a weight, or not at all.
        assert alone["fusion"]["form"] == "ranker" and alone["fusion"]["trees"]
        assert joined["fusion"]["form"] == "ranker" or joined["fusion"]["base"]["trees"]
    compared = {(each["a"], each["b"]) for each in results_of(run)["comparisons"] if "verdict" in each}
    for control in (events, alone):
        assert {(joined["id"], control["id"]), ("sequential/tuned/likelihood/continue-list", control["id"])} <= compared


def test_only_named_arms_are_joined(llama_folder: Path, tmp_path: Path) -> None:
    more = ("eval.arms=[zero-shot, few-shot]", "eval.fusion={model_users: 24, arms: [few-shot]}", "eval.backend=fake")
    recipe = load_recipe(
        "recipes/movielens-100k/four-tasks.yaml", [f"model.name={llama_folder}", *TRAINED, *more, "eval.scorer=fake"]
    )
    rows = {row["id"] for row in pipeline.run(recipe, tmp_path / "r", quiet=True).results["rows"]}
    assert "sequential/few-shot/fusion with models/continue-list" in rows
    assert not any("zero-shot/fusion" in name for name in rows)


def test_unfitted_ensembles_are_refused(run: Path, tmp_path: Path) -> None:
    requests = jsonl(tmp_path / "requests.jsonl", evaluated_requests(run)[:2])
    with raises(RecipeError, Facts(kind="missing-value", column="--fuse")):
        rank_file(options(run, requests, tmp_path / "o.jsonl", fuse="model", strategy="likelihood-prior"))
    with raises(RecipeError, Facts(kind="contradiction", column="--fuse")):
        rank_file(options(run, requests, tmp_path / "o.jsonl", fuse="model", candidates="all"))


@pytest.mark.slow
def test_fuses_two_runs_without_a_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("eval.arms=[zero-shot]", "eval.backend=fake", "eval.scorer=fake")
    other = load_recipe(run / "recipe.yaml", more)
    second = pipeline.run(other, tmp_path / "second", quiet=True)

    def fail(*args: Any, **named: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("llmrec.pipeline.engines.load_model", fail)
    fused = pipeline.fuse([run, second.folder], tmp_path / "joined")
    rows = {row["id"]: row for row in fused.results["rows"]}
    joined = rows["sequential/tuned/fusion with models"]
    names = [part["name"] for part in joined["fusion"]["parts"]]
    assert names == [*BASELINES, "tuned/likelihood/continue-list", "zero-shot/likelihood/continue-list"]
    # Equal baselines of both runs are listed once.
    assert sum(row["arm"] == "baseline" for row in rows.values()) == 8
    assert {row["arm"] for row in rows.values()} == {"baseline", "tuned", "zero-shot"}
    alone = rows["sequential/baseline/fusion with texts"]
    # The ensembles of the baselines equal those of the run.
    known = {row["id"]: row["fusion"] for row in results_of(run)["rows"] if row.get("fusion")}
    for name in ("sequential/baseline/fusion", alone["id"]):
        assert rows[name]["fusion"] == known[name]
    compared = {(each["a"], each["b"]) for each in fused.results["comparisons"] if "verdict" in each}
    assert (joined["id"], alone["id"]) in compared
    assert fused.report.is_file() and "Members of <bdi>fusion" in fused.report.read_text(encoding="utf-8")
    assert pl.read_parquet(tmp_path / "joined" / "predictions.parquet").height == 12 * len(rows)


def test_runs_with_other_cases_are_refused(trained_run: Path, tmp_path: Path) -> None:
    more = ("eval.arms=[]", "eval.users=11", "tasks.sequential.baselines=[random, popularity, item-knn, markov-1]")
    other = load_recipe(trained_run / "recipe.yaml", more)
    second = pipeline.run(other, tmp_path / "second", quiet=True)
    with raises(DataError, Facts(kind="mismatch", says="eval.users")):
        pipeline.fuse([trained_run, second.folder], tmp_path / "joined")
    with raises(DataError, Facts(kind="missing-file")):
        pipeline.fuse([trained_run, tmp_path], tmp_path / "joined")
