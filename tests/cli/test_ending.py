"""A full disk or a signal ends a command with one paragraph, and the same command resumes."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmrec.cli import main as cli
from llmrec.cli.ending import as_fixable_error
from llmrec.durable import note_written_path
from llmrec.errors import LlmrecError

SMALL = (
    "data={source: made-reviews, noun: products}",
    *("reviews=null", "model.dtype=float32", "train.steps=4", "train.save_every=2", "train.batch_tokens=512"),
    *("train.valid_rows=2", "train.lora.top_layers=1", "tasks.rating.users=null", "tasks.direct=null"),
    *("tasks.sequential=null", "tasks.explanation=null", "eval.users=6", "eval.bootstrap=50", "eval.backend=hf"),
    *("eval.fusion={}", "eval.arms=[tuned]"),
)


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (LlmrecError("no such thing", kind="missing-file"), "no such thing"),
        (OSError(errno.ENOSPC, "No space", "/disk/file"), "No space left on device (/disk/file)"),
        (OSError(errno.EROFS, "read-only"), "Read-only file system"),
        # Error messages of tokenizers, safetensors, polars and torch.
        (Exception("No space left on device (os error 28)"), "No space left on device"),
        (Exception("Error while serializing: IoError(Os { code: 28 }): (os error 28)"), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 3776 vs 3668"), "No space left"),
        (caused(ValueError("could not save"), OSError(errno.ENOSPC, "No space")), "No space left on device"),
        (sqlite3.OperationalError("database or disk is full"), "No space left on device"),
        # The error message of numpy for an array.
        (OSError("12800 requested and 0 written"), "No space left on device"),
    ],
)
def test_fixable_error_is_one_paragraph(error: BaseException, says: str) -> None:
    result = str(as_fixable_error(error))
    assert says in result
    assert "\n" not in result
    assert isinstance(error, LlmrecError) or "run the same command again" in result


def test_error_without_file_names_the_written_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught, note_written_path(tmp_path), note_written_path(tmp_path / "inner"):
        raise RuntimeError("No space left on device (os error 28)")
    result = as_fixable_error(caught.value)
    assert result is not None and result.file == str(tmp_path / "inner") and str(tmp_path / "inner") in str(result)


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), KeyError("x"), OSError(errno.ENOENT, "gone"), Exception("os error 2")]
)
def test_defect_keeps_its_traceback(error: BaseException) -> None:
    assert as_fixable_error(error) is None


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Limit the size of files in bytes: larger writes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["llmrec", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    "size",
    [pytest.param(30_000, marks=pytest.mark.slow), pytest.param((60_000, 250_000), marks=pytest.mark.slow), 250_000],
)
def test_full_disk_is_one_error_and_the_command_resumes(
    size: int | tuple[int, ...],
    llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    words = ["run", "recipes/movielens-100k/four-tasks.yaml", f"model.name={llama_folder}", *SMALL, "-q", "--out"]
    assert command([*words, str(tmp_path / "whole")], monkeypatch) == 0
    capfd.readouterr()
    for limit in size if isinstance(size, tuple) else (size,):
        with limited(limit):
            assert command([*words, str(tmp_path / "full")], monkeypatch) == 2
        output = capfd.readouterr().err
        assert "Traceback" not in output
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "again" in errors[0]
    assert command([*words, str(tmp_path / "full")], monkeypatch) == 0
    figures = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "full")]
    assert figures[0]["training"]["adapter_sha256"] == figures[1]["training"]["adapter_sha256"]
    assert [row["metrics"] for row in figures[0]["rows"]] == [row["metrics"] for row in figures[1]["rows"]]
    assert (tmp_path / "whole").stat().st_mode & 0o777 == 0o700


WAITING = """
import sys, time
from llmrec.cli import main as cli
from pathlib import Path
from llmrec import terminal
from llmrec.progress import Progress
from llmrec.recipe import load
def wait(*_):
    terminal.set_command_folder(Path({folder!r}))
    with Progress("train", 90, unit="steps") as bar:
        bar.reach(37)
        terminal.err().write("ready\\n")
        time.sleep(60)
load.load_recipe = wait
sys.argv = ["llmrec", "-v", {command!r}, "page.yaml"]
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "code", "name", "resumes"), [(signal.SIGINT, 130, "run", True), (signal.SIGTERM, 143, "data", False)]
)
def test_signal_prints_progress_kept_files_and_resume_command(
    number: signal.Signals, code: int, name: str, resumes: bool, tmp_path: Path
) -> None:
    for file in ("checkpoints/checkpoint-25/x", "checkpoints/checkpoint-5/x", "rows/a.json", "rows/b.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    # Tests that a shell starts in the background ignore SIGINT, and child processes inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", WAITING.format(command=name, folder=str(tmp_path))],
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    os.kill(process.pid, number)
    output = process.communicate(timeout=300)[1]
    assert process.returncode == code
    stopped, *next_line = output.strip().splitlines()
    assert stopped.startswith("stopped at train, 37 of 90 steps")
    assert (f"kept in {tmp_path}: training up to step 25, 2 finished rows" in stopped) == resumes
    assert next_line == ([f"the same command resumes: llmrec -v {name} page.yaml"] if resumes else [])


def test_signal_handlers_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert command(["--version"], monkeypatch) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
