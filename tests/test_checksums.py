"""Checksums of stored files: a changed byte is reported as damage, and never changes a result."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.data.features import Features, FeatureStore, Provenance, publish
from llmrec.data.ranked import RankingRecord, read_part, write_part
from llmrec.durable import matches_manifest_cached, parse_checked_json, sha256_of, write_checked_json, write_text
from llmrec.errors import DataError, LlmrecError, ModelError
from llmrec.index.table import ItemIndex
from llmrec.pipeline.bundle import CHECKSUMS_FILE, Bundle, check_unchanged
from llmrec.pipeline.resume import read_stage
from llmrec.recipe.schema import ModelSection, TasksSection
from llmrec.report.results import check_predictions_file, read_results_json
from tests.facts import Facts, raises

STORED: dict[str, Any] = {"key": "k", "values": {"NDCG@10": [0.5, 0.25]}, "text": 'ends in "checksum": "0" é', "n": 12}


def changed(content: bytes, seed: int) -> bytes:
    """Flip a low bit somewhere: digits become other digits."""
    draw = random.Random(seed)
    spoilt = bytearray(content)
    spoilt[draw.randrange(len(content))] ^= 1 << draw.randrange(3)
    return bytes(spoilt)


def test_changed_byte_of_a_stage_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    assert write_checked_json(path, STORED) == sha256_of(path)
    content = path.read_bytes()
    assert parse_checked_json(content) == STORED and read_stage(path, "k", lambda _: None) == STORED
    for position in range(len(content)):
        for bit in range(3):
            spoilt = bytearray(content)
            spoilt[position] ^= 1 << bit
            try:
                result = parse_checked_json(bytes(spoilt))
            except ValueError:
                continue
            # Only the marker of the checksum is damaged, and nothing else.
            assert STORED.items() <= result.items()
    path = tmp_path / "stage.json"
    path.write_text(json.dumps(STORED, indent=1) + "\n", encoding="utf-8")
    assert read_stage(path, "k", lambda _: None) == STORED
    write_checked_json(path, STORED)
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.35"))
    assert read_stage(path, "k", lambda _: None) is None


def test_changed_part_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    records = [RankingRecord(request_id=f"r{n}", user_id=None, line=n, items=("a\tb",), scores=(0.25,)) for n in (1, 2)]
    write_part(path, records)
    content = path.read_bytes()
    assert read_part(path) == records
    path.write_bytes(content.replace(b"0.25", b"0.35", 1))
    assert read_part(path) is None
    for seed in range(100):
        path.write_bytes(changed(content, seed))
        assert read_part(path) in (None, records)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "store"
    ids = [f"u{n}" for n in range(40)]
    vectors = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    texts = [f"likes number {each}" for each in ids]
    seen = {each: frozenset({(each, "i1")}) for each in ids}
    publish(folder, [Features("user", ids, vectors, Provenance(system="test"), texts=texts, seen=seen)])
    return folder


@pytest.mark.parametrize(
    "name", ["meta.json", "user-ids.npy", "user-vectors.npy", "user-fallback.npy", "features.sqlite"]
)
def test_rejects_damaged_store(store: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(store, tmp_path / "store")
    (version,) = (path for path in (tmp_path / "store").iterdir() if path.is_dir())
    assert matches_manifest_cached(version) and FeatureStore.open(tmp_path / "store").ids("user")
    content = (version / name).read_bytes()
    for seed in range(2):
        (version / name).write_bytes(changed(content, seed))
        with raises(DataError, Facts("damaged", tmp_path / "store")):
            FeatureStore.open(tmp_path / "store")
    (version / name).write_bytes(content)
    assert FeatureStore.open(tmp_path / "store").ids("user")


def test_reads_store_without_checksums(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    next((tmp_path / "store").glob("*/manifest.json")).unlink()
    assert len(FeatureStore.open(tmp_path / "store").ids("user")) == 40


def test_rejects_other_answers_of_a_run(tmp_path: Path) -> None:
    answers = tmp_path / "predictions.parquet"
    answers.write_bytes(b"answers")
    write_checked_json(tmp_path / "results.json", {"rows": [0.5], "files": {answers.name: sha256_of(answers)}})
    check_predictions_file(tmp_path, read_results_json(tmp_path)["files"])
    answers.write_bytes(b"Answers")
    with raises(DataError, Facts("damaged", answers, says="llmrec eval")):
        check_predictions_file(tmp_path, read_results_json(tmp_path)["files"])
    check_predictions_file(tmp_path, {})
    results = tmp_path / "results.json"
    results.write_bytes(results.read_bytes().replace(b"0.5", b"0.6"))
    with raises(DataError, Facts("damaged", results, says="checksum")):
        read_results_json(tmp_path)


def test_rejects_damaged_index(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    index = ItemIndex("x", {"i": ("<a_1>",)}, tokens=("<a_1>",), arrays={"c": np.ones((2, 3), dtype=np.float32)})
    index.save(tmp_path / "index")
    assert ItemIndex.load(tmp_path / "index").digest == index.digest
    for file in (tmp_path / "index").iterdir():
        content = file.read_bytes()
        position = content.find(b"<a_1>") + 3 if file.suffix == ".json" else len(content) - 1
        file.write_bytes(content[:position] + b"2" + content[position + 1 :])
        with raises(DataError, Facts("damaged", file)):
            ItemIndex.load(tmp_path / "index")
        file.write_bytes(content)


def opened(folder: Path, run: Path | None) -> Bundle:
    return Bundle(
        folder=str(folder),
        run=run,
        model=ModelSection(name=str(folder)),
        tasks=TasksSection(),
        templates={},
        tuned=True,
    )


def test_rejects_changed_models(tmp_path: Path) -> None:
    for name in ("model.safetensors", "items.parquet", "README.md"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in sorted(tmp_path.iterdir())]
    (tmp_path / CHECKSUMS_FILE).write_text("".join(lines), encoding="utf-8")
    (tmp_path / "README.md").write_text("a card of one's own", encoding="utf-8")
    check_unchanged(opened(tmp_path, None), "w")
    (tmp_path / "items.parquet").write_text("Items.parquet", encoding="utf-8")
    with raises(ModelError, Facts("damaged", tmp_path / "items.parquet", says="export")):
        check_unchanged(opened(tmp_path, None), "w")
    merged = tmp_path / "merged"
    check_unchanged(opened(merged, tmp_path), "w")
    write_checked_json(tmp_path / "train.json", {"key": "k", "merged_sha256": "w"})
    check_unchanged(opened(merged, tmp_path), "w")
    with raises(ModelError, Facts("damaged", merged, says="llmrec train")):
        check_unchanged(opened(merged, tmp_path), "other")
    (tmp_path / "train.json").write_bytes((tmp_path / "train.json").read_bytes()[:-3])
    with raises(ModelError, Facts("damaged", tmp_path / "train.json")):
        check_unchanged(opened(merged, tmp_path), "w")


def test_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with raises(LlmrecError, Facts("exists", file=pipe)):
        write_text(pipe, "text")
    assert pipe.is_fifo()
