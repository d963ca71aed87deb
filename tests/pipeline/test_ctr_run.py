"""A yes/no recipe end to end on a tiny random model: balanced cases, few training rows, report and audit."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.backends.cache import _row_checksum
from llmrec.errors import RecipeError
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.evaluation import Evaluation
from llmrec.pipeline.leaks import audit_training_rows
from llmrec.pipeline.resume import StageTimer
from llmrec.pipeline.row_specs import RowSpec
from llmrec.pipeline.study import build_study
from llmrec.pipeline.training import plan_training, training_key
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from tests.facts import Facts, raises
from tests.pipeline.test_audit import rows_with

pytest.importorskip("trl", reason="the train extra is not installed")

SMALL = (
    *("data={source: made-reviews, noun: products, split: {kind: last_share, valid: 0.2, test: 0.4}}", "reviews=null"),
    *("tasks={ctr: {balance: user, strategies: [yes-no, parsed-yes-no], history: 5, liked: 4}}", "train.steps=3"),
    *("train.batch_tokens=1024", "train.max_row_tokens=1000", "train.examples=4", "train.valid_rows=4"),
    *("train.lora.top_layers=1", "eval.users=8", "eval.bootstrap=50", "eval.backend=hf", "eval.fusion={}"),
)
CALIBRATED = ("tasks.ctr.calibrate=valid", "eval.arms=[zero-shot]", "tasks.ctr.strategies=[yes-no]")


def recipe(folder: object, *more: str) -> Recipe:
    return load_recipe(
        "recipes/movielens-100k/four-tasks.yaml", [f"model.name={folder}", "model.dtype=float32", *SMALL, *more]
    )


@pytest.fixture(scope="module")
def done(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, pipeline.Run]:
    chosen = recipe(llama_folder)
    return chosen, pipeline.run(chosen, tmp_path_factory.mktemp("run") / "r", quiet=True)


@pytest.fixture(scope="module")
def calibrated(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Run:
    return pipeline.run(recipe(llama_folder, *CALIBRATED), tmp_path_factory.mktemp("calibrated") / "r", quiet=True)


def test_rows_of_every_arm_and_both_strategies(done: tuple[Recipe, pipeline.Run]) -> None:
    rows = {row["id"]: row for row in done[1].results["rows"]}
    for arm in ("zero-shot", "few-shot", "tuned"):
        judged, parsed = (rows[f"ctr/{arm}/{name}/by-taste"] for name in ("yes-no", "parsed-yes-no"))
        assert judged["parse_rate"] == 1.0 and parsed["n"] == judged["n"]
        assert sum(each["n"] for each in judged["reliability"]) == judged["n"]
        assert judged["inputs"].startswith("text of the last 5 events")
    control = rows["ctr/baseline/like-ratio"]
    assert control["metrics"]["GAUC"]["value"] == 0.5
    assert control["metrics"]["AUC"]["value"] == pytest.approx(0.5)
    assert "users:balanced" in control["metrics"]["AUC"]["signature"]
    assert control["users_left_out"] == 0
    assert done[1].results["headline"] == {"ctr": "AUC"}


def test_cases_are_balanced_within_users(done: tuple[Recipe, pipeline.Run]) -> None:
    predictions = pl.read_parquet(done[1].folder / "predictions.parquet")
    row = predictions.filter(pl.col("row_id") == "ctr/baseline/like-ratio")
    counts = Counter(row.select("user_id", "truth").iter_rows())
    users = {user for user, _ in counts}
    assert len(users) == 8
    assert all(counts[user, "1.0"] == counts[user, "0.0"] > 0 for user in users)


def test_training_uses_two_rows_of_each_class(done: tuple[Recipe, pipeline.Run]) -> None:
    study = build_study(done[0])
    rows = list(islice(study.training_examples("ctr"), 40))
    assert len(set(rows)) == 4
    texts = Counter(segment.text for row in set(rows) for segment in row.answer)
    assert texts == {"Yes": 2, "No": 2}
    assert not {pair for row in rows for pair in row.pairs} & study.data.held_out
    assert audit_training_rows(study, "ctr", 40).verdict == "clean"
    assert done[1].results["training"]["rows"]["ctr"] > 4

    held = study.data.holdouts("test")[0]
    pair = held.user_id, held.item_id
    leaking = rows_with(study, "ctr", lambda row: replace(row, pairs=(pair, *row.pairs)), row=None)
    assert audit_training_rows(leaking, "ctr", 8).verdict == "leak"


def test_report_shows_the_task(done: tuple[Recipe, pipeline.Run]) -> None:
    page = (done[1].folder / "report" / "index.html").read_text(encoding="utf-8")
    texts = ("Like prediction", "Calibration", "Observed share of yes", "like-ratio", "balanced within each user")
    for text in texts:
        assert text in page, text
    text = (done[1].folder / "report" / "report.md").read_text(encoding="utf-8")
    assert "#### Calibration" in text
    audit = json.loads((done[1].folder / "audit.json").read_text(encoding="utf-8"))
    assert audit["leaks"] == 0 and any(line["name"] == "training rows of ctr" for line in audit["checks"])


def test_calibration_changes_probabilities_but_not_their_order(
    done: tuple[Recipe, pipeline.Run], calibrated: pipeline.Run, llama_folder: Path
) -> None:
    rows = {row["id"]: row for row in calibrated.results["rows"]}
    plain = {row["id"]: row for row in done[1].results["rows"]}
    for name in ("ctr/zero-shot/yes-no/by-taste", "ctr/baseline/logistic"):
        one, other = rows[name], plain[name]
        assert one["calibration"]["n"] > 0 and "calibration" not in other
        assert one["metrics"]["GAUC"]["value"] == pytest.approx(other["metrics"]["GAUC"]["value"])
        assert one["metrics"]["LogLoss"]["value"] != other["metrics"]["LogLoss"]["value"]
        assert one["inputs"].endswith("calibrated on the validation split")
    # Calibration and ensemble weights are fitted on different users.
    study = build_study(recipe(llama_folder, *CALIBRATED))
    evaluation = Evaluation(study, None, calibrated.folder, StageTimer(quiet=True), quiet=True)
    fitted, weigh = (
        {case.request.user_id for case in cases}
        for cases in (evaluation._calibrating("ctr"), evaluation._weighing.cases("ctr"))
    )
    assert fitted and weigh and not fitted & weigh
    assert rows["ctr/baseline/logistic"]["calibration"]["n"] == len(evaluation._calibrating("ctr"))
    # Answers that weigh an ensemble are calibrated too.
    weighing = [
        json.loads((folder / "rows" / "ctr.baseline.logistic.json").read_text(encoding="utf-8"))["weighing"]
        for folder in (calibrated.folder, done[1].folder)
    ]
    odds = [np.log(np.array(list(each.values())) / (1 - np.array(list(each.values())))) for each in weighing]
    curve = rows["ctr/baseline/logistic"]["calibration"]
    assert weighing[0] and weighing[0].keys() == weighing[1].keys()
    assert odds[0] == pytest.approx(curve["scale"] * odds[1] + curve["bias"], abs=1e-6)
    with raises(RecipeError, Facts("contradiction", column="tasks.ctr.calibrate", says="eval.split=valid")):
        recipe(llama_folder, "tasks.ctr.calibrate=valid", "eval.split=valid")


def test_training_key_depends_on_encoder_if_rows_do(llama_folder: Path) -> None:
    def key(*more: str) -> str:
        return training_key(build_study(recipe(llama_folder, *more)), str(llama_folder))

    assert key("encoder=chance") == key()
    assert key("tasks.ctr.past=relevant", "encoder=chance") != key("tasks.ctr.past=relevant")


def test_row_key_depends_on_encoder_if_prompts_do(llama_folder: Path) -> None:
    def key(arm: str, *more: str) -> str:
        study = build_study(recipe(llama_folder, *more))
        spec = RowSpec("ctr", arm, "yes-no", study.eval_templates("ctr")[0], 2 if arm == "few-shot" else 0)
        return Evaluation(study, None, Path("nowhere"), StageTimer(), quiet=True).key(spec, "hf", "")

    for more in (["tasks.ctr.past=relevant"], ["eval.shots.choice=nearest"]):
        assert key("few-shot", *more) != key("few-shot", *more, "encoder=chance")
    assert key("few-shot") == key("few-shot", "encoder=chance")
    assert key("zero-shot", "eval.shots.choice=nearest") == key(
        "zero-shot", "eval.shots.choice=diverse", "encoder=chance"
    )


def test_resumed_row_has_the_cost_of_its_cases(calibrated: pipeline.Run, llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(calibrated.folder, tmp_path / "r")
    with closing(sqlite3.connect(tmp_path / "r" / "answers.sqlite")) as store, store:
        for key, value in store.execute("SELECT key, value FROM answers").fetchall():
            slow = json.dumps({**json.loads(value), "seconds": 100.0})
            store.execute("UPDATE answers SET value = ?, sum = ? WHERE key = ?", (slow, _row_checksum(key, slow), key))
    shutil.rmtree(tmp_path / "r" / "rows")
    rows = pipeline.run(recipe(llama_folder, *CALIBRATED), tmp_path / "r", quiet=True).results["rows"]
    row = next(row for row in rows if row["id"] == "ctr/zero-shot/yes-no/by-taste")
    assert row["calibration"]["n"] > 0
    assert row["cost"]["seconds"] == pytest.approx(100 * row["n"], abs=60)


def test_rejects_pool_that_cannot_be_trained_on_completely(llama_folder: Path, encoder: Any) -> None:
    with raises(RecipeError, Facts("too-large", column="train.max_row_tokens", says="tasks.ctr")):
        plan_training(build_study(recipe(llama_folder, "train.max_row_tokens=40")), encoder)
    with raises(RecipeError, Facts("too-few", column="train.examples", says="tasks.ctr")):
        plan_training(build_study(recipe(llama_folder, "train.examples=100000")), encoder)
    again = [list(plan_training(build_study(recipe(llama_folder)), encoder).steps) for _ in range(2)]
    assert again[0] == again[1]
    packed = plan_training(build_study(recipe(llama_folder, "train.packing=tree")), encoder)
    assert len({row.ids for step in packed.steps for row in step.rows}) == 4


def test_every_task_with_several_held_out_events_per_user(llama_folder: Path, tmp_path: Path) -> None:
    ranked = "{baselines: [random, popularity, item-knn, markov-1]}"
    chosen = recipe(
        llama_folder,
        f"tasks={{rating: {{}}, sequential: {ranked}, direct: {ranked}, explanation: {{}}, ctr: {{}}}}",
        "train.examples=null",
        "eval.arms=[few-shot]",
        "eval.backend=fake",
        "eval.candidates.count=5",
        "eval.users=5",
    )
    done = pipeline.run(chosen, tmp_path / "r", quiet=True)
    study = build_study(chosen)
    assert json.loads((tmp_path / "r" / "audit.json").read_text(encoding="utf-8"))["leaks"] == 0
    held = Counter(user for user, _ in study.data.test.select("user_id", "item_id").iter_rows())
    for row in done.results["rows"]:
        assert row["users"] == 5 < row["n"], row["id"]
    for family in study.tasks:
        cases = study.cases(family)
        assert Counter(case.request.user_id for case in cases) == {
            user: held[user] for user in {case.request.user_id for case in cases}
        }
        tested = study.data.test.group_by("user_id").agg("item_id")
        items = {user: set(names) for user, names in tested.iter_rows()}
        for case in cases:
            shown = {event.item_id for event in case.request.history}
            assert shown and not shown & items[case.request.user_id]
