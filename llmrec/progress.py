"""How far a long piece of work is: a bar on a terminal, and elsewhere, as in a log file, lines at growing intervals.

A line comes whether or not the work says anything meanwhile, so that a log shows that a closed solution or a long
epoch still goes on. Lines are those of the logger ``llmrec.progress``, at the level INFO, which the command line shows.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

QUIET = "LLMREC_QUIET"
"""In the environment, so that processes which are started know it too: no bars, and nothing that libraries mention."""

FIRST, MOST, SHARE = 10.0, 600.0, 0.5
"""Seconds up to the first line, seconds between two at most, and what part of the time so far lies between them."""

# What is under way, the innermost last: it alone writes lines.
_open: list[Bar] = []


class Bar:
    """The progress of one piece of work; use it as a context manager, or start and stop it.

    Args:
        name: What is done.
        total: How many steps it has; None: nobody knows, and there is no bar but lines alone.
        unit: What a step is, such as ``epochs``.
        quiet: Show nothing.
        early: It may end before all steps are done, so that what is left is an upper bound.
        passing: One of many: its bar vanishes from the terminal at the end.
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
        # rich takes a tenth of a second to import, which commands that show no bar need not spend.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        quiet = quiet or QUIET in os.environ
        console = Console(stderr=True)
        shown = console.is_terminal or console.is_jupyter
        self._name, self._total, self._unit, self._early = name, total, unit, early
        self._done, self._said = 0, ""
        self._begin, self._wrote = time.monotonic(), False
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left at most" if early else "left"),
            TimeRemainingColumn(),
            console=console,
            transient=passing,
            disable=quiet or not shown or total is None,
        )
        self._task = self._bar.add_task(name, total=total, said=unit)
        self._ticks = not quiet and not shown
        self._ended = threading.Event()
        self._ticker: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._begin = time.monotonic()
        self._bar.start()
        if self._ticks and self._ticker is None:
            _open.append(self)
            self._ended.clear()
            self._ticker = threading.Thread(target=self._tick, name=f"progress of {self._name}", daemon=True)
            self._ticker.start()

    def stop(self, *, failed: bool = False) -> None:
        """End; a last line says how long it took, where there were lines before it."""
        self._bar.stop()
        if self._ticker is None:
            return
        self._ended.set()
        self._ticker.join()
        self._ticker = None
        _open.remove(self)
        if self._wrote and not failed:
            log.info("%s: done%s, %s", self._name, self._count(), span(time.monotonic() - self._begin))

    def advance(self, steps: int = 1, said: str | None = None) -> None:
        """Note that so many more steps are done, and what there is to say of the work."""
        self.reach(self._done + steps, said)

    def reach(self, done: int, said: str | None = None) -> None:
        """Note that so many steps are done in all."""
        self._done = done
        self._said = self._said if said is None else said
        self._bar.update(self._task, completed=done, said=f"{self._unit}  {self._said}".strip())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(failed=error is not None)

    # ------------------------------------------------------------------- lines

    def _tick(self) -> None:
        wait = FIRST
        while not self._ended.wait(wait):
            spent = time.monotonic() - self._begin
            wait = min(MOST, max(FIRST, SHARE * spent))
            if _open and _open[-1] is self:
                self._wrote = True
                log.info("%s:%s%s %s so far%s", self._name, self._count(), self._told(), span(spent), self._left(spent))

    def _count(self) -> str:
        if self._total is None:
            return ""
        return f" {self._done:,} of {self._total:,}{f' {self._unit}' if self._unit else ''}"

    def _told(self) -> str:
        said = f", {self._said}" if self._said else ""
        return f"{said};" if self._total is not None or said else ""

    def _left(self, spent: float) -> str:
        if self._total is None or not 0 < self._done < self._total:
            return ""
        left = span(spent / self._done * (self._total - self._done))
        return f", {left} left at most" if self._early else f", about {left} left"


def span(seconds: float) -> str:
    """Return a time in words, such as ``12 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def note(line: str) -> None:
    """Tell how far a long piece of work is, which has no bar of its own."""
    log.info("%s", line)
