"""A run that learns from reward: start from a tuned run, selection, audit, report and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrec.errors import RecipeError
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.leaks import audit_training_row_independence, audit_training_rows
from llmrec.pipeline.objectives import reward_family
from llmrec.pipeline.study import build_study
from llmrec.recipe.schema import Recipe
from llmrec.report.results import read_results
from tests.facts import Facts, raises
from tests.pipeline.test_pipeline import recipe

pytest.importorskip("trl", reason="the train extra is not installed")

ITEMS = (
    *("tasks.rating=null", "tasks.direct=null", "tasks.explanation=null", "tasks.sequential.strategies=[search]"),
    *("tasks.sequential.templates=[continue-codes]", "tasks.sequential.history=3", "index={scheme: token}"),
    *("tasks.sequential.baselines=[random, popularity, item-knn, markov-1]", "tasks.sequential.arms=null"),
    "eval.arms=[tuned]",
    *("eval.candidates={kind: catalogue}", "eval.beams=4", "train.judge={users: 8, patience: null}"),
)


def after(model: Path, start: Path, *more: str) -> Recipe:
    reward = "{kind: {hit: 1, rank-penalty: 1, percentile: 0.1}, baseline: markov-1, group: 4}"
    steps = ("train.steps=2", "train.valid_every=1", "train.save_every=1", f"train.reward={reward}")
    return recipe(model, *ITEMS, f"train.start={start}", *steps, *more)


@pytest.fixture(scope="module")
def tuned(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    pipeline.train(recipe(llama_folder, *ITEMS, "train.steps=1"), folder, quiet=True)
    return folder


def test_run_learns_from_reward(llama_folder: Path, tuned: Path, tmp_path: Path) -> None:
    done = pipeline.run(after(llama_folder, tuned), tmp_path / "run", quiet=True)
    training = done.results["training"]
    assert list(training["rows"]) == ["sequential"] and training["rows"]["sequential"] > 2
    lines = [line["reward"] for line in training["log"] if "reward" in line]
    assert len(lines) == 2 and training["tokens"] == sum(line["tokens"] for line in lines)
    for line in lines:
        assert {"reward", "zero", "hit", "kl", "entropy", "distinct", "rollouts", "clipped"} <= set(line)
        assert 0 < line["distinct"] <= line["rollouts"] and line["entropy"] > 0
    # The dense term gives groups an advantage, and the first step has the weights of the start.
    assert lines[0]["zero"] < 0.5 and lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert training["judged"]["kept_step"] in (0, 1, 2)
    report = done.report.read_text(encoding="utf-8")
    assert 'id="training-reward"' in report and read_results(done.folder).training is not None
    checks = {each["name"]: each["verdict"] for each in json.loads((done.folder / "audit.json").read_text())["checks"]}
    assert checks["training rows of sequential"] == "clean"
    assert "leak" not in checks.values()


def test_questions_are_training_events(llama_folder: Path, tuned: Path) -> None:
    study = build_study(after(llama_folder, tuned))
    cases = [case for _, case in zip(range(60), study.tasks["sequential"].training_cases(), strict=False)]
    events = {user: [event.item_id for event in study.data.train_events(user)] for user in study.data.users()}
    for case in cases:
        shown = [event.item_id for event in case.request.history]
        assert [*shown, case.truth] == events[case.request.user_id][: len(shown) + 1] and shown
    assert len({case.request.id for case in cases}) == len(cases)
    for check in (audit_training_rows, audit_training_row_independence):
        assert check(study, "sequential", 40).verdict == "clean"


@pytest.mark.parametrize(
    "more",
    [
        ("train.start=null",),
        ("train.judge=null",),
        ("train.method=full",),
        ("train.reward.updates=2", "train.save_every=3"),
        ("train.reward.baseline=null",),
        ("train.packing=tree",),
        ("train.exits=true",),
        ("train.preference={}",),
    ],
)
def test_rejects_invalid_recipe(llama_folder: Path, tmp_path: Path, more: Any) -> None:
    with pytest.raises(RecipeError, match=r"train\.reward") as caught:
        after(llama_folder, tmp_path, *more)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "more",
    [
        ("train.only=[rating]", "tasks.rating={}"),
        ("tasks.rating={}",),
        (
            *("train.reward.kind=prefix", "train.reward.baseline=null", "index=null"),
            "tasks.sequential.templates=[next-title]",
        ),
        ("train.reward.baseline=mf",),
    ],
)
def test_rejects_unsuitable_task_or_baseline(llama_folder: Path, tuned: Path, more: Any) -> None:
    with raises(RecipeError, Facts("contradiction", column="train.reward")):
        reward_family(build_study(after(llama_folder, tuned, *more)), paired=False)


def test_rejects_encoder_decoder(llama_folder: Path, tuned: Path) -> None:
    with raises(RecipeError, Facts("contradiction", column="train.reward")):
        reward_family(build_study(after(llama_folder, tuned)), paired=True)
