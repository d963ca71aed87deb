"""Evaluations and texts in shards: the same figures and the same store as one process; which shards are refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.cache import AnswerStore, Stored
from llmrec.cluster.evaluation import evaluate_shard, merge_run
from llmrec.data.features import FeatureStore
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline import augmenting
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.engines import Engines
from llmrec.pipeline.shards import done_before, finish, gathered, shard_folder
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.records import Shard
from llmrec.types import Cost
from tests import planted
from tests.augment_recipe import augmenting_recipe
from tests.facts import Facts, raises

# --------------------------------------------------------------------------- pieces


@given(rows=st.integers(0, 200), size=st.integers(1, 30), count=st.integers(1, 40))
def test_shards_share_whole_chunks_and_each_row_once(rows: int, size: int, count: int) -> None:
    shards = [Shard(index, count) for index in range(1, count + 1)]
    found = list(range(rows))
    assert list(itertools.chain(*(each.share(found, size) for each in shards))) == found
    assert all(each.share(found, size)[0] % size == 0 for each in shards if each.share(found, size))
    many = [len(each.chunks(rows, size)) for each in shards]
    assert max(many) - min(many) <= 1


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1/99999999999", "१/२"])
def test_what_names_no_piece_is_refused(text: str) -> None:
    with raises(RecipeError, Facts("bad-value", column="--shard", says="1/4")):
        Shard.parse(text)
    assert Shard.parse("2/4") == Shard(2, 4) and str(Shard(2, 4)) == "2/4"


# --------------------------------------------------------------------------- folders


def shard(target: Path, index: int, count: int = 3, key: str = "k", folder: Path | None = None) -> Path:
    """Make a finished shard of one file."""
    piece = Shard(index, count)
    place = folder or shard_folder(target, piece)
    place.mkdir(parents=True)
    (place / "part").write_text(f"what shard {piece} found", encoding="utf-8")
    return finish(place, "rank", piece, key, ["part"], {"form": "records"}).folder


def test_shards_come_in_order_whatever_their_folders_are_called(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    folders = [shard(target, index, folder=tmp_path / str(9 - index)) for index in (2, 3, 1)]
    assert [each.shard for each in gathered(target, folders)] == [Shard(1, 3), Shard(2, 3), Shard(3, 3)]
    assert done_before(folders[0], "k") is not None and done_before(folders[0], "other") is None


def _lost(target: Path) -> None:
    for file in shard_folder(target, Shard(2, 3)).iterdir():
        file.unlink()
    shard_folder(target, Shard(2, 3)).rmdir()


def _changed(target: Path) -> None:
    (shard_folder(target, Shard(2, 3)) / "part").write_text("something else", encoding="utf-8")


def _rewritten(target: Path) -> None:
    path = shard_folder(target, Shard(2, 3)) / "shard.json"
    path.write_text(path.read_text("utf-8").replace('"key": "k"', '"key": "l"'), encoding="utf-8")


def _leading_away(target: Path) -> None:
    path = shard_folder(target, Shard(2, 3)) / "shard.json"
    stored = json.loads(path.read_text("utf-8"))
    del stored["checksum"]
    path.write_text(json.dumps({**stored, "files": {"../../secret": "0"}}), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "facts"),
    [
        (_lost, Facts("missing-file", says=("1 of 3", "2/3"))),
        (lambda t: (shard_folder(t, Shard(2, 3)) / "shard.json").unlink(), Facts("missing-file", "2-of-3")),
        (_changed, Facts("damaged", "part", says="run the command of this shard again")),
        (_rewritten, Facts("damaged", "shard.json")),
        (_leading_away, Facts("damaged", "shard.json")),
        (lambda t: shard(t, 2, folder=t.with_name("out.jsonl.shards") / "twice"), Facts("duplicate", says="2/3")),
        (lambda t: shard(t, 1, 2), Facts("mismatch", says="number of shards")),
        (lambda t: (_lost(t), shard(t, 2, key="l")), Facts("mismatch", "2-of-3", says="inputs or options")),
    ],
    ids=["lost", "unfinished", "changed", "record", "away", "twice", "overlapping", "other"],
)
def test_what_is_not_one_whole_job_is_refused(tmp_path: Path, harm: Callable[[Path], object], facts: Facts) -> None:
    target = tmp_path / "out.jsonl"
    for index in (1, 2, 3):
        shard(target, index)
    assert len(gathered(target)) == 3
    harm(target)
    with raises(LlmrecError, facts):
        gathered(target)


def test_a_job_without_shards_is_refused(tmp_path: Path) -> None:
    with raises(LlmrecError, Facts("missing-file", "out.jsonl.shards", says="--shard")):
        gathered(tmp_path / "out.jsonl")


# --------------------------------------------------------------------------- stores of answers


def test_stores_are_joined_once_and_the_first_answer_stays(tmp_path: Path) -> None:
    def store(name: str, spent: int, **answers: str) -> Path:
        made = AnswerStore(tmp_path / name)
        made.put((key, Stored(seconds=1.0, answer=text)) for key, text in answers.items())
        made.spend("server", Cost(prompt_tokens=spent, completion_tokens=1))
        made.close()
        return tmp_path / name

    first, second = store("1.sqlite", 10, a="one", b="one"), store("2.sqlite", 5, b="two", c="two")
    before = second.read_bytes()
    joined = AnswerStore(tmp_path / "all.sqlite")
    for _ in range(2):
        joined.join(first)
        joined.join(second)
    assert {key: each["answer"] for key, each in joined.get(["a", "b", "c"]).items()} == {
        "a": "one",
        "b": "one",
        "c": "two",
    }
    assert joined.spent("server") == Cost(prompt_tokens=15, completion_tokens=2)
    assert second.read_bytes() == before


def test_answers_of_a_further_store_are_copied_when_they_are_needed(tmp_path: Path) -> None:
    further, place = tmp_path / "run.sqlite", tmp_path / "shard.sqlite"
    store = AnswerStore(further)
    store.put((key, Stored(seconds=1.0, answer=key)) for key in ("a", "b"))
    store.close()
    shard = AnswerStore(place, further)
    shard.put([("b", Stored(seconds=1.0, answer="its own"))])
    assert {key: each["answer"] for key, each in shard.get(["a", "b", "c"]).items()} == {"a": "a", "b": "its own"}
    shard.close()
    alone = AnswerStore(place, tmp_path / "nowhere.sqlite")
    assert sorted(alone.get(["a", "b", "c"])) == ["a", "b"] and not (tmp_path / "nowhere.sqlite").exists()


# --------------------------------------------------------------------------- evaluations

BASE = (
    "data={source: made-reviews, noun: products}",
    "reviews=null",
    "model.dtype=float32",
    "tasks={direct: {templates: [after-history], strategies: [label, list]}}",
    "eval={arms: [zero-shot], users: 7, batch: 2, bootstrap: 20, backend: hf, candidates: {count: 4}, "
    "fusion: {arms: [zero-shot], model_users: 5}}",
)


def recipe(model: Path, *more: str) -> Recipe:
    return load_recipe("recipes/movielens-100k/four-tasks.yaml", [f"model.name={model}", *BASE, *more])


def figures(folder: Path) -> dict[str, Any]:
    """Return all that a run measured: rows, intervals and comparisons, without seconds."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))
    for row in found["rows"]:
        del row["cost"]["seconds"]
    return {name: found[name] for name in ("rows", "comparisons", "headline")}


