"""Stored stages are reused only if they are intact."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from llmrec.errors import LlmrecError
from llmrec.pipeline.evaluation import restore_row
from llmrec.pipeline.resume import read_stage
from llmrec.pipeline.runs import open_run
from llmrec.resources import resource
from tests.facts import Facts, raises


@pytest.mark.parametrize(
    "content",
    ["[]", "[" * 100_000, '{"key": "k"}', '{"key": "other", "stamp": "s"}', '{"key": "k", "stamp": "\\ud800"}'],
)
def test_damaged_or_outdated_stage_is_not_reused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "stage.json"
    file.write_text(content, encoding="utf-8")
    assert read_stage(file, "k", itemgetter("stamp")) is None
    file.write_text('{"key": "k", "stamp": "s"}', encoding="utf-8")
    assert read_stage(file, "k", itemgetter("stamp")) == {"key": "k", "stamp": "s"}


@pytest.mark.parametrize("wrong", [{"figures": {"arm": 3}}, {"records": [{}]}, {"values": {"RMSE": {"": {}}}}])
def test_damaged_row_is_not_reused(wrong: dict[str, Any], tmp_path: Path) -> None:
    figures = json.loads(resource("eval/results/four-tasks.json").read_text(encoding="utf-8"))["rows"][0]
    stored = {"key": "k", "figures": figures, "values": {}, "records": [], "examples": []}
    stored |= {"weighing": {}, "validation": {}, "looked_at": []}
    file = tmp_path / "row.json"
    file.write_text(json.dumps(stored), encoding="utf-8")
    assert read_stage(file, "k", restore_row) is not None
    stored |= wrong
    file.write_text(json.dumps(stored), encoding="utf-8")
    assert read_stage(file, "k", restore_row) is None


@pytest.mark.parametrize("record", ["[" * 100_000, '{"adapter_sha256": "x", "method": "lora", "steps": Infinity}', ""])
def test_rejects_damaged_training_record(record: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\ndata: {source: made-reviews}\ntasks: {rating: {}}\n", "utf-8")
    file = tmp_path / "train.json"
    file.mkdir() if not record else file.write_text(record, encoding="utf-8")
    with raises(LlmrecError, Facts("damaged", file, says="llmrec train")):
        open_run(tmp_path)
