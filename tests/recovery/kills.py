"""Chains of `llmrec run`, `export` and `rank` in processes forked by `tests.recovery.zygote`, which can be killed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from llmrec.data.sets.table import load_data
from llmrec.durable import parse_checked_json, sha256_of
from llmrec.recipe.schema import DataSection
from tests.recovery import zygote as zygotes
from tests.recovery.points import REQUESTS

SMALL = (
    *("eval.fusion={}", "data={source: made-reviews, noun: products}", "reviews=null", "model.dtype=float32"),
    *("train.steps=6", "train.save_every=2", "train.batch_tokens=512", "train.valid_rows=4", "train.valid_every=3"),
    *("train.lora.top_layers=1", "train.lora.dropout=0.1", "tasks.sequential.users=null", "tasks.rating.users=null"),
    *("tasks.direct=null", "tasks.explanation.users=4", "tasks.explanation.max_tokens=4"),
    *("eval.arms=[zero-shot, tuned]", "eval.users=12", "eval.batch=4", "eval.candidates.count=5", "eval.bootstrap=50"),
    "eval.backend=hf",
)

# Expected exit codes; two lines of the ranked file are invalid.
DONE = {"run": 0, "export": 0, "rank": 1}
FAULTY = (40, 100)


@dataclass(frozen=True)
class Chain:
    """A folder with a run, its export and a ranking."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def exported(self) -> Path:
        return self.folder / "films"

    @property
    def ranked(self) -> Path:
        return self.folder / "ranked.jsonl"

    def command(self, step: str, model: Path) -> list[str]:
        """Return the arguments of ``llmrec``."""
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
        """Return a copy of the chain."""
        shutil.copytree(self.folder, target, dirs_exist_ok=True)
        return Chain(target)


def request_lines() -> str:
    """Return requests over the catalogue of the synthetic table."""
    ids = list(load_data(DataSection(source="made-reviews"), seed=0).items)
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
    """Starts each command of a chain in a new process."""

    model: Path
    log: Path
    processes: zygotes.Zygote

    def do(self, chain: Chain, step: str, point: str | None = None) -> int:
        """Run a step of a chain, with a kill at a point, and return its exit status."""
        chain.folder.mkdir(parents=True, exist_ok=True)
        return self.processes.do(chain.command(step, self.model), self.log, point)


@contextlib.contextmanager
def zygote(model: Path, log: Path) -> Iterator[Zygote]:
    """Run a zygote for a block."""
    with zygotes.zygote() as processes:
        yield Zygote(model, log, processes)


# --------------------------------------------------------------------------- outcomes


def outcome(run: Path) -> dict[str, Any]:
    """Return everything of a run that must be equal after a kill: all except dates, seconds and load."""
    results = parse_checked_json((run / "results.json").read_bytes())
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
    """Return the content of an export, and the files with its name."""
    bundle = parse_checked_json((chain.exported / "llmrec.json").read_bytes())
    files = {file.name: sha256_of(file) for file in chain.exported.iterdir()}
    # The hash of results.json depends on seconds.
    del bundle["made_from"]
    apart = {name: files.pop(name) for name in ("llmrec.json", "SHA256SUMS")}
    return {
        "files": files,
        "bundle": bundle,
        "apart": apart,
        "names": sorted(p.name for p in chain.folder.glob("films*")),
    }


def rank_outcome(chain: Chain) -> dict[str, Any]:
    """Return the content of a ranked file, its summary without times and paths, and the files next to it."""
    summary = json.loads(chain.ranked.with_name("ranked.jsonl.summary.json").read_text(encoding="utf-8"))
    kept = ("sha256", "lines", "ranked", "failed", "failures", "notes", "prompt_tokens", "completion_tokens")
    return {
        "rows": chain.ranked.read_text(encoding="utf-8").splitlines(),
        "summary": {key: summary[key] for key in kept},
        "names": sorted(p.name for p in [*chain.folder.glob("ranked*"), *chain.folder.glob(".ranked*")]),
    }
