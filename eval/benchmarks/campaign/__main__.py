"""Run the campaign and write the results."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from eval.benchmarks.campaign import good
from eval.benchmarks.campaign.surfaces import SURFACES, Case, Content, cases
from eval.benchmarks.campaign.watch import SECONDS, Worker
from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json
from llmrec.machine import commit_hash

_HOWS = {"answered": "answered", "refused": "refused", "traceback": "tracebacks", "hang": "hangs", "death": "deaths"}
_LONG = 200


def main() -> None:
    """Test every malformed input."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.campaign", description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--further", action="store_true", help="keep the counts of other seeds in the file")
    parser.add_argument("--surface", choices=list(SURFACES), action="append", help="run only this; write nothing")
    parser.add_argument("--gib", type=int, default=2, help="limit of address space, in addition to the libraries")
    parser.add_argument("--count", type=int, help="number of inputs per surface")
    parser.add_argument("--show", choices=["unplaced", "answered", "refused", "slow"], action="append", default=[])
    chosen = parser.parse_args()
    begin = time.monotonic()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="llmrec-campaign-") as name:
        bases = write_bases(Path(name) / "bases")
        for surface in chosen.surface or SURFACES:
            results[surface] = _tested(surface, bases, Path(name) / "case", chosen)
            _say(json.dumps({surface: results[surface]}, indent=1))
    if chosen.surface or (chosen.count and not chosen.further):
        return
    state = {
        "date": date.today().isoformat(),
        "commit": commit_hash(),
        "seed": chosen.seed,
        "gib": chosen.gib,
        **_summed(results),
    }
    state["seconds"] = round(time.monotonic() - begin)
    stored = json.loads(chosen.target.read_text(encoding="utf-8")) if chosen.target.is_file() else {}
    if chosen.further:
        write_json(chosen.target, {**stored, "further": {**stored.get("further", {}), str(chosen.seed): state}})
        return
    head = {
        "kind": "campaign",
        "command": "make bench NAME=campaign",
        "what": "malformed inputs of ten surfaces, each handed to what a user calls; how each call ended",
        "cpu_seconds": SECONDS,
        **provenance(),
    }
    # `earlier` has the counts of an older checkout, before the defects were fixed.
    kept = {key: stored[key] for key in ("further", "earlier") if key in stored}
    write_json(chosen.target, {**head, **state, **kept})


def write_bases(bases: Path) -> Path:
    """Create the folders of valid files: configs with a table, a model, an index, and a run."""
    from llmrec.index.table import ItemIndex
    from tests.conftest import make_model

    page = bases / "page"
    page.mkdir(parents=True)
    (page / "events.csv").write_text("".join(f"{line}\n" for line in good.EVENT_LINES), encoding="utf-8")
    (page / "items.csv").write_text("".join(f"{line}\n" for line in good.ITEM_LINES), encoding="utf-8")
    (page / "recipe.yaml").write_text(json.dumps(good.RECIPES[0]), encoding="utf-8")
    (page / "model").symlink_to(make_model(bases / "model" / "model", layers=1))
    codes = {item: tuple(pieces) for item, pieces in good.TOKENS.items()}
    tokens = tuple(sorted({piece for pieces in codes.values() for piece in pieces}))
    (bases / "index").mkdir()
    ItemIndex("external", codes, tokens=tokens, settings={"kind": "tokens", "spare": {}}).save(
        bases / "index" / "index"
    )
    run = bases / "run"
    shutil.copytree(page, run, symlinks=True)
    (run / "page.yaml").write_text(json.dumps(good.RECIPES[0]), encoding="utf-8")
    worker = Worker()
    (outcome,) = worker.warm([{"surface": "make run", "folder": str(run), "arguments": {"overrides": []}}])
    worker.close()
    if outcome["how"] != "answered":
        raise SystemExit(f"cannot create the valid run: {outcome}")
    return bases


def _tested(surface: str, bases: Path, folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Test every input of a surface, and return the counts and the distinct defects with an example each."""
    worker, count = Worker(chosen.gib * 2**30), chosen.count or SURFACES[surface].count

    def put(case: Case, folder: Path) -> dict[str, Any]:
        """Write an input into its folder and return the message for a worker."""
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(bases / case.base, folder, symlinks=True)
        for name, content in case.files.items():
            _write(folder / name, content)
        return {"surface": surface, "folder": str(folder), "arguments": dict(case.arguments)}

    sound = [put(case, folder.with_name(f"sound {n}")) for n, case in enumerate(SURFACES[surface].sound)]
    for request, outcome in zip(sound, worker.warm(sound), strict=True):
        if outcome["how"] != "answered":
            _say(f"{surface}: a sound input is not answered: {request} {outcome}")
            raise SystemExit(1)
    counts: Counter[str] = Counter()
    defects: dict[str, dict[str, Any]] = {}
    for case in cases(surface, SURFACES[surface], bases, chosen.seed, count):
        # The folder of the inputs differs each time.
        outcome = {"at": "", "seconds": 0.0, "says": "", **worker.ask(put(case, folder))}
        how, at, says = outcome["how"], outcome["at"], outcome["says"].replace(str(folder.parent), "")
        counts[how] += 1
        unplaced = how == "refused" and not outcome["placed"]
        counts["unplaced"] += unplaced
        if how in ("traceback", "hang", "death"):
            # A defect is identified by kind and location of the error.
            key = f"{says.split(':')[0]} {at}" if how == "traceback" else f"{how} {case.fault}"
            entry = {"how": how, "says": says[:_LONG], "at": at, "input": case.fault[:_LONG]}
            defects.setdefault(key, {**entry, "times": 0})["times"] += 1
        slow = outcome["seconds"] > SECONDS / 4
        if how in chosen.show or (unplaced and "unplaced" in chosen.show) or (slow and "slow" in chosen.show):
            _say(f"{how} {outcome['seconds']:.1f} s | {case.fault[:90]} | {says[:300]}")
    worker.close()
    return {
        "tried": count,
        **{name: counts[how] for how, name in _HOWS.items()},
        "refused_without_a_place": counts["unplaced"],
        "defects": sorted(defects.values(), key=lambda defect: (-defect["times"], defect["at"], defect["input"])),
    }


def _write(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content in ("loop", "dangling"):
        path.symlink_to(path if content == "loop" else "nowhere")


def _summed(results: dict[str, Any]) -> dict[str, Any]:
    names = ("tried", *_HOWS.values(), "refused_without_a_place")
    return {"all": {name: sum(counts[name] for counts in results.values()) for name in names}, "surfaces": results}


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
