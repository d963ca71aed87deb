"""Progress where there is no terminal: lines at growing intervals, whether or not the work says anything."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmrec import progress
from llmrec.experiment.resume import Budget
from llmrec.progress import Bar, span


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(progress, "FIRST", 0.02)
    caplog.set_level(logging.INFO, logger="llmrec.progress")
    return caplog


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "llmrec.progress"]


def test_lines_say_how_far_it_is_and_what_is_left(quick: pytest.LogCaptureFixture) -> None:
    with Bar("sasrec", 100, unit="epochs", early=True) as bar:
        bar.advance(5, "loss 6.100")
        time.sleep(0.15)
    lines = told(quick)
    assert lines[0].startswith("sasrec: 5 of 100 epochs, loss 6.100; 0 s so far, ") and lines[0].endswith(
        "left at most"
    )
    assert lines[-1] == "sasrec: done 5 of 100 epochs, 0 s"
    # Growing intervals: as much again as half of the time so far.
    assert 3 <= len(lines) <= 7


def test_what_an_earlier_run_did_took_none_of_this_ones_time() -> None:
    bar = Bar("train", 240, unit="steps")
    bar.skip(180)
    assert bar._left(20.0) == ""
    bar.reach(182)
    assert bar._left(16.0) == ", about 8 min left"
    bar.advance(58)
    assert bar._left(500.0) == ""


def test_work_that_says_nothing_shows_that_it_goes_on(quick: pytest.LogCaptureFixture) -> None:
    with Bar("fitting ease", None):
        time.sleep(0.05)
    assert told(quick)[0] == "fitting ease: 0 s so far"


def test_what_is_short_or_quiet_writes_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="llmrec.progress")
    with Bar("short", 3) as bar:
        bar.advance()
    monkeypatch.setattr(progress, "FIRST", 0.001)
    with Bar("quiet", 3, quiet=True), Budget(quiet=True).stage("stage"):
        time.sleep(0.02)
    assert told(caplog) == []


def test_only_the_innermost_speaks_and_failures_are_not_done(quick: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError), Budget().stage("baselines"), Bar("inside", 2):
        time.sleep(0.05)
        raise RuntimeError
    lines = told(quick)
    assert lines and all(line.startswith("inside: 0 of 2;") for line in lines)
    assert not progress._open


def test_times_are_in_words() -> None:
    assert [span(seconds) for seconds in (4.2, 99, 130, 3540, 7200)] == ["4 s", "99 s", "2 min", "59 min", "2.0 h"]


def test_a_log_file_has_lines_before_the_command_ends(tmp_path: Path) -> None:
    code = (
        "import time; from llmrec import progress; progress.FIRST = 0.05\n"
        "from llmrec.commands import common; common._heed({})\n"
        "with progress.Bar('train', 8, unit='steps') as bar:\n"
        "    bar.advance(2, 'loss 1.0'); time.sleep(0.3)\n"
    )
    log = tmp_path / "run.log"
    with log.open("w") as stream:
        subprocess.run([sys.executable, "-c", code], stdout=stream, stderr=stream, check=True, timeout=60)
    lines = log.read_text().splitlines()
    assert lines[0].startswith("train: 2 of 8 steps, loss 1.0; 0 s so far, about") and len(lines) >= 3
