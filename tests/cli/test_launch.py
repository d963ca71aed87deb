"""`llmrec train --launch` with real processes: one result, one error, and a message if a process is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.recovery.kills import SMALL
from tests.spawned import llmrec

pytestmark = pytest.mark.slow


def started(model: str, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start training in two processes."""
    words = ["train", "recipes/movielens-100k/four-tasks.yaml", *SMALL, f"model.name={model}", *more, "--launch", "2"]
    return llmrec(*words, "--out", str(out))


def test_two_processes_answer_once_and_go_on_after_one_was_killed(llama_folder: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "run" / "train_log.jsonl"
    killed = started(str(llama_folder), out)
    while not (log.is_file() and len(log.read_text(encoding="utf-8").splitlines()) > 3):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    (second,) = (each for each in psutil.Process(killed.pid).children() if each.environ().get("RANK") == "1")
    second.send_signal(signal.SIGKILL)
    _, stderr = killed.communicate(timeout=300)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert killed.returncode == 2
    assert "process 1 of 2 was stopped by SIGKILL" in errors[-1]
    assert "Traceback" not in stderr
    assert len(errors) <= 2
    assert not (out / "train.json").exists()
    resumed = started(str(llama_folder), out, "--json")
    stdout, stderr = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, stderr
    training = json.loads(stdout)["training"]
    assert (training["processes"], training["distributed"], training["steps"]) == (2, "MULTI_CPU", 6)
    assert "training: 2 processes, MULTI_CPU (gloo)" in stderr


def test_what_is_wrong_is_said_once(tmp_path: Path) -> None:
    wrong = started(str(tmp_path / "nowhere"), tmp_path / "run")
    stdout, stderr = wrong.communicate(timeout=300)
    assert wrong.returncode == 2
    assert stdout == ""
    lines = [line for line in stderr.splitlines() if not line.startswith(("data:", "model:"))]
    assert len(lines) == 1, stderr
    assert "nowhere does not exist" in lines[0]
