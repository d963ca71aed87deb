"""Messages of llmrec go to the terminal; output of libraries, from Python, C or processes, goes to a log."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrec import terminal
from llmrec.terminal import log_warnings_once, logged_warnings, warn_once_logger

NOISE = ("a library's line", "a line of C", "a child's line", "old thing", "another's note")
PROGRAM = """
import logging, os, subprocess, sys, warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from llmrec import terminal
from llmrec.answer.options import OptionHelp
from llmrec.cli.console import say, store_facts
from llmrec.cli.main import build_app, main
from llmrec.errors import EngineFailure, LlmrecError
@dataclass
class Options:
    folder: Annotated[str, OptionHelp(help="")] = ""
    kind: Annotated[str, OptionHelp(help="")] = ""
    silent: Annotated[bool, OptionHelp(help="")] = False
def one(options: Options) -> None:
    folder, kind = options.folder, options.kind
    if not options.silent:
        print("a library's line")
    if folder:
        terminal.set_command_folder(Path(folder))
    if not options.silent:
        os.write(1, b"a line of C\\n")
        subprocess.run(["echo", "a child's line"], check=True)
        warnings.warn("old thing", FutureWarning)
        logging.getLogger("another").warning("another's note")
    logging.getLogger("llmrec.some").warning("own note")
    say("words")
    store_facts(figure=1.5)
    if kind == "full":
        raise OSError(28, "No space left on device", "results.json")
    if kind == "defect":
        raise ValueError("broken")
    if kind == "engine":
        os.write(2, b"Traceback (most recent call last):\\n(Worker) \\x1b[0mValueError: no memory is left\\nabove\\n")
        raise EngineFailure(f"it did not start: {terminal.last_library_error()}", kind="failed")
    if kind:
        raise LlmrecError("it broke", kind=kind)
def serve(options: Options) -> None:
    print("a library's line")
main(build_app({"one": one, "serve": serve}))
"""


def ended(*args: str, command: str = "one") -> subprocess.CompletedProcess[str]:
    # Other tests run commands with -q in this process, which leaves PYTHONWARNINGS set.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    line = [sys.executable, "-c", PROGRAM, command, *args]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_output_of_libraries_is_in_the_log(tmp_path: Path) -> None:
    done = ended("--folder", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "words\n", "own note\n")
    log = tmp_path / terminal.LOG_FILE
    text = log.read_text(encoding="utf-8")
    assert all(line in text for line in NOISE) and "own note" not in text and "words" not in text
    assert log.stat().st_mode & 0o777 == 0o600
    done = ended("--folder", str(tmp_path), "--silent")
    assert done.returncode == 0 and not log.exists(), "where they print nothing there is no log"


@pytest.mark.parametrize(("kind", "code"), [("failed", 2), ("defect", 1)])
def test_failure_shows_last_lines_and_path_of_the_log(tmp_path: Path, kind: str, code: int) -> None:
    done = ended("--folder", str(tmp_path), "--kind", kind)
    assert done.returncode == code
    assert str(tmp_path / terminal.LOG_FILE) in done.stderr and all(line in done.stderr for line in NOISE)
    assert "error: it broke" in done.stderr or "ValueError: broken" in done.stderr


def test_streams_without_a_folder() -> None:
    assert all(line in ended("--kind", "defect").stderr for line in NOISE)
    done = ended("--kind", "unknown-key")
    assert (done.returncode, done.stderr) == (2, "own note\nerror: it broke\n")
    done = ended("--json")
    assert json.loads(done.stdout)["figure"] == 1.5 and done.stderr == "own note\nwords\n"
    assert ended(command="serve").stdout == "a library's line\n"


def test_failed_engine_is_one_line(tmp_path: Path) -> None:
    done = ended("--folder", str(tmp_path), "--kind", "engine")
    assert (done.returncode, done.stderr) == (2, "own note\nerror: it did not start: no memory is left\n")
    assert "Traceback" in (tmp_path / terminal.LOG_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "code", "error"),
    [("full", 2, ("exhausted", "results.json")), ("defect", 1, ("defect", None))],
)
def test_json_of_a_full_disk_and_a_defect(kind: str, code: int, error: tuple[str, str | None]) -> None:
    done = ended("--json", "--kind", kind)
    result = json.loads(done.stdout)["error"]
    assert done.returncode == code and (result["kind"], result["file"]) == error
    assert kind == "full" or (result["message"] == "ValueError: broken" and "Traceback" in done.stderr)


def test_rejects_a_symlinked_log(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "own.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "run" / terminal.LOG_FILE).symlink_to(tmp_path / "own.txt")
    assert ended("--folder", str(tmp_path / "run")).returncode == 0
    assert (tmp_path / "own.txt").read_text(encoding="utf-8") == "mine"


def test_closed_pipe_is_no_error() -> None:
    line = f"{sys.executable} -c '{PROGRAM.replace(chr(39), chr(34))}' one --silent | head -0; echo $?"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr


def test_no_redirection_from_python(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    terminal.set_command_folder(tmp_path)
    assert terminal.out() is sys.stdout and terminal.err() is sys.stderr
    assert terminal.command_folder() == tmp_path and not list(tmp_path.iterdir())


def test_bar_on_a_terminal_vanishes_below_lines() -> None:
    pty = pytest.importorskip("pty")
    code = (
        "import sys, time; from dataclasses import dataclass\n"
        "from llmrec import progress, terminal; from llmrec.cli.main import build_app, main\n"
        "progress.FIRST_LINE_SECONDS = 0.2\n"
        "@dataclass\nclass Options: ...\n"
        "def command(options: Options) -> None: ...\n"
        "sys.argv = ['llmrec']\n"
        "try:\n    main(build_app({'command': command}))\nexcept SystemExit:\n    pass\n"
        "with progress.Progress('baselines', None), progress.Progress('train', 8, unit='steps') as bar:\n"
        "    bar.advance(2, 'loss 1.0'); progress.say('a line', terminal.err()); time.sleep(0.3)\n"
    )
    parent, child = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=child, stdout=child, env={**os.environ, "NO_COLOR": "1"}
    ):
        os.close(child)
        text = b""
        try:
            while part := os.read(parent, 4096):
                text += part
        except OSError:
            pass
    os.close(parent)
    output = text.decode()
    assert "2 of 8 steps  loss 1.0" in output and "a line\r\n" in output
    assert "baselines: done, " in output and "train: done" not in output and "\x1b[3" not in output


def test_warning_is_printed_once_in_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").touch()
    log = warn_once_logger("llmrec.test_once")

    def messages() -> list[str]:
        for name in ("t.csv", str(tmp_path / "t.csv"), "t.csv"):
            log.warning("%s has %d rows", name, 3)
        log.warning("%s has %d rows", "t.csv", 4)
        log.info("done")
        result = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return result

    with caplog.at_level(logging.INFO, "llmrec.test_once"):
        assert len(messages()) == 5
        with log_warnings_once():
            assert messages() == ["t.csv has 3 rows", "t.csv has 4 rows", "done"]
            with log_warnings_once():
                assert messages() == ["done"]
            known = logged_warnings()
        assert len(messages()) == 5
        # As in a process that the command starts.
        with log_warnings_once(known):
            assert messages() == ["done"]
