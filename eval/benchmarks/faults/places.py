"""Cases with unusual locations: links into another user's folder, hard links, and read-only folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks.faults.stops import Case, read_only, small
from eval.benchmarks.faults.works import WORKS, Bench, Work, digests, names

# The outputs of a command in its folder, and those that are links to foreign files.
_LINKED: dict[str, tuple[str, ...]] = {
    "run": (
        *("", ".lock", "results.json", "predictions.parquet", "answers.sqlite", "train.json", "rows", "checkpoints"),
        *("merged", "adapter", "report", "candidates", "recipe.yaml"),
    ),
    "suite": ("", ".lock", "rows"),
    "export": ("",),
    "rank": ("", ".parts", ".summary.json"),
    "augment": ("", "current", ".lock"),
}


# --------------------------------------------------------------------------- links


def links(seed: int) -> Iterator[Case]:
    """Replace outputs of a command by links, before it starts and after it has ended."""
    for name, linked in _LINKED.items():
        for inner in linked:
            for begun in (False, True):
                state = "of a finished" if begun else "before"
                yield Case("links", f"{state} {name}: {inner or 'all'}", _Link(WORKS[name], inner, begun), {"of": name})
    for name in ("run", "suite", "rank"):
        yield Case("links", f"hard links, {name}", _Hard(WORKS[name]), {"of": name})


@dataclass(frozen=True)
class _Link:
    """A symbolic link: rejected, or followed to the user's target; foreign files must not change."""

    work: Work
    inner: str
    begun: bool

    def __call__(self, bench: Bench) -> tuple[str, dict[str, Any]]:
        work = self.work
        folder = bench.folder(work, *([work.makes] if self.begun else []))
        if self.begun and work.name == "rank":
            shutil.copy2(bench.whole / "ranked.jsonl.summary.json", folder / "ranked.jsonl.summary.json")
        foreign = folder / "somebody"
        foreign.mkdir()
        path = _inside(folder, work, self.inner)
        target = foreign / (path.name or "all")
        if os.path.lexists(path):
            shutil.move(path, target)
        elif path.suffix or path.name in (".lock", "current"):
            target.write_text("somebody's own\n", encoding="utf-8")
        else:
            target.mkdir()
            (target / "kept.txt").write_text("somebody's own\n", encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
        before = digests(foreign)
        told = bench.do(work, folder)
        after = digests(foreign)
        facts: dict[str, Any] = {"ended": told.ended.status, "said": told.errors[:1]}
        lost = [name for name in before if after.get(name) != before[name]]
        if told.ended.status != work.done:
            wrong = told.refused(path, folder / work.makes)
            return wrong or (f"somebody's files were changed: {lost[:3]}" if lost or after != before else ""), facts
        if told.traceback:
            return "traceback", facts
        # If the folder itself is a link, the earlier outputs of the command in it are its own.
        if (lost and (self.inner or not self.begun)) or (self.inner and len(after) != len(before)):
            return f"somebody's files were changed: {lost[:3]}", facts
        return bench.different(work, folder) if not self.inner and self.begun else "", facts


def _inside(folder: Path, work: Work, inner: str) -> Path:
    made = folder / work.makes
    if not inner:
        return made
    return made.with_name(made.name + inner) if work.name == "rank" else made / inner


@dataclass(frozen=True)
class _Hard:
    """A copy with hard links, as in backups: changes in one must not affect the other."""

    work: Work

    def __call__(self, bench: Bench) -> tuple[str, dict[str, Any]]:
        work = self.work
        folder = bench.folder(work)
        told = bench.do(work, folder, after=bench.seconds[work.name] * 0.6)
        copy = folder / "backup"
        copy.mkdir()
        for name in names(folder):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / name, copy / name)
        before = digests(copy)
        wrong = bench.finished(work, folder)
        after = digests(copy)
        changed = [name for name in before if after.get(name) != before[name]]
        facts = {"killed": told.ended.killed, "files": len(before)}
        return wrong or (f"the copy was changed: {changed[:4]}" if changed else ""), facts


# --------------------------------------------------------------------------- read-only folders


def readonly(seed: int) -> Iterator[Case]:
    """Let a command write, or only read, in a read-only folder."""
    for work in WORKS.values():
        for begun in (False, True):
            state = "finished, " if begun else ""
            yield Case("read-only", f"{state}{work.name}", _ReadOnly(work, begun), {"of": work.name})
    for reader in ("audit", "report", "export", "rank a run", "rank an export"):
        yield Case("read-only", f"{reader}, from there", _Reader(reader), {"of": reader})


@dataclass(frozen=True)
class _ReadOnly:
    work: Work
    begun: bool

    def __call__(self, bench: Bench) -> tuple[str, dict[str, Any]]:
        work = self.work
        with small(bench.place / "disk") as disk:
            if disk is None:
                return "not asked: this user may mount nothing", {}
            bench.fill(disk, work, *([work.makes] if self.begun else []))
            if self.begun and work.name == "rank":
                shutil.copy2(bench.whole / "ranked.jsonl.summary.json", disk / "ranked.jsonl.summary.json")
            before = digests(disk)
            read_only(disk)
            told = bench.do(work, disk)
            facts: dict[str, Any] = {"ended": told.ended.status, "said": told.errors[:1]}
            if digests(disk) != before:
                return "something was changed", facts
            # A finished run may report that it is finished.
            done = self.begun and told.ended.status == work.done and not told.traceback
            return ("" if done else told.refused(disk)), facts


@dataclass(frozen=True)
class _Reader:
    name: str

    def __call__(self, bench: Bench) -> tuple[str, dict[str, Any]]:
        elsewhere = bench.folder(WORKS["rank"])
        with small(bench.place / "disk") as disk:
            if disk is None:
                return "not asked: this user may mount nothing", {}
            bench.fill(disk, WORKS["export"], "films")
            before = digests(disk)
            read_only(disk)
            run, out = str(disk / "run"), str(elsewhere / "out")
            ranked = [*WORKS["rank"].words(elsewhere, bench.model)[3:]]
            words = {
                "audit": ["audit", run],
                "report": ["report", run],
                "export": ["export", run, "--out", out, "--with-items", "--check-users", "1"],
                "rank a run": ["rank", "--model", run, *ranked],
                "rank an export": ["rank", "--model", str(disk / "films"), *ranked],
            }[self.name]
            told = bench.call(words)
            facts: dict[str, Any] = {"ended": told.ended.status, "said": told.errors[:1]}
            if digests(disk) != before:
                return "something was changed", facts
            if self.name == "report":
                return told.refused(disk), facts
            well = told.ended.status == (1 if self.name.startswith("rank") else 0) and not told.traceback
            return ("" if well else f"it does not read: {told.text[-300:]}"), facts
