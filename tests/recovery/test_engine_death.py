"""`llmrec run` with a real vLLM engine that is killed: it ends soon with an error, and can be resumed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import psutil
import pytest

from tests.recovery.test_recovery import answers

pytest.importorskip("rouge_score", reason="the text extra is not installed")
pytestmark = pytest.mark.slow

USERS, BATCH = 24, 4
RECIPE = (
    *("recipes/movielens-100k/four-tasks.yaml", "data={source: made-reviews, noun: products}", "reviews=null"),
    *("model.dtype=float32", "tasks={explanation: {templates: [plain], max_tokens: 300}}"),
    f"eval={{arms: [zero-shot], users: {USERS}, batch: {BATCH}, backend: vllm, bootstrap: 50}}",
)
SECONDS = 30.0


class Command:
    """`llmrec run` in a new process."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.run, self.errors = folder / "run", folder / "stderr"
        args = ["run", *RECIPE, f"model.name={model}", "--quiet", "--out", str(self.run)]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llmrec.cli.main", *args],
                stdout=subprocess.DEVNULL,
                stderr=errors,
                # The default memory of vLLM is too much for a small machine.
                env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
            )
        self.engine: list[psutil.Process] = []

    def wait_for_answers(self, seconds: float = 400) -> None:
        """Wait until some batches are stored."""
        deadline = time.monotonic() + seconds
        while len(answers(self.run)) < 2 * BATCH:
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.1)
        self.engine = psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> None:
        for process in [*self.engine, psutil.Process(self.process.pid)] if self.process.poll() is None else self.engine:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()


@pytest.fixture
def command(tmp_path: Path, llama_folder: Path) -> Iterator[Command]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    started = Command(llama_folder, tmp_path)
    yield started
    started.end()


@pytest.mark.vllm
def test_run_with_killed_engine_ends_and_is_resumed(command: Command, llama_folder: Path, tmp_path: Path) -> None:
    command.wait_for_answers()
    (core,) = [process for process in command.engine if "EngineCore" in process.name()]
    core.kill()
    assert command.process.wait(SECONDS) == 2, command.errors.read_text()
    (line,) = [line for line in command.errors.read_text().splitlines() if line.startswith("error: ")]
    assert "died" in line and "run the same command again to continue" in line
    _, alive = psutil.wait_procs(command.engine, timeout=15)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    stored = answers(command.run)
    assert len(stored) >= 2 * BATCH
    again = Command(llama_folder, tmp_path)
    try:
        assert again.process.wait(500) == 0, again.errors.read_text()
    finally:
        again.end()
    # Stored answers keep their first seconds, so they were not computed again.
    assert stored.items() < answers(command.run).items()
    rows = pl.read_parquet(command.run / "predictions.parquet").filter(pl.col("row_id").str.contains("zero-shot"))
    assert rows["request_id"].n_unique() == len(rows) == USERS
