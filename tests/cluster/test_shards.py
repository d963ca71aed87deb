"""Evaluations and texts in shards: the same results as one process, and invalid shards."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.cache import AnswerStore, StoredAnswer
from llmrec.cluster.evaluation import evaluate_shard, merge_run
from llmrec.data.features import FeatureStore
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline import augmenting
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.engines import Engines
from llmrec.pipeline.shards import finish_shard, reusable_shard, shard_folder, verify_shards
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.records import Shard
from llmrec.types import Cost
from tests.augment_recipe import augmenting_recipe
from tests.facts import Facts, raises


@given(rows=st.integers(0, 200), size=st.integers(1, 30), count=st.integers(1, 40))
def test_shards_partition_rows_by_chunks(rows: int, size: int, count: int) -> None:
    shards = [Shard(index, count) for index in range(1, count + 1)]
    numbers = list(range(rows))
    assert list(itertools.chain(*(each.share(numbers, size) for each in shards))) == numbers
    assert all(each.share(numbers, size)[0] % size == 0 for each in shards if each.share(numbers, size))
    many = [len(each.chunks(rows, size)) for each in shards]
    assert max(many) - min(many) <= 1


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/2/3", "1/99999999999", "१/२"])
def test_rejects_invalid_shard_names(text: str) -> None:
    with raises(RecipeError, Facts("bad-value", column="--shard", says="1/4")):
        Shard.parse(text)
    assert Shard.parse("2/4") == Shard(2, 4) and str(Shard(2, 4)) == "2/4"


def shard(target: Path, index: int, count: int = 3, key: str = "k", folder: Path | None = None) -> Path:
    """Write a finished shard of one file."""
    part = Shard(index, count)
    folder = folder or shard_folder(target, part)
    folder.mkdir(parents=True)
    (folder / "part").write_text(f"results of shard {part}", encoding="utf-8")
    return finish_shard(folder, "rank", part, key, ["part"], {"form": "records"}).folder


def test_shards_are_sorted_by_number(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    folders = [shard(target, index, folder=tmp_path / str(9 - index)) for index in (2, 3, 1)]
    assert [each.shard for each in verify_shards(target, folders)] == [Shard(1, 3), Shard(2, 3), Shard(3, 3)]
    assert reusable_shard(folders[0], "k") is not None and reusable_shard(folders[0], "other") is None


def _lost(target: Path) -> None:
    shutil.rmtree(shard_folder(target, Shard(2, 3)))


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
def test_rejects_incomplete_or_changed_jobs(tmp_path: Path, harm: Callable[[Path], object], facts: Facts) -> None:
    target = tmp_path / "out.jsonl"
    for index in (1, 2, 3):
        shard(target, index)
    assert len(verify_shards(target)) == 3
    harm(target)
    with raises(LlmrecError, facts):
        verify_shards(target)
    with raises(LlmrecError, Facts("missing-file", "other.jsonl.shards", says="--shard")):
        verify_shards(tmp_path / "other.jsonl")


def test_joined_stores_keep_the_first_answer(tmp_path: Path) -> None:
    def store(name: str, usage: int, **answers: str) -> Path:
        opened = AnswerStore(tmp_path / name)
        opened.put((key, StoredAnswer(seconds=1.0, answer=text)) for key, text in answers.items())
        opened.spend("server", Cost(prompt_tokens=usage, completion_tokens=1))
        opened.close()
        return tmp_path / name

    first, second = store("1.sqlite", 10, a="one", b="one"), store("2.sqlite", 5, b="two", c="two")
    before = second.read_bytes()
    joined = AnswerStore(tmp_path / "all.sqlite")
    for _ in range(2):
        joined.join(first)
        joined.join(second)
    answers = {key: each["answer"] for key, each in joined.get(["a", "b", "c"]).items()}
    assert answers == {"a": "one", "b": "one", "c": "two"}
    assert joined.spent("server") == Cost(prompt_tokens=15, completion_tokens=2)
    assert second.read_bytes() == before


def test_answers_of_another_store_are_copied_on_demand(tmp_path: Path) -> None:
    further, path = tmp_path / "run.sqlite", tmp_path / "shard.sqlite"
    store = AnswerStore(further)
    store.put((key, StoredAnswer(seconds=1.0, answer=key)) for key in ("a", "b"))
    store.close()
    shard = AnswerStore(path, further)
    shard.put([("b", StoredAnswer(seconds=1.0, answer="new"))])
    assert {key: each["answer"] for key, each in shard.get(["a", "b", "c"]).items()} == {"a": "a", "b": "new"}
    shard.close()
    alone = AnswerStore(path, tmp_path / "nowhere.sqlite")
    assert sorted(alone.get(["a", "b", "c"])) == ["a", "b"] and not (tmp_path / "nowhere.sqlite").exists()


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
    """Return the results of a run: rows, intervals and comparisons, without timings."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))
    for row in results["rows"]:
        del row["cost"]["seconds"]
    return {name: results[name] for name in ("rows", "comparisons", "headline")}


def _no_engine(*_: object) -> None:
    raise AssertionError("an engine was started")


def test_evaluation_in_shards_equals_one_process(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    recipe_ = recipe(llama_folder)
    single, sharded = tmp_path / "whole", tmp_path / "run"
    pipeline.run(recipe_, single, quiet=True, may_train=False)
    for index in (2, 1):
        folder = evaluate_shard(recipe_, sharded, Shard(index, 2), quiet=True)
    assert not (folder / "results.json").exists() and not list(folder.glob("rows/*"))
    with monkeypatch.context() as patch:
        patch.setattr(Engines, "_start", _no_engine)
        evaluate_shard(recipe_, sharded, Shard(1, 2), quiet=True)
        assert "already complete" in caplog.text
        merge_run(sharded, quiet=True)
    assert figures(sharded) == figures(single)
    predictions = [(folder_ / "predictions.parquet").read_bytes() for folder_ in (sharded, single)]
    assert predictions[0] == predictions[1]

    # A shard of another recipe is rejected.
    evaluate_shard(recipe(llama_folder, "eval.users=6"), sharded, Shard(1, 2), quiet=True)
    with raises(LlmrecError, Facts("mismatch", says="inputs or options")):
        merge_run(sharded, quiet=True)


def test_shards_do_not_train(llama_folder: Path, tmp_path: Path) -> None:
    tuned = recipe(llama_folder, "eval.arms=[tuned]")
    with raises(RecipeError, Facts("missing-file", "run", column="eval.arms", says="llmrec train")):
        evaluate_shard(tuned, tmp_path / "run", Shard(1, 2), quiet=True)
    with raises(RecipeError, Facts("unsupported", column="eval.arms")):
        evaluate_shard(recipe(llama_folder, "eval.arms=[]"), tmp_path / "run", Shard(1, 2), quiet=True)


def test_texts_in_shards_equal_one_process(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    recipe_ = augmenting_recipe(llama_folder, batch=2, model_dtype="float32", limit=7)
    single = augmenting.augment(recipe_, tmp_path / "whole", quiet=True)
    out = tmp_path / "store"
    for index in (2, 3, 1):
        augmenting.augment_shard(recipe_, out, Shard(index, 3), quiet=True)
    monkeypatch.setattr(Engines, "_start", _no_engine)
    augmenting.augment_shard(recipe_, out, Shard(1, 3), quiet=True)
    done = augmenting.merge_augment(out, quiet=True)
    stores = [FeatureStore.open(each.folder) for each in (single, done)]
    assert stores[0].stamp == stores[1].stamp and done.cost == single.cost
    assert augmenting.merge_augment(out, quiet=True).cost == Cost()
