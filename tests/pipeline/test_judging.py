"""Validation NDCG@10 selects the adapter and ends the training."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmrec.errors import RecipeError
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.objectives import CheckpointEvaluator
from llmrec.pipeline.runs import open_run
from llmrec.pipeline.study import build_study
from llmrec.pipeline.training import training_key
from llmrec.report import plots
from llmrec.report.results import read_results
from tests.facts import Facts, raises
from tests.pipeline.test_pipeline import recipe

pytest.importorskip("trl", reason="the train extra is not installed")

MORE = ("train.steps=6", "train.valid_every=1", "train.save_every=2", "train.judge={users: 8, patience: null}")


def _train(model: Path, out: Path, *more: str) -> dict[str, Any]:
    return pipeline.train(recipe(model, *MORE, *more), out, quiet=True)


def _scripted(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    """Make the judge return these values in order."""
    left = iter(values)
    monkeypatch.setattr(CheckpointEvaluator, "model", lambda self, model: next(left))


def _judged(training: dict[str, Any]) -> list[tuple[int, float]]:
    return [(line["step"], line["valid_ndcg"]) for line in training["log"] if line["valid_ndcg"] is not None]


def test_judge_ranks_the_catalogue(llama_folder: Path, tmp_path: Path) -> None:
    only = ("tasks.rating=null", "tasks.direct=null", "tasks.explanation=null", "tasks.sequential.strategies=[search]")
    catalogue = ("eval.candidates={kind: catalogue}", "index={scheme: title}", "eval.beams=4", "train.steps=1")
    training = _train(llama_folder, tmp_path / "run", *only, *catalogue, "tasks.sequential.templates=[next-title]")
    assert [step for step, _ in _judged(training)] == [0, 1]
    # The catalogue has far more items than the five candidates of other recipes.
    assert training["judged"]["controls"]["random"] < 0.5


def test_training_is_judged_and_reported_with_baselines(llama_folder: Path, tmp_path: Path) -> None:
    more = ("train.steps=2", "eval.arms=[tuned]", "tasks.rating=null", "tasks.direct=null", "tasks.explanation=null")
    done = pipeline.run(recipe(llama_folder, *MORE, *more), tmp_path / "run", quiet=True)
    training = done.results["training"]
    judged, looks = training["judged"], _judged(training)
    assert [step for step, _ in looks] == [0, 1, 2] and all(0 <= value <= 1 for _, value in looks)
    assert judged["family"] == "sequential" and judged["users"] == 8
    assert judged["value"] == max(value for _, value in looks) == dict(looks)[judged["kept_step"]]
    # The expected NDCG of a random order of five candidates.
    assert judged["controls"]["random"] == pytest.approx(0.5897, abs=1e-3)
    assert {"random", "popularity", "markov-1", "fusion"} <= set(judged["controls"])
    page, text = done.report.read_text(encoding="utf-8"), (done.report.parent / "report.md").read_text(encoding="utf-8")
    assert 'id="training-ndcg"' in page and f"The adapter of step {judged['kept_step']} is used" in page
    stored = read_results(done.folder).training
    assert stored is not None and stored.judged is not None
    drawn = {each["name"]: each["y"] for each in plots.validation_ndcg_plot(stored, stored.judged)["series"]}
    assert drawn["this model"] == [value for _, value in looks]
    assert drawn["popularity"] == [judged["controls"]["popularity"]] * 2 and "fusion" in drawn
    assert "| Step | This model |" in text and "| markov-1 |" in text


@pytest.mark.slow
def test_judging_does_not_change_training(llama_folder: Path, tmp_path: Path) -> None:
    looked = _train(llama_folder, tmp_path / "looked", "train.steps=3")
    plain = pipeline.train(recipe(llama_folder, "train.steps=3", "train.valid_every=1"), tmp_path / "plain", quiet=True)
    assert [line["loss"] for line in looked["log"]] == [line["loss"] for line in plain["log"]]
    assert "judged" not in plain and all("valid_ndcg" not in line for line in plain["log"])


def test_best_adapter_is_kept(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scripted(monkeypatch, [0.1, 0.2, 0.5, 0.3, 0.4, 0.2, 0.1])
    best = _train(llama_folder, tmp_path / "best")
    assert best["judged"]["kept_step"] == 2 and best["judged"]["value"] == 0.5 and best["steps"] == 6
    # The same plan, ended by patience: later steps do not change the selected adapter.
    _scripted(monkeypatch, [0.1, 0.2, 0.5, 0.3, 0.4, 0.2, 0.1])
    ended = _train(llama_folder, tmp_path / "ended", "train.judge.patience=2")
    assert ended["steps"] == 4 and ended["tokens"] < best["tokens"]
    assert ended["adapter_sha256"] == best["adapter_sha256"]
    assert open_run(tmp_path / "ended").record["steps"] == 4


@pytest.mark.slow
def test_resumed_run_keeps_the_same_adapter(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [0.1, 0.2, 0.5, 0.3, 0.4, 0.2, 0.1]
    _scripted(monkeypatch, values)
    complete = _train(llama_folder, tmp_path / "complete")
    # The run fails at the judgement of step 5, after a checkpoint of step 4.
    _scripted(monkeypatch, values[:5])
    with pytest.raises((StopIteration, RuntimeError)):
        _train(llama_folder, tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut" / "best").iterdir()] == ["2"]
    _scripted(monkeypatch, values[5:])
    resumed = _train(llama_folder, tmp_path / "cut")
    assert resumed["adapter_sha256"] == complete["adapter_sha256"] and _judged(resumed) == _judged(complete)
    shutil.rmtree(tmp_path / "cut")


@pytest.mark.slow
def test_best_adapter_of_checkpoints_survives(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The run fails at the judgement of step 6; steps 3 and 5 were better than step 1, and the checkpoint is of step 4.
    _scripted(monkeypatch, [0.1, 0.3, 0.2, 0.4, 0.1, 0.5])
    with pytest.raises((StopIteration, RuntimeError)):
        _train(llama_folder, tmp_path / "cut")
    kept = {path.name for path in (tmp_path / "cut" / "best").iterdir()}
    # The best at each checkpoint, of steps 2 and 4, and the best of all.
    assert kept == {"1", "3", "5"}
    # On a GPU, the second judgement of a step may differ.
    _scripted(monkeypatch, [0.35, 0.2])
    resumed = _train(llama_folder, tmp_path / "cut")
    assert resumed["judged"]["kept_step"] == 3 and resumed["judged"]["value"] == 0.4
    _scripted(monkeypatch, [0.1, 0.3, 0.2, 0.4, 0.1, 0.35, 0.2])
    assert _train(llama_folder, tmp_path / "complete")["adapter_sha256"] == resumed["adapter_sha256"]


def test_training_key_depends_on_settings_of_judge(llama_folder: Path) -> None:
    def key(*more: str) -> str:
        only = ("tasks.rating=null", "tasks.sequential=null", "tasks.explanation=null")
        only = (*only, "tasks.direct.strategies=[setwise]")
        return training_key(build_study(recipe(llama_folder, *MORE, *only, *more)), str(llama_folder))

    plain = key()
    assert len({plain, key("eval.permutations=4"), key("eval.set_size=5"), key("eval.depth=3")}) == 4
    assert key("eval.beams=3") == plain


def test_rejects_judge_without_ranking_task(llama_folder: Path, tmp_path: Path) -> None:
    with raises(RecipeError, Facts("contradiction", column="train.judge")):
        _train(llama_folder, tmp_path / "run", "train.only=[rating]")
