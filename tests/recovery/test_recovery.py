"""A run, export or ranking that is killed at any named point gives the same results when repeated."""

from __future__ import annotations

import json
import shutil
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
    *("mid-step", "mid-save, before the optimiser", "mid-save, before the random state"),
    *("mid-save, before the manifest", "between stages, before the record of training"),
]
AFTER_TRAINING = [name for name in points.RUN if name.startswith(("mid-evaluation", "mid-report"))]


@pytest.fixture(scope="module")
def runs(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with zygote(llama_folder, tmp_path_factory.mktemp("kills") / "log") as started:
        yield started


@pytest.fixture(scope="module")
def complete(runs: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Return an uninterrupted run, its export and a ranking."""
    chain = Chain(tmp_path_factory.mktemp("complete"))
    for step, status in DONE.items():
        assert runs.do(chain, step) == status, runs.log.read_text(encoding="utf-8")[-3000:]
    return chain


@pytest.fixture(scope="module")
def expected(complete: Chain) -> dict[str, Any]:
    return outcome(complete.run)


@pytest.fixture(scope="module")
def trained(complete: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Return a run without the files of its evaluation."""
    chain = Chain(tmp_path_factory.mktemp("trained"))
    evaluated = shutil.ignore_patterns(
        *("answers.sqlite*", "rows", "*.parquet", "results.json", "report", "audit*.json", "trackers.json")
    )
    shutil.copytree(complete.run, chain.run, ignore=evaluated)
    shutil.copytree(complete.run / "candidates", chain.run / "candidates", dirs_exist_ok=True)
    return chain


def part(complete: Chain, target: Path, *names: str) -> Chain:
    """Return a copy of a chain with only some files and folders."""
    chain = complete.copy(target)
    for path in chain.folder.iterdir():
        if path.name not in names:
            path.rename(target.with_name(f"{target.name}-not-{path.name}"))
    return chain


# --------------------------------------------------------------------------- the run


def test_outcome_of_run_is_complete(expected: dict[str, Any]) -> None:
    assert expected["steps"] == list(range(7))
    assert len(expected["results"]["rows"]) == 24
    assert len(expected["predictions"]) > 200
    assert {"index.html", "report.md", "table.csv"} <= set(expected["report"])
    assert expected["drafts"] == []


# Kinds of points that resume like others.
SLOW = ("mid-step", "between stages", "mid-report")


def one_of_each(names: Sequence[str]) -> list[Any]:
    """Return the points of kills: the first of each kind, and the others marked as slow."""
    first = {name.partition(",")[0]: name for name in reversed(names) if name.partition(",")[0] not in SLOW}
    return [name if name in first.values() else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("point", one_of_each(points.RUN))
def test_killed_run_gives_the_same_results(
    point: str, runs: Zygote, expected: dict[str, Any], trained: Chain, tmp_path: Path
) -> None:
    chain = trained.copy(tmp_path / "chain") if point in AFTER_TRAINING else Chain(tmp_path / "chain")
    assert runs.do(chain, "run", point) == -9
    stored = answers(chain.run)
    assert runs.do(chain, "run") == 0
    assert outcome(chain.run) == expected
    # Stored answers keep their first seconds, so they were not computed again.
    assert stored.items() <= answers(chain.run).items()
    record = json.loads((chain.run / "train.json").read_text(encoding="utf-8"))
    if point in AFTER_A_CHECKPOINT:
        assert record["seconds_before"] > 0, "training started again"
    if point == "mid-evaluation, after a chunk is stored":
        assert len(stored) == 5 * 4


def test_second_run_computes_nothing_and_repairs_merged_model(
    runs: Zygote, complete: Chain, expected: dict[str, Any], tmp_path: Path
) -> None:
    chain = complete.copy(tmp_path / "chain")
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
        # A running command creates the file before the table.
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone() is None:
            return {}
        return dict(connection.execute("SELECT key, value FROM answers"))
    finally:
        connection.close()


# --------------------------------------------------------------------------- the export


@pytest.mark.parametrize("point", one_of_each(points.EXPORT))
def test_killed_export_gives_the_same_files(point: str, runs: Zygote, complete: Chain, tmp_path: Path) -> None:
    chain = part(complete, tmp_path / "chain", "run")
    assert runs.do(chain, "export", point) == -9
    left = sorted(path.name for path in chain.folder.glob("films*"))
    # The final name has a complete folder or nothing.
    assert left == ["films"] if point == "mid-export, after the rename" else left[0].startswith("films.llmrec-tmp-")
    if point == "mid-export, weights half written":
        (half,) = chain.folder.glob("films.llmrec-tmp-*/model.safetensors")
        assert 0 < half.stat().st_size < (complete.exported / half.name).stat().st_size
    assert runs.do(chain, "export") == 0
    assert export_outcome(chain) == export_outcome(complete)
    assert export_outcome(chain)["names"] == ["films"]


# --------------------------------------------------------------------------- the ranking


def test_outcome_of_ranking_is_complete(complete: Chain) -> None:
    rows = [json.loads(row) for row in rank_outcome(complete)["rows"]]
    assert [row["line"] for row in rows] == list(range(1, REQUESTS + 1))
    assert tuple(row["line"] for row in rows if row["error"]) == FAULTY
    assert len({tuple(row["scores"]) for row in rows if not row["error"]}) > REQUESTS // 2


@pytest.mark.parametrize("point", one_of_each(points.RANK))
def test_killed_ranking_gives_the_same_lists(point: str, runs: Zygote, complete: Chain, tmp_path: Path) -> None:
    chain = part(complete, tmp_path / "chain", "films", "requests.jsonl")
    assert runs.do(chain, "rank", point) == -9
    parts = chain.ranked.with_name("ranked.jsonl.parts")
    stored = {path.name: path.read_bytes() for path in parts.glob("part-*")}
    counts = {"before a part is stored": 1, "after a part is stored": 2}
    assert len(stored) == counts.get(point.partition(", ")[2], len(stored))
    assert runs.do(chain, "rank") == DONE["rank"]
    assert rank_outcome(chain) == rank_outcome(complete)
    assert rank_outcome(chain)["names"] == ["ranked.jsonl", "ranked.jsonl.summary.json"]
    summary = json.loads(chain.ranked.with_name("ranked.jsonl.summary.json").read_text(encoding="utf-8"))
    if point != "mid-rank, before the parts are removed":
        assert summary["from_earlier_run"] == sum(len(content.splitlines()) for content in stored.values())
