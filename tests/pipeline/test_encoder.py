"""Tuned encoders: their folder, and their rejection if they could know held-out interactions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmrec.baselines.content import Content
from llmrec.baselines.pairs import TransitionsTuned, TransitionsTunedConfig
from llmrec.baselines.parameters import input_hashes
from llmrec.data.split import SplitDataset
from llmrec.ensembles.members import baseline_reads
from llmrec.errors import DataError, ErrorKind, LlmrecError
from llmrec.models.text_encoder import TUNING_RECORD_FILE, encode_texts, encoder_training_hash, text_embedder
from llmrec.pipeline.encoder_tuning import tune_encoder
from llmrec.pipeline.evaluation import Evaluation
from llmrec.pipeline.resume import StageTimer
from llmrec.pipeline.row_specs import RowSpec
from llmrec.pipeline.study import build_study, lazy_item_vectors, load_split
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import DataSection
from tests.encoders import tiny_encoder
from tests.facts import Facts, raises

pytest.importorskip("torch")

WORDS = ("anvil", "banjo", "candle", "drum", "engine", "feather")


def _table(folder: Path) -> Path:
    """Write interactions of 60 users who alternate between two of six topics with four items each."""
    rng, path = np.random.default_rng(0), folder / "ring.csv"
    lines = ["user_id,item_id,timestamp,title"]
    for user in range(60):
        numbers = rng.permutation(4)
        for step in range(6):
            topic, number = 2 * (user % 3) + step % 2, numbers[step // 2]
            lines.append(f"u{user},{topic}{number},{step},{WORDS[topic]} {'abcd'[number]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _table(tmp_path_factory.mktemp("ring"))


@pytest.fixture(scope="module")
def tuned(table: Path) -> Path:
    assert _tune(table, table.parent / "encoder")["interactions"] == 240
    return table.parent / "encoder"


def _tune(table: Path, out: Path) -> Mapping[str, Any]:
    data = [f"data.path={table}", "data.source=table", "data.columns={title: title}", "data.rating_scale=null"]
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", data)
    config = TransitionsTunedConfig(encoder=tiny_encoder(), blocks=2, epochs=1, learning_rate=5e-3)
    return tune_encoder(recipe, out, config)


def _split(table: Path, seed: int = 0, **more: object) -> SplitDataset:
    return load_split(DataSection.model_validate({"source": "table", "path": str(table), **more}), seed)


def test_tuned_folder_records_its_training(table: Path, tuned: Path) -> None:
    record = json.loads((tuned / TUNING_RECORD_FILE).read_text(encoding="utf-8"))
    assert record["interactions"] == 240 and record["encoder"] == tiny_encoder() and record["parameters"]["blocks"] == 2
    assert set(record["files"]) | {TUNING_RECORD_FILE, ".lock"} >= {entry.name for entry in tuned.iterdir()}
    texts = ["anvil a", "feather b"]
    before, after = encode_texts(tiny_encoder(), texts), encode_texts(str(tuned), texts)
    assert before.shape == after.shape and not np.allclose(before, after, atol=1e-4)


@pytest.mark.parametrize(("content", "kind"), [("{", "syntax"), ("{}", "damaged")])
def test_damaged_record_is_an_error(content: str, kind: ErrorKind, table: Path, tuned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tuned, tmp_path / "encoder"))
    (folder / TUNING_RECORD_FILE).write_text(content, encoding="utf-8")
    for use in (lambda: encoder_training_hash(str(folder)), lambda: _tune(table, folder)):
        with raises(DataError, Facts(kind, TUNING_RECORD_FILE, says="llmrec tune-encoder")):
            use()


def test_rows_that_use_it_are_language_models(tuned: Path) -> None:
    assert baseline_reads("content", {"encoder": str(tuned)}) == "language model"
    assert baseline_reads("content", {"encoder": tiny_encoder()}) == baseline_reads("content", {}) == "texts"
    assert (
        baseline_reads("popularity", {})
        == baseline_reads("dcn", {})
        == baseline_reads("dcn", {"align": {"longer": True}})
        == "events"
    )
    assert (
        baseline_reads("dcn", {"align": {"encoder": "lsa"}})
        == baseline_reads("dcn", {"align": {"encoder": "chance"}})
        == "texts"
    )
    assert baseline_reads("dcn", {"align": {"encoder": str(tuned)}}) == "language model"
    # Its joint layers are pretrained and then tuned.
    assert (baseline_reads("late-interaction", {}), baseline_reads("late-interaction", {"joint": 0})) == (
        "language model",
        "texts",
    )


def test_changed_encoder_changes_row_keys(table: Path, tuned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tuned, tmp_path / "encoder"))
    data = f"data={{source: table, path: {table}, columns: {{title: title}}}}"
    controls = "random, popularity, item-knn, markov-1"
    tasks = f"tasks={{sequential: {{baselines: [{controls}, {{name: content, encoder: {folder}}}]}}}}"
    more = ("reviews=null", "eval.arms=[]", "eval.candidates.count=5")
    study = build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", [data, tasks, *more]))
    labels = [each.label for each in study.baselines("sequential")]

    def keys() -> list[str]:
        evaluation = Evaluation(study, None, tmp_path / "run", StageTimer(quiet=True), quiet=True)
        return [evaluation.key(RowSpec("sequential", "baseline", label), "numpy", None) for label in labels]

    before, (weights,) = keys(), folder.glob("*.safetensors")
    tensors = load_file(weights)
    tensors[min(tensors)] = tensors[min(tensors)] + 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert [one == other for one, other in zip(before, keys(), strict=True)] == [True] * 4 + [False]
    assert input_hashes("content", {"encoder": str(folder)}) != input_hashes("content", {"encoder": str(tuned)})
    assert input_hashes("popularity", {}) == input_hashes("content", {"encoder": str(tmp_path / "none")}) == {}


def test_vectors_follow_changes_of_the_folder(tuned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tuned, tmp_path / "encoder"))
    stamps, texts = [text_embedder(str(folder)).stamp], ["anvil a", "feather b drum"]
    means = text_embedder(str(folder))(texts)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.parent.mkdir(exist_ok=True)
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True}), encoding="utf-8")
    stamps.append(text_embedder(str(folder)).stamp)
    assert not np.allclose(text_embedder(str(folder))(texts), means)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: each + 1 for name, each in tensors.items()}, weights, metadata={"format": "pt"})
    stamps.append(text_embedder(str(folder)).stamp)
    assert len(set(stamps)) == 3


def test_rejects_tuned_encoder_with_other_split(table: Path, tuned: Path) -> None:
    same, other = _split(table), _split(table, split={"kind": "last_share", "valid": 0.2, "test": 0.5})
    more = TransitionsTunedConfig(encoder=str(tuned), blocks=1, epochs=1, steps=1, quiet=True)
    for model in (Content(Content.Config(encoder=str(tuned))), TransitionsTuned(more)):
        model.fit(same)
        assert len(model.items) == 24
        with raises(DataError, Facts("leak", str(tuned), column="encoder")):
            model.fit(other)
    lazy_item_vectors(same.dataset.items, str(tuned), same).of(["00"])
    with raises(DataError, Facts("leak", str(tuned), column="encoder")):
        lazy_item_vectors(other.dataset.items, str(tuned), other).of(["00"])


def test_tuning_replaces_its_folder_but_no_foreign_files(table: Path, tuned: Path, tmp_path: Path) -> None:
    assert _tune(table, tuned)["interactions"] == 240
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with raises(LlmrecError, Facts("exists", tmp_path)):
        _tune(table, tmp_path)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    (tuned / "mine.txt").write_text("mine", encoding="utf-8")
    with raises(LlmrecError, Facts("exists", tuned)):
        _tune(table, tuned)
    (tuned / "mine.txt").unlink()
