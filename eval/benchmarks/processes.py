"""Trains SmolLM2-135M-Instruct in one process and in two, kills one of the two, and resumes in one process.

``python -m eval.benchmarks.processes eval/results/processes.json``. The two processes are started by torchrun and use
gloo. All runs are in float32 and without dropout, so that only the order of sums differs. Seconds are recorded with the
load of the machine, but not compared.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json

STEPS, SAVE, KILLED_AT = 8, 3, 5
RECIPE = (
    "recipes/movielens-100k/four-tasks.yaml",
    "model.dtype=float32",
    f"train.steps={STEPS}",
    f"train.save_every={SAVE}",
    f"train.valid_every={STEPS}",
    "train.valid_rows=8",
    "train.batch_tokens=512",
    "train.max_row_tokens=192",
    "train.lora.dropout=0",
    "train.report_to=[]",
)
_ALONE = (sys.executable, "-m", "llmrec", "train")
_TWO = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llmrec", "train")


def main(target: Path) -> None:
    """Run all training runs and write the results."""
    with tempfile.TemporaryDirectory() as folder:
        one, two, cut = (Path(folder) / name for name in ("one", "two", "cut"))
        alone = _done(_ALONE, one)
        both = _done(_TWO, two)
        killed = _killed(cut)
        resumed = _done(_ALONE, cut)
        result = {
            "command": "make bench NAME=processes",
            "recipe": RECIPE,
            "one": alone,
            "two": both | _differences(one, two),
            "killed": killed,
            "gone_on_in_one": resumed | _differences(one, cut),
            **provenance(),
        }
    write_json(target, result)


def _done(start: Sequence[str], out: Path) -> dict[str, Any]:
    """Train to the end and return the records."""
    begin = time.monotonic()
    subprocess.run([*start, *RECIPE, "--out", str(out)], check=True)
    record = json.loads((out / "train.json").read_text(encoding="utf-8"))
    kept = ("processes", "distributed", "method", "steps", "tokens", "target_tokens", "adapter_sha256")
    losses = [line["loss"] for line in record["log"][1:]]
    valid = record["log"][-1]["valid_loss"]
    return {key: record[key] for key in kept} | {
        "losses": losses,
        "valid_loss": valid,
        "seconds": round(time.monotonic() - begin, 1),
        "load": os.getloadavg()[0],
    }


def _killed(out: Path) -> dict[str, Any]:
    """Start two processes, kill the second with SIGKILL, and return how the first ended."""
    log = out / "train_log.jsonl"
    with tempfile.TemporaryFile("w+") as output:
        launcher = subprocess.Popen([*_TWO, *RECIPE, "--out", str(out)], stdout=output, stderr=output)
        _until(lambda: log.is_file() and len(log.read_text(encoding="utf-8").splitlines()) > KILLED_AT, launcher)
        (second,) = (child for child in psutil.Process(launcher.pid).children() if child.environ().get("RANK") == "1")
        second.send_signal(signal.SIGKILL)
        begin = time.monotonic()
        status = launcher.wait(timeout=300)
        seconds = time.monotonic() - begin
        output.seek(0)
        words = [line.rstrip() for line in output if line.startswith("error: ")]
    steps = len(log.read_text(encoding="utf-8").splitlines()) - 1
    kept = sorted(int(path.name.rpartition("-")[2]) for path in (out / "checkpoints").glob("checkpoint-*"))
    record = {"steps": steps, "checkpoints": kept, "said": words, "status": status, "seconds": round(seconds, 1)}
    return record | {"trained": (out / "train.json").exists()}


def _until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not true():
        if process.poll() is not None:
            raise SystemExit(f"the training ended with {process.returncode} before it could be killed")
        time.sleep(0.1)


def _differences(one: Path, other: Path) -> dict[str, float]:
    """Return the differences between two training runs: relative differences of losses, and differences of weights."""
    losses = [
        [line["loss"] for line in json.loads((run / "train.json").read_text(encoding="utf-8"))["log"][1:]]
        for run in (one, other)
    ]
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    return {
        "largest_loss_difference": max(abs(a - b) / a for a, b in zip(*losses, strict=True)),
        "largest_weight_difference": max(float((first[n] - second[n]).abs().max()) for n in first),
        "largest_weight": max(float(weight.abs().max()) for weight in first.values()),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
