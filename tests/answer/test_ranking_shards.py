"""Shards of a file give the same bytes as one process; incomplete shards are not merged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmrec.answer.rank import run
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.ranker import open_ranker
from llmrec.answer.rank.run import rank_file
from llmrec.answer.rank.sharded import merge_rank, rank_shard
from llmrec.cli.main import app
from llmrec.durable import sha256_of
from llmrec.errors import DataError, LlmrecError, RecipeError
from llmrec.pipeline.resume import StageTimer
from llmrec.records import Shard
from tests.answer.rank_cases import Killed, dying, items_csv, jsonl, options, records
from tests.facts import Facts, raises

pytest.importorskip("transformers")

COUNT, PART = 9, 2


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "PART_SIZE", PART)


def rank_options(model: Path, folder: Path, **more: Any) -> RankOptions:
    """Return options for requests with one repeated id and one repeated history, several parts apart."""
    requests = records(COUNT, candidates=3, history=2)
    requests[7]["id"] = requests[0]["id"]
    requests[6]["history"] = requests[1]["history"]
    folder.mkdir(exist_ok=True)
    path = jsonl(folder / "in.jsonl", requests)
    return options(model, path, folder / "out.jsonl", items=items_csv(folder), batch=PART, **more)


@pytest.mark.parametrize("more", [
    {"task": "direct", "strategy": "label"}, {"candidates": "all", "beams": 3, "top": 3},
], ids=["label", "search"])  # fmt: skip
def test_shards_equal_one_process(llama_folder: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    chosen = rank_options(llama_folder, tmp_path, **more)
    complete = rank_file(replace(chosen, out=tmp_path / "whole.jsonl"))
    last = rank_shard(chosen, Shard(3, 3))
    # Several shards with one model, as in a worker.
    with open_ranker(chosen, store=tmp_path / "answers.sqlite", budget=StageTimer()) as ranker:
        folders = [*(rank_shard(chosen, Shard(index, 3), ranker=ranker) for index in (2, 1)), last]
    merged = merge_rank(chosen.target)
    assert sha256_of(chosen.target) == complete["sha256"] == merged["sha256"]
    same = ("key", "lines", "ranked", "failed", "failures", "notes", "prompt_tokens", "completion_tokens", "forwards")
    assert {name: merged[name] for name in same} == {name: complete[name] for name in same}
    assert complete["failed"] == 1 and len(merged["shards"]) == 3
    # Merging again, or merging copies of the folders, gives the same result.
    stamp = chosen.target.stat().st_mtime_ns
    assert merge_rank(chosen.target)["sha256"] == complete["sha256"]
    assert chosen.target.stat().st_mtime_ns == stamp
    other = tmp_path / "elsewhere" / "out.jsonl"
    moved = [Path(shutil.copytree(folder, tmp_path / "elsewhere" / str(n))) for n, folder in enumerate(folders)]
    merge_rank(other, moved)
    assert sha256_of(other) == complete["sha256"]


def test_restarted_shards_are_merged_again(llama_folder: Path, tmp_path: Path) -> None:
    chosen = rank_options(llama_folder, tmp_path, strategy="likelihood")
    for restart in (False, True):
        for number in (1, 2):
            rank_shard(replace(chosen, restart=restart), Shard(number, 2))
        stamp = chosen.target.stat().st_mtime_ns if restart else 0
        merge_rank(chosen.target)
    assert chosen.target.stat().st_mtime_ns > stamp


def test_killed_shard_resumes_before_merge(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = rank_options(llama_folder, tmp_path, task="direct", strategy="label")
    complete = rank_file(replace(chosen, out=tmp_path / "whole.jsonl"))
    rank_shard(chosen, Shard(1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_part", dying(1))
        with pytest.raises(Killed):
            rank_shard(chosen, Shard(2, 2))
    with raises(LlmrecError, Facts("missing-file", "2-of-2", says="shard.json")):
        merge_rank(chosen.target)
    folder = rank_shard(chosen, Shard(2, 2))
    summary = json.loads((folder / "shard.json").read_text("utf-8"))["facts"]
    assert (summary["lines"], summary["fresh"]) == (5, 3)
    assert merge_rank(chosen.target)["sha256"] == complete["sha256"]

    # A changed part is rejected; the command of its shard creates it again.
    part = sorted(folder.glob("part-*"))[0]
    part.write_text(part.read_text("utf-8").replace("r", "s", 1), encoding="utf-8")
    chosen.target.unlink()
    with raises(LlmrecError, Facts("damaged", part.name, says="run the command of this shard again")):
        merge_rank(chosen.target)
    rank_shard(chosen, Shard(2, 2))
    assert merge_rank(chosen.target)["sha256"] == complete["sha256"]


def test_shards_of_other_options_are_not_merged(llama_folder: Path, tmp_path: Path) -> None:
    chosen = rank_options(llama_folder, tmp_path, task="direct", strategy="label")
    rank_shard(chosen, Shard(1, 2))
    rank_shard(replace(chosen, top=1), Shard(2, 2))
    with raises(LlmrecError, Facts("mismatch", "2-of-2", says="inputs or options")):
        merge_rank(chosen.target)
    # Rows of the long format contain only the user: two lists of one user are rejected, as in one process.
    long = replace(chosen, form="long")
    rank_shard(long, Shard(1, 2))
    rank_shard(long, Shard(2, 2))
    with raises(DataError, Facts("duplicate", column="user_id", line=9)):
        merge_rank(chosen.target)


def test_shard_and_merge_commands(llama_folder: Path, tmp_path: Path) -> None:
    chosen = rank_options(llama_folder, tmp_path)
    line = ["rank", "--model", str(llama_folder), "--in", str(chosen.source), "--out", str(chosen.target)]
    line += ["--items", str(chosen.items), "--backend", "hf", "--dtype", "float32", "--top", "2"]
    for piece in ("1/2", "2/2"):
        done = CliRunner().invoke(app, [*line, "--shard", piece])
        assert "llmrec merge" in done.output and done.exit_code == (piece == "2/2")
    merged = CliRunner().invoke(app, ["merge", str(chosen.target)])
    assert merged.exit_code == 1 and "8 of 9 lines" in merged.output
    with raises(RecipeError, Facts("bad-value", column="--shard")):
        CliRunner().invoke(app, [*line, "--shard", "3/2"], catch_exceptions=False)
    with raises(RecipeError, Facts("unsupported", column="--out")):
        rank_shard(replace(chosen, out=Path("-")), Shard(1, 2))
