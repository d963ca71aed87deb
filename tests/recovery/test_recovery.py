"""A run, an export or a ranking that is killed at any named point ends, given again, as if it had not been killed."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.recovery import points
from tests.recovery.kills import DONE, FAULTY, Chain, Zygote, export_outcome, outcome, rank_outcome, zygote
from tests.recovery.points import REQUESTS

pytest.importorskip("trl", reason="the train extra is not installed")
pytest.importorskip("rouge_score", reason="the text extra is not installed")

AFTER_A_CHECKPOINT = [
    "mid-step",
    "mid-save, before the optimiser",
    "mid-save, before the random state",
    "mid-save, before the manifest",
    "between stages, before the record of training",
]
AFTER_TRAINING = [name for name in points.RUN if name.startswith(("mid-evaluation", "mid-report"))]


@pytest.fixture(scope="module")
def runs(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with zygote(llama_folder, tmp_path_factory.mktemp("kills") / "log") as started:
        yield started


@pytest.fixture(scope="module")
def whole(runs: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A run, its export and a ranking that nothing disturbed."""
    chain = Chain(tmp_path_factory.mktemp("whole"))
    for step, status in DONE.items():
        assert runs.do(chain, step) == status, runs.log.read_text(encoding="utf-8")[-3000:]
    return chain


@pytest.fixture(scope="module")
def expected(whole: Chain) -> dict[str, Any]:
    return outcome(whole.run)


@pytest.fixture(scope="module")
def trained(runs: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A run that was killed after its training, so that kills in the stages after it need not train again."""
    chain = Chain(tmp_path_factory.mktemp("trained"))
    assert runs.do(chain, "run", "between stages, before evaluation") == -9
    return chain


def part(whole: Chain, target: Path, *names: str) -> Chain:
    """Return a chain with only these of another one's files and folders."""
    chain = whole.copy(target)
    for path in chain.folder.iterdir():
        if path.name not in names:
            path.rename(target.with_name(f"{target.name}-not-{path.name}"))
    return chain


# --------------------------------------------------------------------------- the run


def test_the_outcome_of_the_small_recipe_is_worth_comparing(expected: dict[str, Any]) -> None:
    assert expected["steps"] == list(range(7))
    assert len(expected["results"]["rows"]) == 24
    assert len(expected["predictions"]) > 300
    assert {"index.html", "report.md", "table.csv"} <= set(expected["report"])
    assert expected["drafts"] == []


SLOW = ("mid-step", "between stages", "mid-report")
"""Kinds of points of which another one stands for all: a checkpoint is resumed, or what is lost is made in a moment."""


def one_of_each(names: Sequence[str]) -> list[Any]:
    """Return points of kills: the first of each kind, and marked as slow the others."""
    first = {name.partition(",")[0]: name for name in reversed(names) if name.partition(",")[0] not in SLOW}
    return [name if name in first.values() else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("point", one_of_each(points.RUN))
def test_a_kill_changes_nothing(
    point: str, runs: Zygote, expected: dict[str, Any], trained: Chain, tmp_path: Path
) -> None:
    chain = trained.copy(tmp_path / "chain") if point in AFTER_TRAINING else Chain(tmp_path / "chain")
    assert runs.do(chain, "run", point) == -9
    kept = answers(chain.run)
    assert runs.do(chain, "run") == 0
    assert outcome(chain.run) == expected
    # What was answered before the kill was not asked again: each stored answer still carries its first seconds.
    after = answers(chain.run)
    assert kept.items() <= after.items()
    record = json.loads((chain.run / "train.json").read_text(encoding="utf-8"))
    if point in AFTER_A_CHECKPOINT:
        assert record["seconds_before"] > 0, "training began anew"
    if point == "mid-evaluation, after a chunk is stored":
        assert len(kept) == 5 * 8


def test_a_second_run_computes_nothing_and_mends_a_changed_merged_model(
    runs: Zygote, whole: Chain, expected: dict[str, Any], tmp_path: Path
) -> None:
    chain = whole.copy(tmp_path / "chain")
    weights = chain.run / "merged" / "model.safetensors"
    content, written = weights.read_bytes(), weights.stat().st_mtime_ns
    first = answers(chain.run)
    assert runs.do(chain, "run") == 0
    assert outcome(chain.run) == expected and answers(chain.run) == first
    assert weights.stat().st_mtime_ns == written
    changed = bytearray(content)
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert runs.do(chain, "run") == 0
    assert outcome(chain.run) == expected and weights.read_bytes() == content


def answers(folder: Path) -> dict[str, str]:
    """Return the stored answers of a run by key."""
    path = folder / "answers.sqlite"
    if not path.is_file():
        return {}
    connection = sqlite3.connect(path)
    try:
        # A run that goes on makes the file first and the table in it a moment later.
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone() is None:
            return {}
        return dict(connection.execute("SELECT key, value FROM answers"))
    finally:
        connection.close()


# --------------------------------------------------------------------------- the export


@pytest.mark.parametrize("point", one_of_each(points.EXPORT))
def test_a_killed_export_ends_like_one_that_was_not(point: str, runs: Zygote, whole: Chain, tmp_path: Path) -> None:
    chain = part(whole, tmp_path / "chain", "run")
    assert runs.do(chain, "export", point) == -9
    left = sorted(path.name for path in chain.folder.glob("films*"))
    # Under the final name stands a whole folder or nothing.
    assert left == ["films"] if point == "mid-export, after the rename" else left[0].startswith("films.llmrec-tmp-")
    if point == "mid-export, weights half written":
        (half,) = chain.folder.glob("films.llmrec-tmp-*/model.safetensors")
        assert 0 < half.stat().st_size < (whole.exported / half.name).stat().st_size
    assert runs.do(chain, "export") == 0
    assert export_outcome(chain) == export_outcome(whole)
    assert export_outcome(chain)["beside"] == ["films"]


# --------------------------------------------------------------------------- the ranking


def test_the_ranking_is_worth_comparing(whole: Chain) -> None:
    rows = [json.loads(row) for row in rank_outcome(whole)["rows"]]
    assert [row["line"] for row in rows] == list(range(1, REQUESTS + 1))
    assert tuple(row["line"] for row in rows if row["error"]) == FAULTY
    assert len({tuple(row["scores"]) for row in rows if not row["error"]}) > REQUESTS // 2


@pytest.mark.parametrize("point", one_of_each(points.RANK))
def test_a_killed_ranking_ends_like_one_that_was_not(point: str, runs: Zygote, whole: Chain, tmp_path: Path) -> None:
    chain = part(whole, tmp_path / "chain", "films", "requests.jsonl")
    assert runs.do(chain, "rank", point) == -9
    parts = chain.ranked.with_name("ranked.jsonl.parts")
    kept = {path.name: path.read_bytes() for path in parts.glob("part-*")}
    assert len(kept) == {"before a part is stored": 1, "after a part is stored": 2}.get(
        point.partition(", ")[2], len(kept)
    )
    assert runs.do(chain, "rank") == DONE["rank"]
    assert rank_outcome(chain) == rank_outcome(whole)
    assert rank_outcome(chain)["beside"] == ["ranked.jsonl", "ranked.jsonl.summary.json"]
    summary = json.loads(chain.ranked.with_name("ranked.jsonl.summary.json").read_text(encoding="utf-8"))
    if point != "mid-rank, before the parts are removed":
        assert summary["from_earlier_run"] == sum(len(content.splitlines()) for content in kept.values())
