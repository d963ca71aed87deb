"""Runs of a small recipe that are killed with SIGKILL at a named point or after some seconds, and run again.

A zygote process imports the heavy libraries once and forks a child for each run: a child costs seconds, not the
half minute of a cold start. The zygote computes nothing itself, so that no thread pool is forked.

    python -m tests.recovery.kills eval/results/recovery.json

runs every named point and 20 random ones and writes what came out.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

SMALL = (
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

# Named point -> (module, attribute, which call of it is the last one, before or after its work).
POINTS: dict[str, tuple[str, str, int, str]] = {
    "mid-step": ("llmrec.train.sft", "LabelRowTrainer.compute_loss", 4, "after"),
    "mid-save, before the adapter": ("peft.peft_model", "PeftModel.save_pretrained", 2, "before"),
    "mid-save, before the optimiser": ("transformers.trainer", "Trainer._save_optimizer_and_scheduler", 2, "before"),
    "mid-save, before the random state": ("transformers.trainer", "Trainer._save_rng_state", 2, "before"),
    "mid-save, before the manifest": ("llmrec.train.checkpoint", "seal", 2, "before"),
    "between stages, before the merge": ("llmrec.build.training", "_merge", 1, "before"),
    "between stages, before the record of training": ("llmrec.build.training", "write_json", 1, "before"),
    "between stages, before evaluation": ("llmrec.build.pipeline", "Session.evaluate", 1, "before"),
    "mid-evaluation, before a chunk is stored": ("llmrec.backends.cache", "AnswerStore.put", 2, "before"),
    "mid-evaluation, after a chunk is stored": ("llmrec.backends.cache", "AnswerStore.put", 5, "after"),
    "mid-evaluation, while a row is written": ("llmrec.build.evaluation", "write_json", 14, "before"),
    "mid-report, before the results": ("llmrec.build.results", "write_json", 1, "before"),
    "mid-report, between two files": ("llmrec.report.page", "_put", 3, "before"),
}


# --------------------------------------------------------------------------- the child


def _arm(point: str) -> None:
    """Let this process kill itself at a named point."""
    from importlib import import_module

    module, path, last, side = POINTS[point]
    owner: Any = import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    genuine: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def fatal(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last and side == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = genuine(*args, **options)
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, fatal)


def _child(model: str, folder: str, point: str | None, command: str | None) -> None:
    import torch

    from llmrec.build import pipeline
    from llmrec.recipe_file import load_recipe

    torch.set_num_threads(1)
    if point:
        _arm(point)
    if command:
        from llmrec import cli

        sys.argv = ["llmrec", *json.loads(command)]
        cli.main()
        return
    recipe = load_recipe("recipes/quickstart.yaml", [f"model.name={model}", *SMALL])
    pipeline.run(recipe, Path(folder), quiet=True)


def _serve() -> None:
    """Read one JSON order a line, fork a child for it, answer with its exit status and seconds."""
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401
    import trl  # noqa: F401

    import llmrec.build.pipeline
    import llmrec.train.sft  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        begin = time.monotonic()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                _child(order["model"], order["folder"], order["point"], order["command"])
                code = 0
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        if order["after"] is not None:
            while time.monotonic() - begin < order["after"] and os.waitpid(child, os.WNOHANG) == (0, 0):
                time.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        except ChildProcessError:
            status = 0  # it had ended before its time came
        sys.stdout.write(json.dumps({"status": status, "seconds": time.monotonic() - begin}) + "\n")
        sys.stdout.flush()


# --------------------------------------------------------------------------- the parent


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status (-9 for a kill) and how long it took."""

    status: int
    seconds: float


class Zygote:
    """Starts runs of the small recipe."""

    def __init__(self, model: Path, log: Path) -> None:
        self._model, self._log = model, log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.recovery.kills", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def run(
        self, folder: Path, point: str | None = None, after: float | None = None, command: list[str] | None = None
    ) -> Ended:
        """Run into ``folder``, with a kill at a point or after some seconds; or any command of the command line."""
        assert self._process.stdin and self._process.stdout
        order = {
            "model": str(self._model),
            "folder": str(folder),
            "log": str(self._log),
            "point": point,
            "after": after,
            "command": json.dumps(command) if command else None,
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the zygote."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def zygote(model: Path, log: Path) -> Iterator[Zygote]:
    """A zygote for the time of a block."""
    started = Zygote(model, log)
    try:
        yield started
    finally:
        started.close()


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything that must be equal after a kill: all of a run but its dates, its seconds and its load."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
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
    predictions = pl.read_parquet(folder / "predictions.parquet")
    steps = [json.loads(line)["step"] for line in (folder / "train_log.jsonl").read_text().splitlines()]
    report = sorted(file.name for file in (folder / "report").iterdir())
    return {
        "results": results,
        "predictions": predictions.to_dicts(),
        "steps": steps,
        "report": report,
        "drafts": sorted(str(f.relative_to(folder)) for f in folder.rglob("*.draft")),
    }


def _kill(
    runs: Zygote, folder: Path, expected: dict[str, Any], label: str, point: str | None, after: float | None
) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    first = runs.run(folder, point, after)
    again = runs.run(folder)
    row = {
        "kill": label,
        "killed": first.status == -signal.SIGKILL,
        "after_s": round(first.seconds, 2),
        "equal": again.status == 0 and outcome(folder) == expected,
    }
    sys.stdout.write(f"{json.dumps(row)}\n")
    return row


def main(target: Path) -> None:
    """Kill at every named point and at 20 random moments; write what came out."""
    from tests.conftest import make_model

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        with zygote(make_model(place / "model"), place / "log") as runs:
            runs.run(place / "whole")
            expected = outcome(place / "whole")
            whole = runs.run(place / "again")
            rows = [_kill(runs, place / "killed", expected, label, label, None) for label in POINTS]
            draw, moments = random.Random(0), 0
            while moments < RANDOM:
                row = _kill(runs, place / "killed", expected, "random", None, draw.uniform(0.05, 1) * whole.seconds)
                if row["killed"]:  # the run may end before its moment comes
                    moments += 1
                    rows.append(row)
    record = {
        "command": "python -m tests.recovery.kills",
        "what": "SIGKILL, then the same command: adapter sha256, results.json without times, predictions, log, report",
        "adapter_sha256": expected["results"]["training"]["adapter_sha256"],
        "run_seconds": round(whole.seconds, 1),
        "kills": rows,
        "equal": sum(row["equal"] for row in rows),
        "of": len(rows),
    }
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        _serve()
    else:
        main(Path(sys.argv[1]))
