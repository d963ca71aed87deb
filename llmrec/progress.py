"""Progress of long tasks: a bar in a terminal, otherwise lines at growing intervals.

Lines are written even without progress, so that a log shows that a closed-form solution or a long epoch is still
running. They are those of the logger ``llmrec.progress``, at the level INFO, which the command line shows.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from itertools import accumulate
from types import TracebackType
from typing import Any, Self, TextIO

from llmrec import terminal

log = logging.getLogger(__name__)

QUIET = "LLMREC_QUIET"
"""Environment variable, inherited by child processes, that disables bars and messages of libraries."""

FIRST_LINE_SECONDS, MAX_INTERVAL_SECONDS, INTERVAL_SHARE = 10.0, 600.0, 0.5
"""Seconds before the first line, the most seconds between lines, and their interval as a share of the time so far."""

# The running tasks, innermost last; only the innermost task is shown.
_running: list[Progress] = []

# Width of the name and of the bar, in characters.
_NAME_WIDTH, _BAR_WIDTH = 34, 8


class _Screen:
    """The last line of a terminal, in which the innermost running task is shown."""

    def __init__(self) -> None:
        self._live: Any = None
        self._lock = threading.RLock()

    def show(self) -> None:
        """Draw the innermost running task, or nothing if there is none."""
        drawn = [bar for bar in _running if bar._drawn]
        with self._lock:
            if not drawn:
                self._end()
            elif self._live is None:
                self._begin()
            else:
                self._live.refresh()

    def say(self, text: str, stream: TextIO) -> None:
        """Write a line above the bar."""
        with self._lock:
            drawn = self._live is not None
            self._end()
            stream.write(f"{text}\n")
            stream.flush()
            if drawn:
                self._begin()

    def _begin(self) -> None:
        # Importing rich takes 0.1 s, which commands without a bar avoid.
        from rich.console import Console
        from rich.live import Live

        # rich must not redirect output, because libraries print into a log.
        self._live = Live(
            get_renderable=lambda: _running[-1] if _running else "",
            console=Console(file=terminal.err()),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def _end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


_screen = _Screen()


def _can_show_bar() -> bool:
    """Whether a bar can be shown: in a terminal or a notebook."""
    if terminal.err().isatty():
        return True
    if "ipykernel" not in sys.modules:
        return False
    from rich.console import Console

    return Console().is_jupyter


def say(text: str, stream: TextIO) -> None:
    """Write a line to a stream, above the bar if one is shown."""
    _screen.say(text, stream)


def running_tasks() -> list[Progress]:
    """Return the running tasks, innermost last."""
    return list(_running)


class Progress:
    """The progress of a task; use it as a context manager, or call start and stop.

    Args:
        name: Name of the task.
        total: Number of steps; None if unknown, with lines only and no bar.
        unit: Unit of a step, such as ``epochs``.
        quiet: Show nothing.
        early: The task may end before all steps are done, so the remaining time is an upper bound.
        passing: One of many tasks: on a terminal no line reports its end.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        *,
        unit: str = "",
        quiet: bool = False,
        early: bool = False,
        passing: bool = False,
    ) -> None:
        quiet = quiet or QUIET in os.environ
        shown = _can_show_bar()
        self.name, self._total, self._unit, self._early, self._passing = name, total, unit, early, passing
        self._done: float = 0
        self._skipped, self._status = 0, ""
        self._begin, self._wrote = time.monotonic(), False
        self._drawn = shown and not quiet
        self._ticks = not quiet and not shown
        self._ended = threading.Event()
        self._ticker: threading.Thread | None = None

    def start(self) -> None:
        """Start the task."""
        self._begin = time.monotonic()
        if self._drawn and self not in _running:
            _running.append(self)
            _screen.show()
        if self._ticks and self._ticker is None:
            _running.append(self)
            self._ended.clear()
            self._ticker = threading.Thread(target=self._tick, name=f"progress of {self.name}", daemon=True)
            self._ticker.start()

    def stop(self, *, failed: bool = False) -> None:
        """Stop the task, and print its duration if it was long."""
        if self not in _running:
            return
        spent = time.monotonic() - self._begin
        if self._ticker is not None:
            self._ended.set()
            self._ticker.join()
            self._ticker = None
        _running.remove(self)
        if self._drawn:
            _screen.show()
            # The line of the outer task covers nested tasks.
            self._wrote = spent >= FIRST_LINE_SECONDS and not _running and not self._passing
        if self._wrote and not failed:
            log.info("%s: done%s, %s", self.name, self._count(), format_duration(spent))

    def advance(self, steps: int = 1, status: str | None = None) -> None:
        """Add finished steps, and optionally set a status text."""
        self.reach(self._done + steps, status)

    def reach(self, done: float, status: str | None = None) -> None:
        """Set the number of finished steps, which may be a fraction."""
        self._done = done
        self._status = self._status if status is None else status

    def skip(self, steps: int) -> None:
        """Add steps that an earlier run finished, which are excluded from the estimate of time."""
        self._skipped += steps
        self.advance(steps)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(failed=error is not None)

    def reached(self) -> str:
        """Return the number of finished steps as text, such as ``37 of 90 steps``; empty if the total is unknown."""
        return self._count().strip()

    def __rich__(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        spent = time.monotonic() - self._begin
        message = f"{self._count()}{f'  {self._status}' if self._status else ''}".strip()
        row = Table.grid(padding=(0, 1), expand=False)
        row.add_column(no_wrap=True, overflow="ellipsis", max_width=_NAME_WIDTH)
        row.add_column(width=_BAR_WIDTH)
        for _ in range(2):
            row.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(self._total, self._done, width=_BAR_WIDTH, pulse=self._total is None, animation_time=spent)
        row.add_row(
            Text(self.name), bar, Text(message), Text(self._left(spent).removeprefix(", ") or format_duration(spent))
        )
        return row

    # ------------------------------------------------------------------- lines

    def _tick(self) -> None:
        wait = FIRST_LINE_SECONDS
        while not self._ended.wait(wait):
            spent = time.monotonic() - self._begin
            wait = min(MAX_INTERVAL_SECONDS, max(FIRST_LINE_SECONDS, INTERVAL_SHARE * spent))
            if _running and _running[-1] is self:
                self._wrote = True
                log.info(
                    "%s:%s%s %s so far%s",
                    self.name,
                    self._count(),
                    self._state(),
                    format_duration(spent),
                    self._left(spent),
                )

    def _count(self) -> str:
        if self._total is None:
            return ""
        return f" {int(self._done):,} of {self._total:,}{f' {self._unit}' if self._unit else ''}"

    def _state(self) -> str:
        text = f"{',' if self._total is not None else ''} {self._status}" if self._status else ""
        return f"{text};" if self._total is not None or text else ""

    def _left(self, spent: float) -> str:
        if self._total is None or not self._skipped < self._done < self._total:
            return ""
        left = format_duration(spent / (self._done - self._skipped) * (self._total - self._done))
        return f", {left} left at most" if self._early else f", about {left} left"


class BatchProgress(Progress):
    """The progress of batches of requests, updated within each batch.

    Args:
        name: Name of the task.
        sizes: Size of each request, in order, such as its number of candidates.
        batch: Number of requests of a batch.
        prompts: Number of prompts per request, if known.
        unit: Unit of the sizes.
        quiet: Show nothing.
    """

    def __init__(
        self, name: str, sizes: Sequence[int], *, batch: int, prompts: int = 1, unit: str = "", quiet: bool = False
    ) -> None:
        super().__init__(name, sum(sizes), unit=unit, quiet=quiet)
        self._ends = [0, *accumulate(sizes)]
        self._batch, self._prompts = batch, prompts
        self._finished, self._answered = 0, 0.0

    def advance(self, steps: int = 1, status: str | None = None) -> None:
        """Add finished requests."""
        self._finished = min(self._finished + steps, len(self._ends) - 1)
        self._answered = 0.0
        self.reach(self._ends[self._finished], status)

    def restart(self) -> None:
        """Start again from the first request."""
        self._finished, self._answered = 0, 0.0
        self.reach(0)

    def answer(self, prompts: float) -> None:
        """Add answered prompts in the current batch."""
        self._answered += prompts
        end = min(self._finished + self._batch, len(self._ends) - 1)
        share = min(1.0, self._answered / (self._prompts * max(1, end - self._finished)))
        begin = self._ends[self._finished]
        # A strategy may use more prompts than planned.
        self.reach(max(self._done, begin + int(share * (self._ends[end] - begin))))


def count_answers(prompts: float) -> None:
    """Count answered prompts, or fractions of a prompt; called by engines, from any thread."""
    for bar in reversed(_running):
        if isinstance(bar, BatchProgress):
            bar.answer(prompts)
            return


def format_duration(seconds: float) -> str:
    """Return a duration as text, such as ``12 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def ignore_line(line: str) -> None:
    """Discard a line; an alternative to `log_line`."""


def log_line(line: str) -> None:
    """Log the progress of a long task that has no bar."""
    log.info("%s", line)