def _no_engine(*_: object) -> None:
    raise AssertionError("an engine was started")


@pytest.mark.parametrize("form", ["linear", pytest.param("ranker", marks=pytest.mark.slow)])
def test_an_evaluation_in_shards_has_the_figures_of_one_process(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    if form == "ranker":
        pytest.importorskip("lightgbm", reason="the ranker extra is not installed")
    own = planted.changes(tmp_path / "data") if form == "ranker" else ()
    chosen = recipe(llama_folder, *own)
    whole, home = tmp_path / "whole", tmp_path / "run"
    pipeline.run(chosen, whole, quiet=True, may_train=False)
    for index in (2, 1):
        folder = evaluate_shard(chosen, home, Shard(index, 2), quiet=True)
    assert not (folder / "results.json").exists() and not list(folder.glob("rows/*"))
    with monkeypatch.context() as patch:
        patch.setattr(Engines, "_start", _no_engine)
        evaluate_shard(chosen, home, Shard(1, 2), quiet=True)
        assert "already complete" in caplog.text
        merge_run(home, quiet=True)
    assert figures(home) == figures(whole)
    predictions = [(place / "predictions.parquet").read_bytes() for place in (home, whole)]
    assert predictions[0] == predictions[1]
    forms = {row["fusion"]["form"] for row in figures(home)["rows"] if row.get("fusion") and row["arm"] == "baseline"}
    assert ("ranker" in forms) == (form == "ranker")

    # A shard of another recipe does not belong to the others.
    evaluate_shard(recipe(llama_folder, *own, "eval.users=6"), home, Shard(1, 2), quiet=True)
    with raises(LlmrecError, Facts("mismatch", says="inputs or options")):
        merge_run(home, quiet=True)


def test_a_shard_trains_nothing(llama_folder: Path, tmp_path: Path) -> None:
    tuned = recipe(llama_folder, "eval.arms=[tuned]")
    with raises(RecipeError, Facts("missing-file", "run", column="eval.arms", says="llmrec train")):
        evaluate_shard(tuned, tmp_path / "run", Shard(1, 2), quiet=True)
    with raises(RecipeError, Facts("unsupported", column="eval.arms")):
        evaluate_shard(recipe(llama_folder, "eval.arms=[]"), tmp_path / "run", Shard(1, 2), quiet=True)


@pytest.mark.slow
def test_shards_of_a_tuned_model_have_the_figures_of_one_process(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    small = ("train.steps=2", "train.batch_tokens=512", "train.lora.top_layers=1")
    tuned = recipe(llama_folder, "eval.arms=[zero-shot, tuned]", *small)
    whole, home = tmp_path / "whole", tmp_path / "run"
    pipeline.run(tuned, whole, quiet=True)
    pipeline.train(tuned, home, quiet=True)
    for index in (3, 1, 2):
        evaluate_shard(tuned, home, Shard(index, 3), quiet=True)
    merge_run(home, quiet=True)
    assert figures(home) == figures(whole)


# --------------------------------------------------------------------------- texts


def test_texts_in_shards_make_the_store_of_one_process(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    chosen = augmenting_recipe(llama_folder, batch=2, model_dtype="float32", limit=7)
    whole = augmenting.augment(chosen, tmp_path / "whole", quiet=True)
    out = tmp_path / "store"
    for index in (2, 3, 1):
        augmenting.augment_shard(chosen, out, Shard(index, 3), quiet=True)
    monkeypatch.setattr(Engines, "_start", _no_engine)
    augmenting.augment_shard(chosen, out, Shard(1, 3), quiet=True)
    done = augmenting.merge_augment(out, quiet=True)
    stores = [FeatureStore.open(each.folder) for each in (whole, done)]
    assert stores[0].stamp == stores[1].stamp and done.cost == whole.cost
    assert augmenting.merge_augment(out, quiet=True).cost == Cost()
