"""What a tuned folder says about itself: written by training, read without the run's data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmrec.errors import ModelError
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
    """A model folder with its bundle file."""
    shutil.copytree(llama_folder, tmp_path, dirs_exist_ok=True)
    bundle.write(study, tmp_path)
    return tmp_path


def test_a_folder_is_read_back_as_it_was_tuned(folder: Path, study: Study) -> None:
    found = bundle.read(str(folder))
    assert found.tuned and found.run is None and found.folder == str(folder)
    assert found.noun == "products" and found.rating_scale == study.data.dataset.rating_scale
    assert found.tasks == study.recipe.tasks and found.model.max_length == study.recipe.model.max_length
    shas = {f: {n: t.sha for n, t in known.items()} for f, known in study.templates.items()}
    assert {f: {n: t.sha for n, t in known.items()} for f, known in found.templates.items()} == shas
    # What is said of a template too: a recipe may have named the set that it belongs to.
    assert {f: dict(known) for f, known in found.templates.items()} == study.templates
    assert found.templates["direct"]["user-choose"].sets == {"p5": "5-8", "p5-yelp": "5-8"}


def test_it_holds_no_data(folder: Path, study: Study) -> None:
    text = (folder / bundle.FILE).read_text(encoding="utf-8")
    assert not any(item.title in text for item in study.data.dataset.items.values())
    assert "path" not in json.loads(text)


def test_a_plain_model_gets_the_ranking_families(llama_folder: Path) -> None:
    found = bundle.read(str(llama_folder))
    assert not found.tuned and set(found.tasks.present()) == {"sequential", "direct"}
    assert set(found.templates) == {"sequential", "direct"}


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        ("{", Facts("damaged", bundle.FILE)),
        ("[]", Facts("damaged", bundle.FILE)),
        ('{"format": 1}', Facts("damaged", bundle.FILE, says="'templates'")),
        ('{"format": 9, "llmrec": "2.0"}', Facts("wrong-format", bundle.FILE, says="use llmrec 2.0")),
    ],
)
def test_a_damaged_file_is_named(folder: Path, damage: str, facts: Facts) -> None:
    (folder / bundle.FILE).write_text(damage, encoding="utf-8")
    with raises(ModelError, facts):
        bundle.read(str(folder))


def test_a_template_that_breaks_the_grammar_is_refused(folder: Path) -> None:
    stored = json.loads((folder / bundle.FILE).read_text(encoding="utf-8"))
    stored["templates"]["sequential"][0]["user"] = "{{ ().__class__ }}"
    (folder / bundle.FILE).write_text(json.dumps(stored), encoding="utf-8")
    with raises(ModelError, Facts("syntax", "llmrec.json", column="user", says="export the run again")):
        bundle.read(str(folder))


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\n", encoding="utf-8")
    with raises(ModelError, Facts("missing-file", "test_an_unfinished_run_is_refu0", says="`llmrec train`")):
        bundle.read(str(tmp_path))
