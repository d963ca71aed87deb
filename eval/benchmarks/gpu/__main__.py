"""``make gpu-check`` runs the checks that need a GPU, and writes their results to a JSON file and a page.

It needs only the standard library, since the first check is the setup. Passed checks are not repeated for the same GPU
and commit, so that the same command continues after a crash or a fix.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.benchmarks.figures.parts import put
from eval.benchmarks.gpu.checks import CHECKS, Check, Failure, Machine, NotRun, faults
from llmrec.durable import read_json, write_json, write_text

PART = "gpu:checks"
RESULT, PAGE, WORK = Path("eval/results/gpu.json"), Path("docs/install.md"), Path("runs/gpu-check")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; return 0 if none failed, 1 if any failed, and 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.gpu", description=__doc__.split("\n", 1)[0])
    names = [check.name for check in CHECKS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help="run only these checks")
    parser.add_argument("--again", action="store_true", help="repeat passed checks")
    parser.add_argument("--on", choices=("gpu", "cpu"), default="gpu", help="cpu: run the code with a tiny model")
    chosen = parser.parse_args(arguments)
    file = RESULT if chosen.on == "gpu" else WORK / "cpu.json"
    gpus = _lines("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if chosen.on == "gpu" and not gpus:
        sys.stderr.write("gpu-check: nvidia-smi lists no GPU here, so nothing was run\n")
        return 2
    machine = Machine(Path.cwd(), Path.cwd() / WORK, len(gpus) if chosen.on == "gpu" else 0)
    if chosen.on == "cpu":
        machine = replace(machine, python=sys.executable, model=machine.work / "tiny")
        machine.work.mkdir(parents=True, exist_ok=True)
        machine.measure(machine.work, "model", "tiny", str(machine.model), "cpu")
    commit = _lines("git", "rev-parse", "--short=12", "HEAD")[:1]
    stamp = f"{gpus[0] if machine.gpus else 'CPU'}, commit {'unknown' if not commit else commit[0]}"
    checks = [check for check in CHECKS if check.name in chosen.only]
    results = run(checks, machine, stored(file), stamp, again=chosen.again, keep=lambda kept: write_json(file, kept))
    if machine.gpus:
        _write(results)
    return int(any(entry["verdict"] == "failed" for entry in results["checks"].values()))


def _lines(*command: str) -> list[str]:
    """Return the lines that a command prints; empty if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def stored(file: Path) -> dict[str, Any]:
    """Return the results so far."""
    return read_json(file, "run make gpu-check again") if file.is_file() else {"checks": {}}


def run(
    checks: Sequence[Check],
    machine: Machine,
    before: Mapping[str, Any],
    stamp: str,
    *,
    again: bool,
    keep: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """Run checks, and store each result immediately.

    Args:
        checks: The checks to run.
        machine: The machine.
        before: The results of an earlier call; passed checks with the same stamp are reused.
        stamp: The GPU and the commit of the results.
        again: Whether to run passed checks again.
        keep: Stores the results so far.
    """
    results: dict[str, Any] = {"command": "make gpu-check", "checks": dict(before["checks"])}
    for check in checks:
        old = results["checks"].get(check.name, {})
        if old.get("verdict") == "passed" and old.get("stamp") == stamp and not again:
            sys.stdout.write(f"{check.name}: passed before\n")
            continue
        sys.stdout.write(f"{check.name} ... ")
        sys.stdout.flush()
        entry = one(check, machine) | {"stamp": stamp}
        results["checks"][check.name] = entry
        keep(results)
        sys.stdout.write(f"{entry['verdict']}, {entry['seconds']:.0f} s{entry['why'] and ': ' + entry['why']}\n")
    return results


def one(check: Check, machine: Machine) -> dict[str, Any]:
    """Run one check, and return its verdict, duration, measurements, and the reason if it did not pass."""
    begin, facts, verdict, why = time.monotonic(), {}, "not run", ""
    folder = machine.work / check.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free / 1e9
    try:
        if not machine.gpus and not check.on_cpu:
            raise NotRun("needs a GPU")
        if 0 < machine.gpus < check.gpus:
            raise NotRun(f"needs {check.gpus} GPUs")
        if machine.gpus and free < check.disk:
            raise NotRun(f"needs {check.disk} GB of free disk, and {free:.0f} GB are free")
        facts = check.measure(replace(machine, ends=begin + 60 * check.minutes), folder)
        why = "; ".join(faults(check.limits, facts))
        verdict = "failed" if why else "passed"
    except NotRun as reason:
        why = str(reason)
    except (Failure, OSError, ValueError, LookupError, TypeError) as error:
        verdict, why = "failed", str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
    return {"verdict": verdict, "seconds": round(time.monotonic() - begin, 1), "measured": facts, "why": why}


def table(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown; without results, a sentence that no GPU has run the checks."""
    entries = results["checks"]
    status = f"0 of {len(CHECKS)} checks have been run: no machine with a GPU has been available."
    if entries:
        passed = sum(entry["verdict"] == "passed" for entry in entries.values())
        stamps = " and ".join(sorted({f"`{entry['stamp']}`" for entry in entries.values()}))
        status = f"{passed} of {len(CHECKS)} passed, on {stamps}."
    rows = ["| Check | What it runs | GPUs | Result |", "|---|---|---:|---|"]
    for check in CHECKS:
        entry = entries.get(check.name, {"verdict": "not run", "seconds": "", "measured": {}, "why": ""})
        measured = f"`{json.dumps(entry['measured'], ensure_ascii=False)}`" if entry["measured"] else ""
        seconds = f"{entry['seconds']:.0f} s" if entry["seconds"] else ""
        result = "; ".join(filter(None, (entry["verdict"], seconds, entry["why"], measured)))
        cells = (check.name, check.title, check.gpus, result)
        rows.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join((status, "", *rows))


def _write(results: Mapping[str, Any]) -> None:
    write_text(PAGE, put(PAGE.read_text(encoding="utf-8"), PART, table(results)))


if __name__ == "__main__":
    sys.exit(main())
