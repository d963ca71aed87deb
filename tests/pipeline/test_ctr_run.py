"""A yes/no recipe end to end on a tiny random model: balanced cases, few training rows, the report, the audit."""

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

from llmrec.errors import RecipeError
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.evaluation import Evaluation
from llmrec.pipeline.leaks import training_interactions, training_rows
from llmrec.pipeline.resume import Budget
from llmrec.pipeline.row_specs import RowSpec
from llmrec.pipeline.study import build_study
from llmrec.pipeline.training import plan_training, training_key
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from tests.facts import Facts, raises
from tests.pipeline.test_audit import rows_with

pytest.importorskip("trl", reason="the train extra is not installed")

SMALL = (
    "data={source: made-reviews, noun: products, split: {kind: last_share, valid: 0.2, test: 0.4}}",
    "reviews=null",
    "tasks={ctr: {balance: user, strategies: [yes-no, parsed-yes-no], history: 5, liked: 4}}",
    "train.steps=3",
    "train.batch_tokens=1024",
    "train.max_row_tokens=1000",
    "train.examples=4",
    "train.valid_rows=4",
    "train.lora.top_layers=1",
    "eval.users=8",
    "eval.bootstrap=50",
    "eval.backend=hf",
)


def recipe(folder: object, *more: str) -> Recipe:
    return load_recipe(
        "recipes/movielens-100k/four-tasks.yaml", [f"model.name={folder}", "model.dtype=float32", *SMALL, *more]
    )


@pytest.fixture(scope="module")
def done(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, pipeline.Run]:
    chosen = recipe(llama_folder)
    return chosen, pipeline.run(chosen, tmp_path_factory.mktemp("run") / "r", quiet=True)


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


def test_cases_are_whole_users_balanced(done: tuple[Recipe, pipeline.Run]) -> None:
    predictions = pl.read_parquet(done[1].folder / "predictions.parquet")
    own = predictions.filter(pl.col("row_id") == "ctr/baseline/like-ratio")
    counts = Counter(own.select("user_id", "truth").iter_rows())
    users = {user for user, _ in counts}
    assert len(users) == 8
    assert all(counts[user, "1.0"] == counts[user, "0.0"] > 0 for user in users)


def test_training_saw_four_rows_two_of_each(done: tuple[Recipe, pipeline.Run]) -> None:
    study = build_study(done[0])
    rows = list(islice(study.training_examples("ctr"), 40))
    assert len(set(rows)) == 4
    texts = Counter(segment.text for row in set(rows) for segment in row.answer)
    assert texts == {"Yes": 2, "No": 2}
    assert not {pair for row in rows for pair in row.pairs} & study.data.held_out
    assert training_rows(study, "ctr", 40).verdict == "clean"
    assert done[1].results["training"]["rows"]["ctr"] > 4


def test_the_audit_sees_what_the_pool_shows(done: tuple[Recipe, pipeline.Run]) -> None:
    """A pool with a held-out pair is found, so that the clean verdict above says something."""
    study = build_study(done[0])
    held = study.data.holdouts("test")[0]
    pair = held.user_id, held.item_id
    leaking = rows_with(study, "ctr", lambda row: replace(row, pairs=(pair, *row.pairs)), place=None)
    assert training_rows(leaking, "ctr", 8).verdict == "leak"


def test_the_page_shows_the_family(done: tuple[Recipe, pipeline.Run]) -> None:
    page = (done[1].folder / "report" / "index.html").read_text(encoding="utf-8")
    for words in (
        "Like prediction",
        "Calibration",
        "Observed share of yes",
        "like-ratio",
        "balanced within each user",
    ):
        assert words in page, words
    text = (done[1].folder / "report" / "report.md").read_text(encoding="utf-8")
    assert "#### Calibration" in text
    audit = json.loads((done[1].folder / "audit.json").read_text(encoding="utf-8"))
    assert audit["leaks"] == 0 and any(line["name"] == "training rows of ctr" for line in audit["checks"])


def test_calibration_moves_probabilities_and_no_order(
    done: tuple[Recipe, pipeline.Run], tmp_path: Path, llama_folder: Path
) -> None:

    chosen = recipe(llama_folder, "tasks.ctr.calibrate=valid", "eval.arms=[zero-shot]", "tasks.ctr.strategies=[yes-no]")
    rows = {row["id"]: row for row in pipeline.run(chosen, tmp_path / "r", quiet=True).results["rows"]}
    plain = {row["id"]: row for row in done[1].results["rows"]}
    for name in ("ctr/zero-shot/yes-no/by-taste", "ctr/baseline/logistic"):
        one, other = rows[name], plain[name]
        assert one["calibration"]["n"] > 0 and "calibration" not in other
        assert one["metrics"]["GAUC"]["value"] == pytest.approx(other["metrics"]["GAUC"]["value"])
        assert one["metrics"]["LogLoss"]["value"] != other["metrics"]["LogLoss"]["value"]
        assert one["inputs"].endswith("calibrated on the validation split")
    # The users who weigh the fusion are not those whose answers the calibration is fitted to.
    evaluation = Evaluation(build_study(chosen), None, tmp_path / "r", Budget(quiet=True), quiet=True)
    fitted, weigh = (
        {case.request.user_id for case in found}
        for found in (evaluation._calibrating("ctr"), evaluation._weighing.cases("ctr"))
    )
    assert fitted and weigh and not fitted & weigh
    assert rows["ctr/baseline/logistic"]["calibration"]["n"] == len(evaluation._calibrating("ctr"))
    # A fusion is weighed by answers on the scale of those that it joins.
    said = [
        json.loads((folder / "rows" / "ctr.baseline.logistic.json").read_text(encoding="utf-8"))["weighing"]
        for folder in (tmp_path / "r", done[1].folder)
    ]
    odds = [np.log(np.array(list(each.values())) / (1 - np.array(list(each.values())))) for each in said]
    curve = rows["ctr/baseline/logistic"]["calibration"]
    assert said[0] and said[0].keys() == said[1].keys()
    assert odds[0] == pytest.approx(curve["scale"] * odds[1] + curve["bias"], abs=1e-6)
    with raises(RecipeError, Facts("contradiction", column="tasks.ctr.calibrate", says="eval.split=valid")):
        recipe(llama_folder, "tasks.ctr.calibrate=valid", "eval.split=valid")


