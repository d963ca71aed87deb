"""A run that is killed at any named point ends, run again, as if it had not been killed."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.recovery.kills import POINTS, Zygote, outcome, zygote

pytest.importorskip("trl", reason="the train extra is not installed")
pytest.importorskip("rouge_score", reason="the text extra is not installed")

AFTER_A_CHECKPOINT = [
    "mid-step",
    "mid-save, before the optimiser",
    "mid-save, before the random state",
    "mid-save, before the manifest",
    "between stages, before the merge",
]


@pytest.fixture(scope="module")
def runs(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with zygote(llama_folder, tmp_path_factory.mktemp("kills") / "log") as started:
        yield started


@pytest.fixture(scope="module")
def expected(runs: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert runs.run(folder).status == 0
    return outcome(folder)


def test_the_outcome_of_the_small_recipe_is_worth_comparing(expected: dict[str, Any]) -> None:
    assert expected["steps"] == list(range(7))
    assert len(expected["results"]["rows"]) == 19
    assert len(expected["predictions"]) > 300
    assert {"index.html", "report.md", "table.csv"} <= set(expected["report"])
    assert expected["drafts"] == []


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_changes_nothing(point: str, runs: Zygote, expected: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert runs.run(folder, point).status == -9
    kept = answers(folder)
    assert runs.run(folder).status == 0
    assert outcome(folder) == expected
    # What was answered before the kill was not asked again: each stored answer still carries its first seconds.
    after = answers(folder)
    assert kept.items() <= after.items()
    trained = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    if point in AFTER_A_CHECKPOINT:
        assert trained["seconds_before"] > 0, "training began anew"
    if point == "mid-evaluation, after a chunk is stored":
        assert len(kept) == 5 * 8


def test_a_second_run_computes_nothing(runs: Zygote, expected: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert runs.run(folder).status == 0
    weights = (folder / "merged" / "model.safetensors").stat().st_mtime_ns
    first = answers(folder)
    assert runs.run(folder).status == 0
    assert outcome(folder) == expected and answers(folder) == first
    assert (folder / "merged" / "model.safetensors").stat().st_mtime_ns == weights


def test_a_changed_merged_model_is_made_again(runs: Zygote, expected: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert runs.run(folder).status == 0
    weights = folder / "merged" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert runs.run(folder).status == 0
    assert outcome(folder) == expected


def answers(folder: Path) -> dict[str, str]:
    """Return the stored answers of a run by key."""
    path = folder / "answers.sqlite"
    if not path.is_file():
        return {}
    connection = sqlite3.connect(path)
    try:
        return dict(connection.execute("SELECT key, value FROM answers"))
    finally:
        connection.close()
