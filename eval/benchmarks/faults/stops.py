"""Cases with an interrupted or concurrent command: kills, full disks, second processes."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from eval.benchmarks.faults.works import WORKS, Bench, Work

KILLS = 20
"""Number of cases per command."""
CHAIN = 2
"""Number of kills of a command before it may finish."""
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Disk sizes, as shares of a command's output."""
DELAYS = (0.0, 0.25, 0.5, 0.75)
"""Start times of a second process, as shares of the duration of one."""
_ROOM = "256m"


class Asked(Protocol):
    """Runs a case, and returns what is wrong, empty for a passed case, and facts."""

    def __call__(self, bench: Bench) -> tuple[str, dict[str, Any]]:
        """Run the case."""
        ...


@dataclass(frozen=True)
class Case:
    """A case with its part and name; ``tags`` are facts for the table."""

    part: str
    name: str
    made: Asked
    tags: dict[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------------------- kills


def kills(seed: int) -> Iterator[Case]:
    """Kill each command at random times, and let it resume."""
    for place in range(KILLS // CHAIN):
        for work in WORKS.values():
            yield Case("kills", f"{work.name} {place}", _Kill(work, f"{seed} {work.name} {place}"), {"of": work.name})


@dataclass(frozen=True)
class _Kill:
    work: Work
    seed: str

    def __call__(self, bench: Bench) -> tuple[str, dict[str, Any]]:
        draw, folder = random.Random(self.seed), bench.folder(self.work)
        moments: list[float] = []
        whole = bench.seconds[self.work.name]
        for _ in range(4 * CHAIN):
            if len(moments) == CHAIN:
                break
            after = draw.uniform(0, whole)
            told = bench.do(self.work, folder, after=after)
            if told.ended.killed:
                moments.append(round(after, 3))
            elif told.ended.status != self.work.done:
                return f"between kills it ended with {told.ended.status}: {told.text[-200:]}", {"kills": len(moments)}
        return bench.finished(self.work, folder), {"kills": len(moments), "moments": moments}


# --------------------------------------------------------------------------- full disks


def full(seed: int) -> Iterator[Case]:
    """Fill the disk at five sizes."""
    for share in SHARES:
        for work in WORKS.values():
            yield Case("full disk", f"{work.name} {share}", _Full(work, share), {"of": work.name})


@dataclass(frozen=True)
class _Full:
    work: Work
    share: float

    def __call__(self, bench: Bench) -> tuple[str, dict[str, Any]]:
        made = _peak(bench, self.work)
        size = max(int(made * self.share), 4096)
        with small(bench.place / "disk") as disk:
            how: dict[str, Any] = {}
            if disk is None:
                folder, how = bench.folder(self.work), {"fsize": size}
            else:
                folder = disk
                bench.fill(folder, self.work)
                _resize(folder, str(_used(folder) + size))
            told = bench.do(self.work, folder, **how)
            facts = {"bytes": size, "means": "tmpfs" if disk else "limit of a file", "ended": told.ended.status}
            if told.ended.status == self.work.done:
                return "the disk was not full", facts
            if wrong := told.refused(folder) or _without_mend(told.errors):
                return wrong, {**facts, "said": told.errors[:1]}
            if disk is not None:
                _resize(folder, _ROOM)
            return bench.finished(self.work, folder), {**facts, "said": told.errors[0]}


def _without_mend(errors: list[str]) -> str:
    """Return a fault if an error message does not say what to do; else an empty text."""
    return "" if any(fix in errors[0] for fix in ("again", "make room", "free disk")) else f"no mend: {errors[0]}"


def _peak(bench: Bench, work: Work) -> int:
    """Return the size of a command's output in bytes, in whole memory pages."""
    left = [bench.whole / name for name in {"suite": ("suite", "results")}.get(work.name, (work.makes,))]
    files = [path for each in left for path in ([each] if each.is_file() else each.rglob("*")) if path.is_file()]
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files)


def _used(folder: Path) -> int:
    usage = shutil.disk_usage(folder)
    return usage.used


@contextlib.contextmanager
def small(folder: Path) -> Iterator[Path | None]:
    """Mount an in-memory file system for a block; None if this user cannot mount."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={_ROOM}", "llmrec-faults", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _resize(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def read_only(folder: Path) -> None:
    """Remount a file system of `small` read-only."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


# --------------------------------------------------------------------------- two processes


def two(seed: int) -> Iterator[Case]:
    """Run one command twice at once."""
    for share in DELAYS:
        for work in WORKS.values():
            yield Case("two processes", f"{work.name} {share}", _Two(work, share), {"of": work.name})


@dataclass(frozen=True)
class _Two:
    work: Work
    share: float

    def __call__(self, bench: Bench) -> tuple[str, dict[str, Any]]:
        folder = bench.folder(self.work)
        words = self.work.words(folder, bench.model)
        delay = self.share * bench.seconds[self.work.name]
        both = bench.together([words, words], [{}, {"delay": delay}])
        ended = [told.ended.status for told in both]
        for told in both:
            if told.ended.status != self.work.done and (wrong := told.refused(folder)):
                return wrong, {"ended": ended}
        if self.work.done not in ended:
            return "neither did the work", {"ended": ended}
        facts = {"ended": ended, "refused": sum(status != self.work.done for status in ended)}
        return bench.different(self.work, folder), facts
