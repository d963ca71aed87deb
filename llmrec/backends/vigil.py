"""Tells an engine that is dead or hangs from one that is slow, by what its processes do; reads no clock itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil

# A process that waits for work wakes up now and then, for about one hundredth of the time; one that computes uses
# whole cores. One that gets no core on a crowded machine, or that waits for its disk, shows in its state instead.
IDLE_SHARE = 0.05
ENDED = frozenset({"gone", psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD})
_WAITING = frozenset({psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When an engine is given up, in seconds."""

    poll: float = 1.0
    # No processor time and no finished step: nothing that an engine does takes that long without either.
    quiet: float = 20.0
    # Busy, yet no finished step: one step of a large model on few cores takes minutes, an endless loop takes for ever.
    step: float = 15 * 60.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One process at one look."""

    pid: int
    name: str
    state: str
    cpu: float
    vital: bool = True


@dataclass(frozen=True)
class _Sample:
    at: float
    cpu: dict[int, float]
    waiting: bool


class Vigil:
    """Judges a row of looks at an engine's processes; knows nothing of vLLM and reads no clock.

    Args:
        limits: When to give up.
        now: Seconds on a monotonic clock.
    """

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._steps = 0
        self._last = self._stepped = now
        self._stopped: dict[int, float] = {}
        self._samples: deque[_Sample] = deque()

    def judge(self, now: float, seen: Sequence[Seen], steps: int) -> str | None:
        """Return what is wrong, or None.

        Args:
            now: Seconds on the same clock.
            seen: The engine's processes; those that are not vital leave the list once they ended.
            steps: Engine steps finished so far.
        """
        if now - self._last > 5 * self._limits.poll:
            # This process itself did not run (Ctrl-Z, a paused machine): what it missed cannot be judged.
            self._restart(now)
        self._last = now
        if steps != self._steps:
            self._steps, self._stepped = steps, now
            self._samples.clear()
        self._samples.append(_Sample(now, {s.pid: s.cpu for s in seen}, any(s.state in _WAITING for s in seen)))
        return self._ended(seen) or self._halted(now, seen) or self._quiet(now, seen) or self._endless(now)

    def _restart(self, now: float) -> None:
        self._stepped = now
        self._stopped.clear()
        self._samples.clear()

    def _ended(self, seen: Iterable[Seen]) -> str | None:
        ended = [s for s in seen if s.vital and s.state in ENDED]
        return f"died: {named(ended)} ended" if ended else None

    def _halted(self, now: float, seen: Iterable[Seen]) -> str | None:
        halted = [s for s in seen if s.vital and s.state == psutil.STATUS_STOPPED]
        self._stopped = {s.pid: self._stopped.get(s.pid, now) for s in halted}
        long = [s for s in halted if now - self._stopped[s.pid] >= self._limits.quiet]
        return f"hangs: {named(long)} has been stopped for {self._limits.quiet:.0f} s" if long else None

    def _quiet(self, now: float, seen: Iterable[Seen]) -> str | None:
        samples, limit = self._samples, self._limits.quiet
        while len(samples) > 1 and samples[1].at <= now - limit:
            samples.popleft()
        span = now - samples[0].at
        if span < limit:
            return None
        used = max((cpu - samples[0].cpu.get(pid, 0.0) for pid, cpu in samples[-1].cpu.items()), default=0.0)
        if used >= IDLE_SHARE * span or 2 * sum(sample.waiting for sample in samples) >= len(samples):
            return None
        return f"hangs: {named(s for s in seen if s.vital)} did no work and finished no step for {limit:.0f} s"

    def _endless(self, now: float) -> str | None:
        if now - self._stepped < self._limits.step:
            return None
        return f"hangs: it is busy, but finished no step for {self._limits.step / 60:.0f} minutes"


def named(seen: Iterable[Seen]) -> str:
    """Return processes as an error message names them."""
    return ", ".join(f"{s.name} (process {s.pid})" for s in seen) or "the engine"
