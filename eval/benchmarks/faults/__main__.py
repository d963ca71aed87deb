"""Run the cases and write the results."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

from eval.benchmarks.faults import damage, places, stops
from eval.benchmarks.faults.stops import Case
from eval.benchmarks.faults.works import Bench
from eval.benchmarks.faults.zygote import zygote
from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json

PARTS = {
    "kills": stops.kills,
    "full disk": stops.full,
    "damage": damage.damage,
    "links": places.links,
    "two processes": stops.two,
    "read-only": places.readonly,
}


_Known = dict[tuple[str, str], dict[str, Any]]


def main() -> None:
    """Run every case that is not yet in the log, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.faults", description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/faults"), help="folder for the cases and their log")
    parser.add_argument("--cases", type=int, help="number of cases per part; nothing is written")
    parser.add_argument("--part", choices=list(PARTS), action="append", help="this alone")
    parser.add_argument("--only", help="run only cases that match this regular expression")
    parser.add_argument("--first", default="$^", help="run cases that match this regular expression first")
    parser.add_argument("--minutes", type=float, help="start no case after this time; 0: only write the table")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    os.environ.setdefault("LLMREC_FITS", "off")
    place = chosen.work.resolve()
    place.mkdir(parents=True, exist_ok=True)
    log = place / "cases.jsonl"
    trial = bool(chosen.cases)
    known: _Known = {} if trial else _read(log)
    planned = _planned(chosen.part or list(PARTS), chosen.seed, chosen.cases, chosen.only or "")
    todo = [case for case in planned if (case.part, case.name) not in known] if chosen.minutes != 0 else []
    todo.sort(key=lambda case: not re.search(chosen.first, case.name))
    if todo:
        with zygote() as processes:
            _all(todo, Bench(place, processes), known, None if trial else log, chosen.minutes)
        shutil.rmtree(place / "case", ignore_errors=True)
    if not trial:
        write_json(chosen.target, _record(list(known.values()), _planned(list(PARTS), chosen.seed, None, ""), chosen))


def _all(todo: Sequence[Case], bench: Bench, known: _Known, log: Path | None, minutes: float | None) -> None:
    """Run cases until all are done or the time is over, and add each to the log."""
    begin = time.monotonic()
    for case in todo:
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            return
        found = _made(case, bench)
        sys.stdout.write(f"{json.dumps(found)}\n")
        sys.stdout.flush()
        if log is not None:
            with log.open("a", encoding="utf-8") as stream:
                stream.write(f"{json.dumps(found)}\n")
            known[case.part, case.name] = found


def _made(case: Case, bench: Bench) -> dict[str, Any]:
    begin = time.monotonic()
    wrong, facts = case.made(bench)
    told = {"part": case.part, "case": case.name, **case.tags, "wrong": wrong, **facts}
    # The paths of the folders are irrelevant.
    text = json.dumps(told).replace(str(bench.place), "")
    return {**json.loads(text), "seconds": round(time.monotonic() - begin, 1)}


def _planned(parts: Sequence[str], seed: int, most: int | None, only: str) -> list[Case]:
    """Return the cases of all parts, interleaved, so that an interrupted run has some of each."""
    cases = []
    for part in parts:
        own = list(islice((case for case in PARTS[part](seed) if re.search(only, case.name)), most))
        cases += [(place / len(own), case) for place, case in enumerate(own)]
    return [case for _, case in sorted(cases, key=lambda each: each[0])]


def _read(log: Path) -> _Known:
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    found = [json.loads(line) for line in lines]
    return {(each["part"], each["case"]): each for each in found}


def _record(found: Sequence[Mapping[str, Any]], planned: Sequence[Case], chosen: argparse.Namespace) -> dict[str, Any]:
    cases = {(case.part, case.name) for case in planned}
    kept = [each for each in found if (each["part"], each["case"]) in cases]
    parts = {}
    for part in PARTS:
        own = [each for each in kept if each["part"] == part]
        of = dict.fromkeys(case.tags["of"] for case in planned if case.part == part)
        parts[part] = {
            **_counts(own, [case for case in planned if case.part == part]),
            "of": {
                name: _counts(
                    [each for each in own if each["of"] == name],
                    [case for case in planned if case.part == part and case.tags["of"] == name],
                )
                for name in of
            },
        }
    return {
        "kind": "faults",
        "command": "make bench NAME=faults",
        "what": "SIGKILL, a full disk, damaged files, links, a second process and read-only folders; then the same "
        "command, and all that it left compared with what a process left that nothing disturbed",
        "date": date.today().isoformat(),
        "seed": chosen.seed,
        **provenance(),
        "all": _counts(kept, planned),
        "parts": parts,
        "wrong": [each for each in kept if each["wrong"]],
        "seconds": round(sum(each["seconds"] for each in kept)),
    }


def _counts(found: Sequence[Mapping[str, Any]], planned: Sequence[Case]) -> dict[str, int]:
    told = {
        "planned": len(planned),
        "tried": len(found),
        "held": sum(not each["wrong"] for each in found),
        "kills": sum(each.get("kills", 0) for each in found),
        "refused": sum(_refused(each) for each in found),
        "made_again": sum(each.get("became") == "made again" for each in found),
        "silent": sum(each["wrong"].startswith("silent") for each in found),
    }
    return {name: count for name, count in told.items() if count or name in ("planned", "tried", "held")}


def _refused(each: Mapping[str, Any]) -> bool:
    return each.get("became") == "refused" or each.get("ended") == 2 or bool(each.get("refused"))


if __name__ == "__main__":
    main()
