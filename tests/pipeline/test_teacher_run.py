"""A run that learns from a finished one of another shape: what it takes, what it refuses, and when it is made again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from llmrec.durable import write_text
from llmrec.errors import RecipeError
from llmrec.models.load import load_config
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.preflight import checked_study
from llmrec.pipeline.study import build_study
from llmrec.pipeline.training import training_key
from llmrec.recipe.load import as_recipe, dump, load_recipe
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
            "sequential": {
                "templates": ["bare-codes"],
                "strategies": ["search"],
                "baselines": ["random", "popularity", "item-knn", "markov-1"],
            }
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


def test_a_narrower_model_learns_from_a_finished_run(teacher: Path, tmp_path: Path) -> None:
    taught = {"train.teacher": {"run": str(teacher), "share": 0.5, "relations": 1.0}}
    done = pipeline.run(recipe(8, **taught), tmp_path / "pupil", quiet=True)
    alone = pipeline.run(recipe(8), tmp_path / "alone", quiet=True)
    made = recipe(8).model
    widths = [load_config(str(folder / "merged"), made).hidden_size for folder in (done.folder, teacher)]
    assert widths == [8, 32]
    one, other = (each.results["training"]["log"] for each in (done, alone))
    # The teacher is part of what is learned, and none of what is followed.
    assert one[-1]["loss"] != other[-1]["loss"]
    assert one[0]["valid_loss"] == other[0]["valid_loss"] and one[0]["valid_loss"]
    assert any("was distilled from the run" in note for note in done.results["notes"])


@pytest.mark.slow
def test_another_teacher_is_another_training(teacher: Path, tmp_path: Path) -> None:
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
        ({"seed": 3}, "held out here"),
        ({"data.split.kind": "global_time"}, "held out here"),
        ({"index": {"scheme": "random"}}, "token"),
        ({"train.exits": True}, "train.exits"),
        ({"train.teacher.share": 0.0}, "has no effect"),
    ],
)
def test_what_does_not_go_with_a_teacher_is_refused(
    changes: dict[str, Any], says: str, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        pipeline.run(recipe(8, **{"train.teacher.run": str(teacher), **changes}), tmp_path / "run", quiet=True)
    assert says in str(caught.value)


def test_no_run_teaches_itself(teacher: Path) -> None:
    with raises(RecipeError, Facts("contradiction", column="train.teacher", says="the folder of this run itself")):
        pipeline.run(recipe(32, **{"train.teacher.run": str(teacher)}), teacher, quiet=True)


@pytest.mark.slow
def test_a_teacher_that_is_gone_takes_no_finished_training_with_it(teacher: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(teacher, tmp_path / "moved")
    taught = {"train.teacher.run": str(moved), "train.steps": 1}
    done = pipeline.run(recipe(8, **taught), tmp_path / "pupil", quiet=True).folder
    before = (done / "train.json").read_bytes()
    again = shutil.move(moved, tmp_path / "again")
    with raises(RecipeError, Facts("missing-file", column="train.teacher")):
        pipeline.run(recipe(8, **taught), done, quiet=True)
    assert (done / "train.json").read_bytes() == before
    # Where it lies changes nothing.
    pipeline.run(recipe(8, **{**taught, "train.teacher.run": str(again)}), done, quiet=True)
    assert (done / "train.json").read_bytes() == before
    with raises(RecipeError, Facts("missing-file", column="train.teacher")):
        checked_study(recipe(8, **taught))


def test_a_teacher_is_looked_for_beside_the_page_too(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "runs" / "wide")
    page = tmp_path / "page.yaml"
    write_text(page, dump(recipe(8, **{"train.teacher.run": "runs/wide"})))
    found = load_recipe(page).train.teacher
    assert found is not None and Path(found.run) == tmp_path / "runs" / "wide"


@pytest.mark.slow
def test_tokens_of_items_are_taught_through_an_adapter(teacher: Path, tmp_path: Path) -> None:
    changes = {"train.start": str(teacher), "train.method": "lora", "train.packing": "tree"}
    more = {"train.teacher.run": str(teacher), "train.teacher.relations": 1.0}
    done = pipeline.run(recipe(32, **changes, **more), tmp_path / "run", quiet=True)
    alone = pipeline.run(recipe(32, **changes), tmp_path / "alone", quiet=True)
    losses = [each.results["training"]["log"][-1]["loss"] for each in (done, alone)]
    assert losses[0] != losses[1]
