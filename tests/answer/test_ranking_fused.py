"""`llmrec rank --fuse`: the lists of a fusion are those that its run evaluated, to the last digit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from llmrec.answer.known import known_of
from llmrec.answer.rank.run import rank_file
from llmrec.baselines.validation import ranking_cases
from llmrec.data.split import halves
from llmrec.durable import checked
from llmrec.ensembles.carried import NUMBERED
from llmrec.ensembles.carried import carried as read_carried
from llmrec.errors import DataError, RecipeError
from llmrec.exports.export import export
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import load_recipe, load_stored
from tests.answer.rank_cases import TRAINED, jsonl, lines, options
from tests.facts import Facts, raises

pytest.importorskip("trl", reason="the train extra is not installed")

CONTROLS, JOINED = "sequential/baseline/fusion with texts", "sequential/tuned/fusion with models/continue-list"
BASELINES = ["popularity", "item-knn(history=5)", "markov-1", "markov", "content"]


@pytest.fixture(scope="module", params=["trained_run", pytest.param("ranker_run", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a linear ensemble, and one with a learned ranker."""
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path_factory.mktemp("run") / "r")


def results_of(run: Path) -> dict[str, Any]:
    return checked((run / "results.json").read_bytes())


def requests_of(run: Path) -> list[dict[str, Any]]:
    """The requests of the run's test split, as people write them."""
    study = build_study(load_recipe(run / "recipe.yaml"))
    return [
        {
            "id": case.request.id,
            "user_id": case.request.user_id,
            "history": [
                {"item_id": event.item_id, "rating": event.rating, "timestamp": event.timestamp}
                for event in case.request.history
            ],
            "candidates": list(case.request.candidates or ()),
        }
        for case in study.cases("sequential")
    ]


def lists_of(run: Path, row: str) -> dict[str, dict[str, Any]]:
    found = pl.read_parquet(run / "predictions.parquet").filter(pl.col("row_id") == row)
    return {request: json.loads(parsed) for request, parsed in found.select("request_id", "parsed").iter_rows()}


@pytest.mark.parametrize(
    ("fuse", "row"),
    [("baselines", CONTROLS), ("model", JOINED)],
)
def test_the_lists_are_those_of_the_evaluation(run: Path, tmp_path: Path, fuse: str, row: str) -> None:
    asked = jsonl(tmp_path / "requests.jsonl", requests_of(run))
    rank_file(options(run, asked, tmp_path / "out.jsonl", fuse=fuse, batch=64))
    known, found = lists_of(run, row), lines(tmp_path / "out.jsonl")
    assert len(found) == len(known) == 12
    for line in found:
        assert [line["items"], line["scores"]] == list(known[line["request_id"]].values())


def test_an_item_that_no_part_knows_is_last(run: Path, tmp_path: Path) -> None:
    requests = requests_of(run)
    for each in requests:
        each["candidates"] = [{"title": "A thing of tomorrow"}, *each["candidates"]]
    rank_file(options(run, jsonl(tmp_path / "requests.jsonl", requests), tmp_path / "o.jsonl", fuse="baselines"))
    known, found = lists_of(run, CONTROLS), lines(tmp_path / "o.jsonl")
    assert len(found) == len(known) == 12
    for line in found:
        assert line["items"][:-1] == known[line["request_id"]]["items"] and line["titles"][-1] == "A thing of tomorrow"


def test_an_export_with_its_interactions_gives_the_same_lists(run: Path, tmp_path: Path) -> None:
    asked = jsonl(tmp_path / "requests.jsonl", requests_of(run))
    bare: dict[str, Any] = {"dtype": "float32", "check_users": 0, "licence": "mit", "base_licence": "mit"}
    with raises(RecipeError, Facts(kind="missing-value", column="--fuse")):
        export(run, tmp_path / "bare", **bare)
        rank_file(options(tmp_path / "bare", asked, tmp_path / "o.jsonl", fuse="baselines"))
    export(run, tmp_path / "whole", with_interactions=True, **bare)
    carried = pl.read_parquet(tmp_path / "whole" / "interactions.parquet")
    # Users go out under numbers, which are nobody's id; who chooses an epoch is drawn by the names that they had.
    recipe = load_stored(run)
    choosing = halves(build_study(recipe).data, recipe.eval.fusion.reserved)[0]
    kept = ranking_cases(choosing, 9)
    names = dict(enumerate(sorted({*choosing.train["user_id"], *choosing.valid["user_id"]})))
    there = read_carried(tmp_path / "whole", seed=recipe.seed)
    assert there is not None
    known = known_of(str(tmp_path / "whole"), None).histories
    assert len(known.users) == 0 and not any(known.of_user(user) for user in (carried["user_id"][0], "1", "01"))
    found = [(names[int(case.request.user_id.removeprefix(NUMBERED))], case.truth) for case in ranking_cases(there, 9)]
    assert found == [(case.request.user_id, case.truth) for case in kept]
    assert all(name.removeprefix(NUMBERED).isdigit() for name in carried["user_id"])
    assert set(carried["part"]) == {"train", "valid"}
    # No hash goes along, by which a guess could be tried.
    assert sorted(carried["drawn"].drop_nulls()) == list(range(choosing.valid.height))
    for fuse, row in (("baselines", CONTROLS), ("model", JOINED)):
        rank_file(options(tmp_path / "whole", asked, tmp_path / f"{fuse}.jsonl", fuse=fuse, batch=64))
        known = lists_of(run, row)
        for line in lines(tmp_path / f"{fuse}.jsonl"):
            assert [line["items"], line["scores"]] == list(known[line["request_id"]].values())


