"""A run that learns from a finished run of another shape: distillation, refusals and training keys."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from llmrec.durable import write_text
from llmrec.errors import RecipeError
from llmrec.models.load import load_config
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.preflight import build_checked_study
from llmrec.pipeline.study import build_study
from llmrec.pipeline.training import training_key
from llmrec.recipe.load import as_recipe, dump_recipe, load_recipe
from llmrec.recipe.schema import Recipe
from tests.facts import Facts, raises

pytest.importorskip("trl", reason="the train extra is not installed")


def recipe(width: int, **changes: Any) -> Recipe:
    page = {
        "name": f"width-{width}",
        "model": {
            "name": "new",
            "dtype": "float32",
            "shape": {"layers": 1, "width": width, "heads": 2, "feedforward": 2 * width, "dropout": 0.0},
        },
        "data": {"source": "made-reviews", "noun": "products"},
        "index": {"scheme": "token", "tokens": "random"},
        "tasks": {
            "sequential": {"templates": ["bare-codes"], "strategies": ["search"]}
            | {"baselines": ["random", "popularity", "item-knn", "markov-1"]}
        },
        "train": {"method": "full", "steps": 2, "batch_tokens": 256, "valid_rows": 4, "learning_rate": 1e-3},
        "eval": {"arms": ["tuned"], "backend": "hf", "users": 4, "candidates": {"kind": "catalogue"}},
    }
    return as_recipe(page, changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    pipeline.train(recipe(32), folder, quiet=True)
    return folder


def test_smaller_model_learns_from_finished_run(teacher: Path, tmp_path: Path) -> None:
    taught = {"train.teacher": {"run": str(teacher), "share": 0.5, "relations": 1.0}}
    done = pipeline.run(recipe(8, **taught), tmp_path / "pupil", quiet=True)
    alone = pipeline.train(recipe(8), tmp_path / "alone", quiet=True)
    section = recipe(8).model
    widths = [load_config(str(folder / "merged"), section).hidden_size for folder in (done.folder, teacher)]
    assert widths == [8, 32]
    one, other = done.results["training"]["log"], alone["log"]
    # The teacher changes the training loss but not the validation loss.
    assert one[-1]["loss"] != other[-1]["loss"]
    assert one[0]["valid_loss"] == other[0]["valid_loss"] and one[0]["valid_loss"]
    assert any("was distilled from the run" in note for note in done.results["notes"])


@pytest.mark.slow
def test_training_key_depends_on_teacher(teacher: Path, tmp_path: Path) -> None:
    other = pipeline.run(recipe(32, **{"train.steps": 3}), tmp_path / "other", quiet=True).folder
    keys = []
    for folder in (None, teacher, other):
        changes = {"train.teacher": {"run": str(folder)}} if folder else {}
        keys.append(training_key(build_study(recipe(8, **changes)), str(teacher / "merged")))
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train.teacher.run": "nowhere"}, "is not a run folder"),
        ({"data.split.kind": "global_time"}, "held out here"),
        ({"index": {"scheme": "random"}}, "token"),
        ({"train.exits": True}, "train.exits"),
        ({"train.teacher.share": 0.0}, "has no effect"),
    ],
)
def test_rejects_unsuitable_teacher(changes: dict[str, Any], says: str, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        pipeline.run(recipe(8, **{"train.teacher.run": str(teacher), **changes}), tmp_path / "run", quiet=True)
    assert says in str(caught.value)


def test_rejects_run_as_its_teacher(teacher: Path) -> None:
    with raises(RecipeError, Facts("contradiction", column="train.teacher", says="the folder of this run itself")):
        pipeline.run(recipe(32, **{"train.teacher.run": str(teacher)}), teacher, quiet=True)


@pytest.mark.slow
def test_missing_teacher_keeps_finished_training(teacher: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(teacher, tmp_path / "moved")
    taught = {"train.teacher.run": str(moved), "train.steps": 1}
    done = pipeline.run(recipe(8, **taught), tmp_path / "pupil", quiet=True).folder
    before = (done / "train.json").read_bytes()
    again = shutil.move(moved, tmp_path / "again")
    with raises(RecipeError, Facts("missing-file", column="train.teacher")):
        pipeline.run(recipe(8, **taught), done, quiet=True)
    assert (done / "train.json").read_bytes() == before
    # The path of the teacher does not matter.
    pipeline.run(recipe(8, **{**taught, "train.teacher.run": str(again)}), done, quiet=True)
    assert (done / "train.json").read_bytes() == before
    with raises(RecipeError, Facts("missing-file", column="train.teacher")):
        build_checked_study(recipe(8, **taught))


def test_path_of_teacher_is_relative_to_recipe(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "runs" / "wide")
    page = tmp_path / "page.yaml"
    write_text(page, dump_recipe(recipe(8, **{"train.teacher.run": "runs/wide"})))
    section = load_recipe(page).train.teacher
    assert section is not None and Path(section.run) == tmp_path / "runs" / "wide"
