"""The bundle file of a tuned folder: written by training, read without the data of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmrec.errors import ModelError
from llmrec.models.load import BUNDLE_FILE
from llmrec.pipeline import bundle
from llmrec.pipeline.study import Study, build_study
from llmrec.recipe.load import load_recipe
from tests.facts import Facts, raises

STUDY = ("data={source: made-reviews, noun: products}", "reviews=null", "eval.candidates.count=5")


@pytest.fixture(scope="module")
def study() -> Study:
    return build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", STUDY))


@pytest.fixture
def folder(llama_folder: Path, study: Study, tmp_path: Path) -> Path:
    """Return a model folder with its bundle file."""
    shutil.copytree(llama_folder, tmp_path, dirs_exist_ok=True)
    bundle.write(study, tmp_path)
    return tmp_path


def test_folder_is_read_back_as_tuned(folder: Path, study: Study) -> None:
    stored = bundle.read(str(folder))
    assert stored.tuned and stored.run is None and stored.folder == str(folder)
    assert stored.noun == "products" and stored.rating_scale == study.data.dataset.rating_scale
    assert stored.tasks == study.recipe.tasks and stored.model.max_length == study.recipe.model.max_length
    shas = {f: {n: t.sha for n, t in known.items()} for f, known in study.templates.items()}
    assert {f: {n: t.sha for n, t in known.items()} for f, known in stored.templates.items()} == shas
    assert {f: dict(known) for f, known in stored.templates.items()} == study.templates
    assert stored.templates["direct"]["user-choose"].sets == {"p5": "5-8", "p5-yelp": "5-8"}


def test_bundle_contains_no_data(folder: Path, study: Study) -> None:
    text = (folder / BUNDLE_FILE).read_text(encoding="utf-8")
    assert not any(item.title in text for item in study.data.dataset.items.values())
    assert "path" not in json.loads(text)


def test_plain_model_gets_ranking_tasks(llama_folder: Path) -> None:
    stored = bundle.read(str(llama_folder))
    assert not stored.tuned and set(stored.tasks.present()) == {"sequential", "direct"}
    assert set(stored.templates) == {"sequential", "direct"}


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        ("[]", Facts("damaged", BUNDLE_FILE)),
        ('{"format": 1}', Facts("damaged", BUNDLE_FILE, says="'templates'")),
        ('{"format": 9, "llmrec": "2.0"}', Facts("wrong-format", BUNDLE_FILE, says="use llmrec 2.0")),
    ],
)
def test_rejects_damaged_file(folder: Path, damage: str, facts: Facts) -> None:
    (folder / BUNDLE_FILE).write_text(damage, encoding="utf-8")
    with raises(ModelError, facts):
        bundle.read(str(folder))


def test_rejects_template_with_forbidden_code(folder: Path) -> None:
    content = json.loads((folder / BUNDLE_FILE).read_text(encoding="utf-8"))
    content["templates"]["sequential"][0]["user"] = "{{ ().__class__ }}"
    (folder / BUNDLE_FILE).write_text(json.dumps(content), encoding="utf-8")
    with raises(ModelError, Facts("syntax", "llmrec.json", column="user", says="export the run again")):
        bundle.read(str(folder))


def test_rejects_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\n", encoding="utf-8")
    with raises(ModelError, Facts("missing-file", tmp_path, says="`llmrec train`")):
        bundle.read(str(tmp_path))
