"""``make gpu-check``: what has to be seen on a machine with a GPU, check by check, into a JSON file and a page.

Standard library alone: the first check is the set-up itself. What passed is not run again for the same card and commit,
so that the same command goes on after a crash, and after a fix.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.gpu.checks import CHECKS, Check, Failure, Machine, NotRun
from eval.benchmarks.gpu.page import page
from llmrec.durable import read_json, write_json, write_text
from llmrec.setup_env import has_nvidia_gpu

RESULT, PAGE = Path("eval/results/gpu.json"), Path("docs/gpu.md")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; the status is 0 where all passed, 1 where not, and 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.gpu", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these checks alone")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--page", action="store_true", help="write the page from the stored result, and run nothing")
    chosen = parser.parse_args(arguments)
    if chosen.page:
        write_text(PAGE, page(stored(RESULT)))
        return 0
    if not has_nvidia_gpu():
        sys.stderr.write("gpu-check: nvidia-smi lists no GPU here, so nothing was run\n")
        return 2
    machine = Machine(Path.cwd(), Path("runs/gpu-check"))
    checks = [check for check in CHECKS if not chosen.only or check.number in chosen.only]
    found = run(checks, machine, stored(RESULT), again=chosen.again, keep=lambda kept: write_json(RESULT, kept))
    write_text(PAGE, page(found))
    sys.stdout.write(f"results: {RESULT}\npage: {PAGE}\n")
    return int(any(entry["verdict"] == "failed" for entry in found["checks"].values()))


def stored(file: Path) -> dict[str, Any]:
    """Return what was found so far."""
    return read_json(file, "run make gpu-check again") if file.is_file() else {"checks": {}}


def run(
    checks: Sequence[Check],
    machine: Machine,
    before: Mapping[str, Any],
    *,
    again: bool,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run checks, and keep each result as it comes.

    Args:
        checks: Which.
        machine: Where.
        before: What an earlier call found; what passed there under the same stamp is taken over.
        again: Run these too.
        keep: Stores what is found so far.
    """
    stamp = machine.stamp()
    found: dict[str, Any] = {"command": "make gpu-check", "stamp": stamp, "checks": dict(before["checks"])}
    for check in checks:
        old = found["checks"].get(str(check.number), {})
        if old.get("verdict") == "passed" and old.get("stamp") == stamp and not again:
            sys.stdout.write(f"{check.number:2}  {check.name}: passed before\n")
            continue
        sys.stdout.write(f"{check.number:2}  {check.name} ... ")
        sys.stdout.flush()
        entry = one(check, machine) | {"stamp": stamp}
        found["checks"][str(check.number)] = entry
        keep(found)
        sys.stdout.write(f"{entry['verdict']}, {entry['seconds']:.0f} s{entry['said'] and ': ' + entry['said']}\n")
    return found


def one(check: Check, machine: Machine) -> dict[str, Any]:
    """Run one check: its verdict, what it found, seconds, and why it failed."""
    begin, facts, verdict, said = time.monotonic(), {}, "passed", ""
    folder = machine.folder(check)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        facts = check.run(machine, folder)
    except NotRun as reason:
        verdict, said = "not run", str(reason)
    except Failure as reason:
        verdict, said, facts = "failed", str(reason), reason.facts
    except (OSError, ValueError, LookupError) as error:
        verdict, said = "failed", f"{type(error).__name__}: {error}"
    return {"verdict": verdict, "seconds": round(time.monotonic() - begin, 1), "found": facts, "said": said}


if __name__ == "__main__":
    sys.exit(main())