def test_a_dry_run_counts_both_strategies(llama_folder: Path) -> None:
    from llmrec.backends.encode import Encoder
    from llmrec.cli.estimate import eval_work
    from llmrec.models.load import load_tokenizer
    from llmrec.recipe.schema import ModelSection

    encoder = Encoder(load_tokenizer(str(llama_folder), ModelSection(name=str(llama_folder))), max_length=9999)
    one = eval_work(build_study(recipe(llama_folder, "tasks.ctr.strategies=[yes-no]")), encoder)
    both = eval_work(build_study(recipe(llama_folder)), encoder)
    assert all(
        0 < one[arm].tokens < both[arm].tokens < 3 * one[arm].tokens for arm in ("zero-shot", "few-shot", "tuned")
    )


def test_training_sees_what_reads_alike_where_it_decides_rows(llama_folder: Path) -> None:
    def key(*more: str) -> str:
        return training_key(build_study(recipe(llama_folder, *more)), str(llama_folder))

    assert key("encoder=chance") == key()
    assert key("tasks.ctr.past=relevant", "encoder=chance") != key("tasks.ctr.past=relevant")


def test_rows_see_what_reads_alike(llama_folder: Path) -> None:
    def key(arm: str, *more: str) -> str:
        study = build_study(recipe(llama_folder, *more))
        spec = RowSpec("ctr", arm, "yes-no", study.eval_templates("ctr")[0], 2 if arm == "few-shot" else 0)
        return Evaluation(study, None, Path("nowhere"), Budget(), quiet=True).key(spec, "hf", "")

    for more in (["tasks.ctr.past=relevant"], ["eval.shots.choice=nearest"]):
        assert key("few-shot", *more) != key("few-shot", *more, "encoder=chance")
    assert key("few-shot") == key("few-shot", "encoder=chance")
    assert key("zero-shot", "eval.shots.choice=nearest") == key(
        "zero-shot", "eval.shots.choice=diverse", "encoder=chance"
    )


def test_a_row_costs_its_own_cases_alone_whether_or_not_it_was_killed(tmp_path: Path, llama_folder: Path) -> None:
    chosen = recipe(llama_folder, "tasks.ctr.calibrate=valid", "eval.arms=[zero-shot]", "tasks.ctr.strategies=[yes-no]")
    pipeline.run(chosen, tmp_path / "r", quiet=True)
    from llmrec.backends.cache import _sum

    with closing(sqlite3.connect(tmp_path / "r" / "answers.sqlite")) as store, store:
        for key, value in store.execute("SELECT key, value FROM answers").fetchall():
            slow = json.dumps({**json.loads(value), "seconds": 100.0})
            store.execute("UPDATE answers SET value = ?, sum = ? WHERE key = ?", (slow, _sum(key, slow), key))
    shutil.rmtree(tmp_path / "r" / "rows")
    rows = {row["id"]: row for row in pipeline.run(chosen, tmp_path / "r", quiet=True).results["rows"]}
    row = rows["ctr/zero-shot/yes-no/by-taste"]
    assert row["calibration"]["n"] > 0
    assert row["cost"]["seconds"] == pytest.approx(100 * row["n"], abs=60)


def test_a_pool_is_trained_on_whole_or_not_at_all(llama_folder: Path, encoder: Any) -> None:
    with raises(RecipeError, Facts("too-large", column="train.max_row_tokens", says="tasks.ctr")):
        plan_training(build_study(recipe(llama_folder, "train.max_row_tokens=40")), encoder)
    with raises(RecipeError, Facts("too-few", column="train.examples", says="tasks.ctr")):
        plan_training(build_study(recipe(llama_folder, "train.examples=100000")), encoder)
    again = [list(plan_training(build_study(recipe(llama_folder)), encoder).steps) for _ in range(2)]
    assert again[0] == again[1]  # what a killed run goes on with
    packed = plan_training(build_study(recipe(llama_folder, "train.packing=tree")), encoder)
    assert len({row.ids for step in packed.steps for row in step.rows}) == 4


def test_every_family_under_several_held_out_events_a_user(llama_folder: Path, tmp_path: Path) -> None:
    families = "{rating: {}, sequential: {}, direct: {}, explanation: {}, ctr: {}}"
    chosen = recipe(
        llama_folder,
        f"tasks={families}",
        "train.examples=null",
        "eval.arms=[zero-shot, few-shot]",
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


def test_the_audit_finds_training_events_after_a_users_held_out_ones(llama_folder: Path) -> None:
    data = build_study(recipe(llama_folder)).data
    assert training_interactions(data).verdict == "clean"
    late = data.train.head(1).with_columns(timestamp=pl.lit(data.test["timestamp"].max()) + 1.0)
    assert late["user_id"][0] in data.test["user_id"]
    found = training_interactions(replace(data, train=pl.concat([data.train, late])))
    assert found.verdict == "leak" and "later than a held-out interaction" in found.examples[0]
