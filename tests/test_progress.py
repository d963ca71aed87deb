"""Progress without a terminal: lines at growing intervals, whether or not the work reports anything."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmrec import progress
from llmrec.pipeline.resume import StageTimer
from llmrec.progress import BatchProgress, Progress, count_answers, format_duration


class Clock:
    """A clock that advances only when code waits, until its work ends."""

    def __init__(self, ends: float) -> None:
        self.now, self._ends = 0.0, ends

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the work; see `threading.Event.wait`."""
        if self.now + seconds > self._ends:
            self.now = self._ends
            return True
        self.now += seconds
        return False

    def clear(self) -> None:
        """Begin."""

    def set(self) -> None:
        """End."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    """The clock of work that takes a hundred seconds."""
    caplog.set_level(logging.INFO, logger="llmrec.progress")
    clock = Clock(100.0)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def timed(bar: Progress, clock: Clock) -> Progress:
    """Return a bar that uses a clock."""
    bar._ended = clock  # type: ignore[assignment]
    return bar


def waited(bar: Progress) -> None:
    """Run a bar until its work ends."""
    with bar:
        assert bar._ticker is not None
        bar._ticker.join()


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "llmrec.progress"]


def test_lines_have_progress_and_remaining_time(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    bar = timed(Progress("sasrec", 100, unit="epochs", early=True), clock)
    bar.advance(5, "loss 6.100")
    waited(bar)
    lines = messages(caplog)
    assert lines[0] == "sasrec: 5 of 100 epochs, loss 6.100; 10 s so far, 3 min left at most"
    assert lines[-1] == "sasrec: done 5 of 100 epochs, 2 min"
    # Intervals grow: half of the elapsed time, but at least 10 s.
    times = [line.partition("; ")[2].partition(" so far")[0] for line in lines[:-1]]
    assert times == ["10 s", "20 s", "30 s", "45 s", "68 s"]


def test_remaining_time_ignores_skipped_steps() -> None:
    bar = Progress("train", 240, unit="steps")
    bar.skip(180)
    assert bar._left(20.0) == ""
    bar.reach(182)
    assert bar._left(16.0) == ", about 8 min left"
    bar.advance(58)
    assert bar._left(500.0) == ""
    assert [format_duration(seconds) for seconds in (4.2, 99, 130, 3540, 7200)] == [
        "4 s",
        "99 s",
        "2 min",
        "59 min",
        "2.0 h",
    ]


def test_silent_work_has_lines(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    waited(timed(Progress("fitting ease", None), clock))
    assert messages(caplog)[0] == "fitting ease: 10 s so far"


def test_short_or_quiet_work_has_no_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, logger="llmrec.progress")
    with Progress("short", 3) as bar:
        bar.advance()
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", 0.001)
    with Progress("quiet", 3, quiet=True), StageTimer(quiet=True).stage("stage"):
        time.sleep(0.02)
    assert messages(caplog) == []


def test_only_the_innermost_bar_writes(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    outside, inside = (timed(Progress(name, 2), clock) for name in ("outside", "inside"))
    with pytest.raises(RuntimeError), inside:
        progress._running.insert(0, outside)
        assert inside._ticker is not None
        inside._ticker.join()
        clock.now = 0.0
        outside._tick()
        progress._running.remove(outside)
        raise RuntimeError
    lines = messages(caplog)
    assert lines and all(line.startswith("inside: 0 of 2;") for line in lines)
    assert not progress._running


def test_log_file_has_lines_before_the_end(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from llmrec import progress; progress.FIRST_LINE_SECONDS = 0.05\n"
        "from llmrec.cli.main import _apply_shared_options; _apply_shared_options({})\n"
        "log, bar = Path(sys.argv[1]), progress.Progress('train', 8, unit='steps')\n"
        "bar.advance(2, 'loss 1.0')\n"
        "with bar:\n"
        "    while len(log.read_text().splitlines()) < 3: time.sleep(0.01)\n"
    )
    log = tmp_path / "run.log"
    with log.open("w") as stream:
        command = [sys.executable, "-c", code, str(log)]
        subprocess.run(command, stdout=stream, stderr=stream, check=True, timeout=600)
    lines = log.read_text().splitlines()
    assert re.match(r"train: 2 of 8 steps, loss 1.0; \d+ s so far, about", lines[0]) and len(lines) >= 3


class Watched(BatchProgress):
    """Records the counts that it reached."""

    def reach(self, done: int, note: str | None = None) -> None:
        super().reach(done, note)
        self.counts = [*getattr(self, "counts", []), done]


def test_bar_advances_within_a_batch() -> None:
    with Watched("likelihood", [20, 20, 30, 30, 10], batch=2, unit="candidates") as bar:
        for _ in range(2):
            count_answers(0.5)
        count_answers(1)
        bar.advance(2)
        count_answers(1)
        # More answers than expected, and a last batch that is not full.
        for _ in range(2):
            count_answers(2)
        bar.advance(2)
        count_answers(1)
        bar.advance()
    assert bar.counts == [10, 20, 40, 40, 70, 100, 100, 100, 110, 110]
    assert bar.reached() == "110 of 110 candidates"


def test_several_prompts_of_a_question_count_once() -> None:
    with Progress("reading", 3) as plain:
        count_answers(1)
    assert plain.reached() == "0 of 3"
    with Watched("pairwise", [3] * 4, batch=4, prompts=6) as bar:
        for _ in range(4):
            count_answers(6)
        assert bar.counts == [3, 6, 9, 12]
        bar.restart()
        count_answers(12)
    assert bar.counts[-2:] == [0, 6]


def test_transformers_backend_reports_progress(llama_folder: Path) -> None:
    """One call scores a whole batch of requests, which took nine minutes without any progress output."""
    pytest.importorskip("torch", reason="the train extra is not installed")
    from llmrec.backends.encode import Encoder
    from llmrec.backends.hf.backend import HFBackend
    from llmrec.models.load import load_model, load_tokenizer
    from llmrec.recipe.schema import ModelSection
    from llmrec.types import Message, Prompt, Segment

    section = ModelSection(name=str(llama_folder), dtype="float32")
    encoder = Encoder(load_tokenizer(section.name, section), max_length=200)
    backend = HFBackend(load_model(section.name, section), encoder)
    prompts = [Prompt(messages=(Message(role="user", segments=(Segment("text", f"film {n}"),)),)) for n in range(4)]
    with Watched("likelihood", [2] * 4, batch=4) as bar:
        backend.score(prompts, [["Heat", "Fargo"]] * 4)
        assert bar.counts == [2, 4, 6, 8]
        bar.restart()
        backend.generate(prompts, max_tokens=4)
    assert bar.counts[4:6] == [0, 2] and bar.counts[-1] == 8