def test_a_run_shows_what_its_fusions_weigh(run: Path) -> None:
    rows = {row["id"]: row for row in results_of(run)["rows"]}
    events, alone, joined = rows["sequential/baseline/fusion"], rows[CONTROLS], rows[JOINED]
    assert [part["name"] for part in events["fusion"]["parts"]] == BASELINES[:-1] and events["reads"] == "events"
    names = BASELINES
    assert [part["name"] for part in alone["fusion"]["parts"]] == names
    assert [part["name"] for part in joined["fusion"]["parts"]] == [*names, "likelihood"]
    assert (alone["reads"], joined["reads"]) == ("texts", "language model")
    if events["fusion"]["form"] == "ranker":
        # A model that says little is added to the ranker by a weight, or not at all.
        assert alone["fusion"]["form"] == "ranker" and alone["fusion"]["trees"]
        assert joined["fusion"]["form"] == "ranker" or joined["fusion"]["base"]["trees"]
    pairs = {(each["a"], each["b"]) for each in results_of(run)["comparisons"] if "verdict" in each}
    for control in (events, alone):
        assert {(joined["id"], control["id"]), ("sequential/tuned/likelihood/continue-list", control["id"])} <= pairs


def test_arms_that_are_not_named_are_not_joined(llama_folder: Path, tmp_path: Path) -> None:
    more = ("eval.arms=[zero-shot, few-shot]", "eval.fusion={model_users: 24, arms: [few-shot]}", "eval.backend=fake")
    recipe = load_recipe(
        "recipes/movielens-100k/four-tasks.yaml", [f"model.name={llama_folder}", *TRAINED, *more, "eval.scorer=fake"]
    )
    rows = {row["id"] for row in pipeline.run(recipe, tmp_path / "r", quiet=True).results["rows"]}
    assert "sequential/few-shot/fusion with models/continue-list" in rows
    assert not any("zero-shot/fusion" in name for name in rows)


def test_what_was_not_weighed_is_refused(run: Path, tmp_path: Path) -> None:
    asked = jsonl(tmp_path / "requests.jsonl", requests_of(run)[:2])
    with raises(RecipeError, Facts(kind="missing-value", column="--fuse")):
        rank_file(options(run, asked, tmp_path / "o.jsonl", fuse="model", strategy="likelihood-prior"))
    with raises(RecipeError, Facts(kind="contradiction", column="--fuse")):
        rank_file(options(run, asked, tmp_path / "o.jsonl", fuse="model", candidates="all"))


# --------------------------------------------------------------------------- runs that are finished


@pytest.mark.slow
def test_rows_of_two_runs_are_joined_and_nothing_is_asked_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("eval.arms=[zero-shot]", "eval.backend=fake", "eval.scorer=fake")
    other = load_recipe(run / "recipe.yaml", more)
    second = pipeline.run(other, tmp_path / "second", quiet=True)

    def fail(*args: Any, **named: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("llmrec.pipeline.engines.load_model", fail)
    made = pipeline.fuse([run, second.folder], tmp_path / "joined")
    rows = {row["id"]: row for row in made.results["rows"]}
    joined = rows["sequential/tuned/fusion with models"]
    names = [part["name"] for part in joined["fusion"]["parts"]]
    assert names == [*BASELINES, "tuned/likelihood/continue-list", "zero-shot/likelihood/continue-list"]
    # Baselines that both runs made alike stand once; those of the language models stand beside each other.
    assert sum(row["arm"] == "baseline" for row in rows.values()) == 8
    assert {row["arm"] for row in rows.values()} == {"baseline", "tuned", "zero-shot"}
    alone = rows["sequential/baseline/fusion with texts"]
    # The ensembles of the baselines are those of the run.
    known = {row["id"]: row["fusion"] for row in results_of(run)["rows"] if row.get("fusion")}
    for name in ("sequential/baseline/fusion", alone["id"]):
        assert rows[name]["fusion"] == known[name]
    pairs = {(each["a"], each["b"]) for each in made.results["comparisons"] if "verdict" in each}
    assert (joined["id"], alone["id"]) in pairs
    assert made.report.is_file() and "What <bdi>fusion" in made.report.read_text(encoding="utf-8")
    assert pl.read_parquet(tmp_path / "joined" / "predictions.parquet").height == 12 * len(rows)


def test_runs_over_other_cases_are_not_joined(trained_run: Path, tmp_path: Path) -> None:
    more = ("eval.arms=[zero-shot]", "eval.backend=fake", "eval.scorer=fake", "eval.users=11")
    other = load_recipe(trained_run / "recipe.yaml", more)
    second = pipeline.run(other, tmp_path / "second", quiet=True)
    with raises(DataError, Facts(kind="mismatch")):
        pipeline.fuse([trained_run, second.folder], tmp_path / "joined")
    with raises(DataError, Facts(kind="missing-file")):
        pipeline.fuse([trained_run, tmp_path], tmp_path / "joined")
