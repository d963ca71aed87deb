"""Validation NDCG@10 decides which adapter is kept and when training ends."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmrec.backends.hf.backend import HFBackend
from llmrec.errors import RecipeError
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.objectives import Judge
from llmrec.pipeline.runs import open_run
from llmrec.pipeline.study import build_study
from llmrec.pipeline.training import training_key
from llmrec.report import plots
from llmrec.report.results import read
from tests.facts import Facts, raises
from tests.pipeline.test_pipeline import recipe

pytest.importorskip("trl", reason="the train extra is not installed")

MORE = ("train.steps=6", "train.valid_every=1", "train.save_every=2", "train.judge={users: 8, patience: null}")


def _train(model: Path, out: Path, *more: str) -> dict[str, Any]:
    return pipeline.train(recipe(model, *MORE, *more), out, quiet=True)


def _scripted(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    """Have the judge say these values, one a look."""
    left = iter(values)
    monkeypatch.setattr(Judge, "model", lambda self, model: next(left))


def _looks(training: dict[str, Any]) -> list[tuple[int, float]]:
    return [(line["step"], line["valid_ndcg"]) for line in training["log"] if line["valid_ndcg"] is not None]


def test_a_model_in_training_is_measured_beside_classic_recommenders(llama_folder: Path, tmp_path: Path) -> None:
    training = _train(llama_folder, tmp_path / "run", "train.steps=2")
    judged, looks = training["judged"], _looks(training)
    assert [step for step, _ in looks] == [0, 1, 2] and all(0 <= value <= 1 for _, value in looks)
    assert judged["family"] == "sequential" and judged["users"] == 8
    assert judged["value"] == max(value for _, value in looks) == dict(looks)[judged["kept_step"]]
    # Popularity on the same cases, and the exact chance of a random order of five.
    assert {"random", "popularity", "markov-1", "fusion"} <= set(judged["controls"])
    assert judged["controls"]["random"] == pytest.approx(0.5897, abs=1e-3)


@pytest.mark.slow
def test_the_judge_reads_no_more_tokens_at_a_time_than_the_recipe_says(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[HFBackend] = []
    made = HFBackend.__init__

    def noted(self: HFBackend, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        opened.append(self)

    monkeypatch.setattr(HFBackend, "__init__", noted)
    _train(llama_folder, tmp_path / "run", "train.steps=1", "eval.batch_tokens=777")
    assert opened and {backend.batch_tokens for backend in opened} == {777}


def test_a_model_that_ranks_the_catalogue_is_judged_over_the_catalogue(llama_folder: Path, tmp_path: Path) -> None:
    only = ("tasks.rating=null", "tasks.direct=null", "tasks.explanation=null", "tasks.sequential.strategies=[search]")
    catalogue = ("eval.candidates={kind: catalogue}", "index={scheme: title}", "eval.beams=4", "train.steps=1")
    training = _train(llama_folder, tmp_path / "run", *only, *catalogue, "tasks.sequential.templates=[next-title]")
    assert [step for step, _ in _looks(training)] == [0, 1]
    # Every item is asked about, far more than the five candidates of the other recipe.
    assert training["judged"]["controls"]["random"] < 0.5


def test_reports_draw_the_curve_beside_what_classic_recommenders_reach(llama_folder: Path, tmp_path: Path) -> None:
    more = ("train.steps=2", "eval.arms=[tuned]", "tasks.rating=null", "tasks.direct=null", "tasks.explanation=null")
    made = pipeline.run(recipe(llama_folder, *MORE, *more), tmp_path / "run", quiet=True)
    judged = made.results["training"]["judged"]
    page, text = made.report.read_text(encoding="utf-8"), (made.report.parent / "report.md").read_text(encoding="utf-8")
    assert 'id="training-ndcg"' in page and f"The adapter of step {judged['kept_step']} is used" in page
    found = read(made.folder).training
    assert found is not None and found.judged is not None
    drawn = {each["name"]: each["y"] for each in plots.judged(found, found.judged)["series"]}
    assert drawn["this model"] == [value for _, value in _looks(made.results["training"])]
    assert drawn["popularity"] == [judged["controls"]["popularity"]] * 2 and "fusion" in drawn
    assert "| Step | This model |" in text and "| markov-1 |" in text


@pytest.mark.slow
def test_looking_changes_nothing_of_what_is_learned(llama_folder: Path, tmp_path: Path) -> None:
    looked = _train(llama_folder, tmp_path / "looked", "train.steps=3")
    plain = pipeline.train(recipe(llama_folder, "train.steps=3", "train.valid_every=1"), tmp_path / "plain", quiet=True)
    assert [line["loss"] for line in looked["log"]] == [line["loss"] for line in plain["log"]]
    assert "judged" not in plain and all("valid_ndcg" not in line for line in plain["log"])


def test_the_adapter_of_the_best_look_is_kept(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _scripted(monkeypatch, [0.1, 0.2, 0.5, 0.3, 0.4, 0.2, 0.1])
    best = _train(llama_folder, tmp_path / "best")
    assert best["judged"]["kept_step"] == 2 and best["judged"]["value"] == 0.5 and best["steps"] == 6
    # The same steps of the same plan, ended by patience: what was kept does not depend on what came later.
    _scripted(monkeypatch, [0.1, 0.2, 0.5, 0.3, 0.4, 0.2, 0.1])
    ended = _train(llama_folder, tmp_path / "ended", "train.judge.patience=2")
    assert ended["steps"] == 4 and ended["tokens"] < best["tokens"]
    assert ended["adapter_sha256"] == best["adapter_sha256"]
    # Which is no sign of another recipe: it can be exported and gone on from.
    assert open_run(tmp_path / "ended").record["steps"] == 4
    _scripted(monkeypatch, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert _train(llama_folder, tmp_path / "last")["adapter_sha256"] != best["adapter_sha256"]


@pytest.mark.slow
def test_a_killed_run_keeps_what_an_uninterrupted_one_keeps(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [0.1, 0.2, 0.5, 0.3, 0.4, 0.2, 0.1]
    _scripted(monkeypatch, values)
    whole = _train(llama_folder, tmp_path / "whole")
    # It dies at the look of step 5, with a checkpoint of step 4 behind it.
    _scripted(monkeypatch, values[:5])
    with pytest.raises((StopIteration, RuntimeError)):
        _train(llama_folder, tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut" / "best").iterdir()] == ["2"]
    _scripted(monkeypatch, values[5:])
    resumed = _train(llama_folder, tmp_path / "cut")
    assert resumed["adapter_sha256"] == whole["adapter_sha256"] and _looks(resumed) == _looks(whole)
    shutil.rmtree(tmp_path / "cut")


@pytest.mark.slow
def test_the_best_adapter_outlives_a_better_one_that_no_checkpoint_has(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It dies at the look of step 6: those of 3 and 5 were better than that of step 1, and the checkpoint is of step 4.
    _scripted(monkeypatch, [0.1, 0.3, 0.2, 0.4, 0.1, 0.5])
    with pytest.raises((StopIteration, RuntimeError)):
        _train(llama_folder, tmp_path / "cut")
    kept = {path.name for path in (tmp_path / "cut" / "best").iterdir()}
    # The best at each checkpoint, of steps 2 and 4, and the best of all.
    assert kept == {"1", "3", "5"}
    # On a GPU the same look may find less the second time.
    _scripted(monkeypatch, [0.35, 0.2])
    resumed = _train(llama_folder, tmp_path / "cut")
    assert resumed["judged"]["kept_step"] == 3 and resumed["judged"]["value"] == 0.4
    _scripted(monkeypatch, [0.1, 0.3, 0.2, 0.4, 0.1, 0.35, 0.2])
    assert _train(llama_folder, tmp_path / "whole")["adapter_sha256"] == resumed["adapter_sha256"]


def test_what_the_judge_asks_with_is_part_of_what_was_trained(llama_folder: Path) -> None:
    def key(*more: str) -> str:
        only = ("tasks.rating=null", "tasks.sequential=null", "tasks.explanation=null")
        only = (*only, "tasks.direct.strategies=[setwise]")
        return training_key(build_study(recipe(llama_folder, *MORE, *only, *more)), str(llama_folder))

    plain = key()
    assert len({plain, key("eval.permutations=4"), key("eval.set_size=5"), key("eval.depth=3")}) == 4
    assert key("eval.beams=3") == plain


def test_without_a_ranking_there_is_nothing_to_judge_by(llama_folder: Path, tmp_path: Path) -> None:
    with raises(RecipeError, Facts("contradiction", column="train.judge")):
        _train(llama_folder, tmp_path / "run", "train.only=[rating]")
