"""Chains of `llmrec run`, `export` and `rank` that are killed with SIGKILL at a named point or after some seconds.

The command that was killed is given again, the others follow, and all that they left is compared with a chain that
nothing disturbed. The processes are forked by `tests.recovery.zygote`.

    python -m tests.recovery.kills build/recovery.json

runs every named point and 20 random ones and writes what came out.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from llmrec.durable import checked
from tests.recovery import points
from tests.recovery import zygote as zygotes
from tests.recovery.points import POINTS, REQUESTS
from tests.recovery.zygote import Child, Ended

SMALL = (
    "eval.fusion={}",
    "data={source: made-reviews, noun: products}",
    "reviews=null",
    "model.dtype=float32",
    "train.steps=6",
    "train.save_every=2",
    "train.batch_tokens=512",
    "train.valid_rows=4",
    "train.valid_every=3",
    "train.lora.top_layers=1",
    "train.lora.dropout=0.1",
    "tasks.sequential.users=null",
    "tasks.rating.users=null",
    "tasks.direct=null",
    "tasks.explanation.users=8",
    "tasks.explanation.max_tokens=4",
    "eval.arms=[zero-shot, tuned]",
    "eval.users=24",
    "eval.batch=8",
    "eval.candidates.count=5",
    "eval.bootstrap=50",
    "eval.backend=hf",
)

RANDOM = 20
STEPS = ("run", "export", "rank")
# Exit codes of commands that did their work: two lines of the ranked file are faulty on purpose.
DONE = {"run": 0, "export": 0, "rank": 1}
FAULTY = (40, 100)


@dataclass(frozen=True)
class Chain:
    """One folder in which a run, its export and a ranking with that export are made."""

    folder: Path

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    @property
    def exported(self) -> Path:
        """The exported folder."""
        return self.folder / "films"

    @property
    def ranked(self) -> Path:
        """The ranked file."""
        return self.folder / "ranked.jsonl"

    def command(self, step: str, model: Path) -> list[str]:
        """Return the words after ``llmrec``."""
        if step == "run":
            recipe = ["recipes/movielens-100k/four-tasks.yaml", f"model.name={model}", *SMALL]
            return ["run", *recipe, "--quiet", "--out", str(self.run)]
        if step == "export":
            return ["export", str(self.run), "--out", str(self.exported), "--with-items", "--check-users", "1"]
        requests = self.folder / "requests.jsonl"
        if not requests.exists():
            requests.write_text(request_lines(), encoding="utf-8")
        options = ["--backend", "hf", "--dtype", "float32", "--batch", "8", "--quiet"]
        return ["rank", "--model", str(self.exported), "--in", str(requests), "--out", str(self.ranked), *options]

    def copy(self, target: Path) -> Chain:
        """Return a chain that goes on from where this one stands."""
        shutil.copytree(self.folder, target, dirs_exist_ok=True)
        return Chain(target)


def request_lines() -> str:
    """Return a file of requests over the catalogue of the made table."""
    from llmrec.data.sets.table import load
    from llmrec.recipe.schema import DataSection

    ids = list(load(DataSection(source="made-reviews"), seed=0).items)
    rows = []
    for n in range(REQUESTS):
        chosen = [ids[(n * 7 + k * (3 + n // len(ids))) % len(ids)] for k in range(8)]
        rows.append(json.dumps({"id": f"r{n}", "history": chosen[:3], "candidates": chosen[3:]}))
    for line in FAULTY:
        rows[line - 1] = rows[line - 1][:-20]
    return "\n".join(rows) + "\n"


# --------------------------------------------------------------------------- the processes


@dataclass(frozen=True)
class Zygote:
    """Starts the commands of chains, each in a process of its own."""

    model: Path
    log: Path
    processes: zygotes.Zygote

    def do(self, chain: Chain, step: str, point: str | None = None, after: float | None = None) -> Ended:
        """Take one step of a chain, with a kill at a point or after some seconds."""
        chain.folder.mkdir(parents=True, exist_ok=True)
        words = chain.command(step, self.model)
        return self.processes.do(Child(words=words, log=str(self.log), point=point, after=after))[0]


@contextlib.contextmanager
def zygote(model: Path, log: Path) -> Iterator[Zygote]:
    """A zygote for the time of a block."""
    with zygotes.zygote() as processes:
        yield Zygote(model, log, processes)


# --------------------------------------------------------------------------- what is compared


def outcome(run: Path) -> dict[str, Any]:
    """Return everything that must be equal after a kill: all of a run but its dates, its seconds and its load."""
    results = checked((run / "results.json").read_bytes())
    for key in ("created", "command", "budget", "seconds"):
        del results[key]
    del results["machine"]["load"]
    training = results["training"]
    for key in ("seconds", "seconds_before", "tokens_per_second"):
        del training[key]
    for line in training["log"]:
        del line["seconds"], line["tokens_per_second"]
    for row in results["rows"]:
        del row["cost"]["seconds"]
    predictions = pl.read_parquet(run / "predictions.parquet")
    steps = [json.loads(line)["step"] for line in (run / "train_log.jsonl").read_text().splitlines()]
    report = sorted(file.name for file in (run / "report").iterdir())
    return {
        "results": results,
        "predictions": predictions.to_dicts(),
        "steps": steps,
        "report": report,
        "drafts": sorted(str(f.relative_to(run)) for f in run.rglob("*.draft")),
    }


def export_outcome(chain: Chain) -> dict[str, Any]:
    """Return the content of an export, and what lies beside it under its name."""
    from llmrec.durable import sha256_of

    told = checked((chain.exported / "llmrec.json").read_bytes())
    files = {file.name: sha256_of(file) for file in chain.exported.iterdir()}
    # These hold a hash over results.json, in which seconds stand: equal only for exports of one and the same run.
    del told["made_from"]
    apart = {name: files.pop(name) for name in ("llmrec.json", "SHA256SUMS")}
    return {"files": files, "told": told, "apart": apart, "beside": sorted(p.name for p in chain.folder.glob("films*"))}


def rank_outcome(chain: Chain) -> dict[str, Any]:
    """Return the content of a ranked file, its summary without times and paths, and what lies beside it."""
    summary = json.loads(chain.ranked.with_name("ranked.jsonl.summary.json").read_text(encoding="utf-8"))
    kept = ("sha256", "lines", "ranked", "failed", "failures", "notes", "prompt_tokens", "completion_tokens")
    return {
        "rows": chain.ranked.read_text(encoding="utf-8").splitlines(),
        "summary": {key: summary[key] for key in kept},
        "beside": sorted(p.name for p in [*chain.folder.glob("ranked*"), *chain.folder.glob(".ranked*")]),
    }


def whole_outcome(chain: Chain) -> dict[str, Any]:
    """Return everything that must be equal after a kill anywhere in a chain."""
    exported = export_outcome(chain)
    del exported["apart"]
    return {"run": outcome(chain.run), "export": exported, "rank": rank_outcome(chain)}


# --------------------------------------------------------------------------- all of it


def _chain(runs: Zygote, chain: Chain, steps: tuple[str, ...] = STEPS) -> list[float]:
    """Take steps that nothing disturbs; return their seconds of processor time."""
    seconds = []
    for step in steps:
        ended = runs.do(chain, step)
        assert ended.status == DONE[step], runs.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        seconds.append(ended.used)
    return seconds


def _kill(
    runs: Zygote, chain: Chain, expected: dict[str, Any], step: str, point: str | None, after: float | None
) -> dict[str, Any]:
    """Kill one step, give its command again, take the steps after it, and compare."""
    before, later = STEPS[: STEPS.index(step)], STEPS[STEPS.index(step) + 1 :]
    _chain(runs, chain, tuple(each for each in before if not _has(chain, each)))
    first = runs.do(chain, step, point, after)
    again = runs.do(chain, step)
    sound = again.status == DONE[step]
    if sound:
        _chain(runs, chain, later)
    row = {
        "kill": point or f"random, in llmrec {step}",
        "killed": first.killed,
        "after_s": round(first.used, 2),
        "equal": sound and whole_outcome(chain) == expected,
    }
    sys.stdout.write(f"{json.dumps(row)}\n")
    sys.stdout.flush()
    return row


def _has(chain: Chain, step: str) -> bool:
    return {"run": chain.run, "export": chain.exported, "rank": chain.ranked}[step].exists()


def _at(seconds: list[float], moment: float) -> tuple[str, float]:
    """Return the step in which a moment of a chain falls, and how long after its start."""
    for step, length in zip(STEPS[:-1], seconds, strict=False):
        if moment < length:
            return step, moment
        moment -= length
    return STEPS[-1], moment


def main(target: Path) -> None:
    """Kill at every named point and at 20 random moments; write what came out."""
    from tests.conftest import make_model

    steps = {**dict.fromkeys(points.RUN, "run"), **dict.fromkeys(points.EXPORT, "export")}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        with zygote(make_model(place / "model"), place / "log") as runs:
            whole = Chain(place / "whole")
            _chain(runs, whole)
            expected = whole_outcome(whole)
            seconds = _chain(runs, Chain(place / "again"))
            rows = []
            for label in POINTS:
                rows.append(_kill(runs, Chain(place / "killed"), expected, steps.get(label, "rank"), label, None))
                shutil.rmtree(place / "killed")
            draw, moments = random.Random(0), 0
            while moments < RANDOM:
                step, after = _at(seconds, draw.uniform(0, sum(seconds)))
                row = _kill(runs, Chain(place / "killed"), expected, step, None, after)
                shutil.rmtree(place / "killed")
                if row["killed"]:  # the step may end before its moment comes
                    moments += 1
                    rows.append(row)
    record = {
        "command": "make bench NAME=recovery",
        "what": "SIGKILL, then the same command and those after it. Compared: adapter sha256, results.json without "
        "times, predictions, log and report of the run; every file of the export; every line of the ranking; leftovers",
        "adapter_sha256": expected["run"]["results"]["training"]["adapter_sha256"],
        "seconds": dict(zip(STEPS, (round(each, 1) for each in seconds), strict=True)),
        "kills": rows,
        "equal": sum(row["equal"] and row["killed"] for row in rows),
        "of": len(rows),
    }
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
