"""The checks with the limits of their measurements. docs/install.md lists the checks that a GPU has passed.

A check runs commands of llmrec as users do and returns its measurements. `faults` decides whether it passes: every
limit names a measured value and its range, so a check without a measurement fails.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

Facts = dict[str, Any]
Words = tuple[str, ...]
Limits = Mapping[str, tuple[float, float]]
Measure = Callable[["Machine", Path], Facts]

_QUICKSTART, _FOUR = "recipes/quickstart.yaml", "recipes/movielens-100k/four-tasks.yaml"
_ANY = math.inf
# A short training run, saved and logged often enough to be killed in the middle.
_SHORT = ("train.packing=tree", "train.steps=120", "train.save_every=20", "train.valid_every=60")
_EQUAL: Limits = {"loss_difference": (0, 0.01)}
_LEARNS: Limits = {"last_to_first_loss": (0, 0.99)}
_AGREE: Limits = {"difference": (0, 0.05), "rows": (1, _ANY)}
# Replacements for missing data and models, such as those that need a licence.
_INSTEAD = {"data.path": "data.source=movielens-100k", "model.name": "model.name=Qwen/Qwen3-8B"}
_STOPPED_AT, _ENDS = 60, 20
# Tolerance in MiB for memory in use after a process has stopped, due to other processes.
_HELD = 300
_RELEASED: Limits = {"memory_left_mib": (-_ANY, _HELD)}
# A few requests to the pretrained model.
_FEW = ("eval.arms=[zero-shot]", "eval.users=20", "eval.fusion.model_users=0")
# On the CPU, checks run with a tiny model and a tiny data set, to test their code.
_SMALL = (
    *("model.device=cpu", "model.dtype=float32", "data={source: made-reviews, noun: products}", "reviews=null"),
    "tasks={sequential: {templates: [continue-list], baselines: [random, popularity, item-knn, markov-1]}}",
    *("train.batch_tokens=256", "train.valid_rows=4", "eval.users=12", "eval.candidates.count=6"),
    *("eval.bootstrap=50", "eval.backend=hf", "eval.fusion.model_users=0"),
)
_TORCH = (
    "import json, torch; cuda = torch.cuda; print(json.dumps({'torch': torch.__version__, 'built_for': "
    "torch.version.cuda, 'cuda': int(cuda.is_available())}))"
)


class NotRun(Exception):
    """A check that this machine cannot run; the message is the reason."""


class Failure(Exception):
    """A command that failed or returned no valid result."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check.

    Attributes:
        name: Its name on the command line and in the result.
        title: Description of the run.
        limits: The allowed range of each measured value, by its name at any depth of the facts.
        measure: Function that runs the check on a machine in a folder, and returns the measurements.
        gpus: Number of GPUs that it needs.
        disk: Required free disk space in GB.
        minutes: Time limit of its command.
        on_cpu: Whether its code also runs without a GPU.
    """

    name: str
    title: str
    limits: Limits
    measure: Measure
    gpus: int = 1
    disk: int = 10
    minutes: int = 60
    on_cpu: bool = False


CHECKS: list[Check] = []
"""All checks, in the order in which they run."""


def check(limits: Limits, **settings: Any) -> Callable[[Measure], Measure]:
    """Register a function as a check; its name and the first line of its docstring are those of the check."""

    def register(measure: Measure) -> Measure:
        line = (measure.__doc__ or "").partition("\n")[0].rstrip(".")
        named = {"name": getattr(measure, "__name__", "").replace("_", "-"), "title": line}
        CHECKS.append(Check(limits=limits, measure=measure, **named | settings))
        return measure

    return register


def faults(limits: Limits, facts: Mapping[str, Any]) -> list[str]:
    """Return the faults of measured values: missing, not a number, or out of range; empty if the check passes."""
    result = []
    for name, (low, high) in limits.items():
        values = list(_named(name, facts))
        if not values:
            result.append(f"{name} was not measured")
        for value in values:
            if not (isinstance(value, int | float) and low <= value <= high):
                result.append(f"{name} is {value}, not {shown(low, high)}")
    return result


def shown(low: float, high: float) -> str:
    """Return a range in words."""
    if low == high:
        return f"{low:g}"
    if math.isinf(low):
        return f"at most {high:g}"
    return f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"


def _named(name: str, facts: Mapping[str, Any]) -> Iterator[Any]:
    for key, value in facts.items():
        if key == name:
            yield value
        elif isinstance(value, Mapping):
            yield from _named(name, value)


# --------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Done:
    """A finished command: status, output, seconds, and the peak memory of all GPUs in MiB."""

    status: int
    output: str
    seconds: float
    peak: int = 0


@dataclass(frozen=True)
class Machine:
    """Where checks run.

    Attributes:
        root: The checkout.
        work: Folder of runs and logs.
        gpus: The number of GPUs; 0: checks run on the CPU.
        python: The interpreter of the environment.
        model: The tiny model of checks on the CPU.
        ends: Time of the monotonic clock at which a running command is killed.
    """

    root: Path
    work: Path
    gpus: int
    python: str = ".venv/bin/python"
    model: Path | None = None
    ends: float = math.inf

    @property
    def engine(self) -> str:
        """The engine to check: vLLM, or transformers on the CPU."""
        return "vllm" if self.gpus else "hf"

    @property
    def device(self) -> str:
        """The device of models."""
        return "cuda" if self.gpus else "cpu"

    def memory(self) -> int:
        """Return the memory in use on all GPUs, in MiB."""
        if not self.gpus:
            return 0
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        output = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        return sum(int(line) for line in output.split() if line.isdigit())

    @contextmanager
    def started(self, folder: Path, *command: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a command in a separate process group, with its output in files of a folder."""
        with (folder / "out.txt").open("wb") as out, (folder / "log.txt").open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, cwd=self.root, stdout=out, stderr=log, env=os.environ | env, start_new_session=True
            )
        try:
            yield process
        finally:
            # Memory left by a killed command is measured, not freed.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def call(self, folder: Path, *command: str, until: Callable[[], object] = bool, **env: str) -> Done:
        """Run a command to its end; it is killed when ``until`` is true, or when the time of the check is over."""
        begin, peak = time.monotonic(), 0
        with self.started(folder, *command, **env) as process:
            while process.poll() is None and time.monotonic() < self.ends:
                peak = max(peak, self.memory())
                if until():
                    process.kill()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
        output = (folder / "out.txt").read_text(encoding="utf-8", errors="replace")
        return Done(process.returncode, output, time.monotonic() - begin, peak)

    def do(self, folder: Path, *command: str, **env: str) -> Done:
        """Run a command that must succeed.

        Raises:
            Failure: If it does not.
        """
        done = self.call(folder, *command, **env)
        if done.status:
            lines = [*(folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-20:]]
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            raise Failure(f"`{' '.join(command)[:200]}` ended with {done.status}: {last[:300]}")
        return done

    def llmrec(self, *words: str) -> Words:
        """Return a command of llmrec."""
        return (self.python, "-m", "llmrec", *words)

    def recipe(self, command: str, recipe: str, *words: str) -> Words:
        """Return ``llmrec COMMAND RECIPE WORDS``; on the CPU with the tiny model and data set."""
        small = () if self.gpus else (f"model.name={self.model}", *_SMALL)
        return self.llmrec(command, recipe, *small, *words)

    def train(self, recipe: str, out: Path, *words: str) -> list[float]:
        """Train, and return the loss of each step."""
        self.do(out.parent, *self.recipe("train", recipe, *words, "--out", str(out)))
        return losses(out)

    def evaluate(self, recipe: str, out: Path, *words: str) -> tuple[dict[str, float], float]:
        """Run a recipe in a folder, and return the main metric of each model, and the seconds."""
        done = self.do(out.parent, *self.recipe("run", recipe, *words, "--out", str(out)))
        return figures(out), done.seconds

    def measure(self, folder: Path, *words: str) -> Facts:
        """Return the measurements of a function of `eval.benchmarks.gpu.measure`."""
        return _json(self.do(folder, self.python, "-m", "eval.benchmarks.gpu.measure", *words))


def _json(done: Done) -> Facts:
    """Return the JSON object that a command printed, with None for NaN."""
    start = f"\n{done.output}".find("\n{")
    if start < 0:
        raise Failure("the command printed no JSON")
    return dict(json.JSONDecoder(parse_constant=lambda _: None).raw_decode(done.output[start:])[0])


def losses(run: Path) -> list[float]:
    """Return the loss of each logged training step; the last line may be incomplete."""
    file, result = run / "train_log.jsonl", []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with suppress(ValueError):
            entry = json.loads(line)
            if entry["loss"] is not None:
                result.append(float(entry["loss"]))
    return result


def fall(values: Sequence[float]) -> Facts:
    """Return the number of losses, and the mean of the last 20 as a share of that of the first 20."""
    ends = min(_ENDS, len(values) // 2)
    share = fmean(values[-ends:]) / fmean(values[:ends]) if ends and all(map(math.isfinite, values)) else None
    return {"steps": len(values), "last_to_first_loss": share and round(share, 4)}


def apart(one: Sequence[float], other: Sequence[float]) -> Facts:
    """Return the largest relative difference between losses of the same steps; None if they cannot be compared."""
    largest = None
    if one and len(one) == len(other) and all(map(math.isfinite, (*one, *other))):
        largest = round(max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True)), 6)
    return {"steps": len(one), "loss_difference": largest}


def figures(run: Path) -> dict[str, float]:
    """Return the main metric of each language model of a run."""
    rows = json.loads((run / "results.json").read_text(encoding="utf-8"))["rows"]
    result = {}
    for row in rows:
        name = next((name for name in ("NDCG@10", "RMSE", "AUC", "ROUGE-L") if name in row["metrics"]), None)
        if name and row.get("arm") != "baseline" and row["metrics"][name]["value"] is not None:
            result[row["id"]] = float(row["metrics"][name]["value"])
    return result


# --------------------------------------------------------------------------- set-up and tests


@check({"cuda": (1, 1), "faults": (0, 0), "environment_gb": (1, 18)}, disk=40)
def environment(machine: Machine, folder: Path) -> Facts:
    """`make setup`, and `llmrec doctor` about driver, compiler, headers and memory."""
    machine.do(folder, "make", "setup")
    facts = _json(machine.do(folder, machine.python, "-c", _TORCH))
    findings = _json(machine.call(folder, *machine.llmrec("doctor", "--json")))["findings"]
    wrong = [finding["name"] for finding in findings if finding["fix"]]
    size = machine.do(folder, "du", "-s", "-B1", ".venv").output.split()[0]
    return facts | {"faults": len(wrong), "wrong": wrong, "environment_gb": round(int(size) / 1e9, 1)}


def tests(marked: str, machine: Machine, folder: Path) -> Facts:
    """Run tests, and count those that passed; conftest hides the GPU unless tests marked gpu are selected."""
    output = machine.do(folder, "make", "test", f"ARGS=-m '{marked}'").output
    return {"passed": int((re.findall(r"(\d+) passed", output) or [0])[-1])}


check({"passed": (1000, _ANY)}, name="tests", title="tests with the GPU hidden", minutes=120)(
    partial(tests, "not vllm")
)
check({"passed": (1, _ANY)}, name="tests-gpu", title="tests marked gpu")(partial(tests, "gpu"))


# --------------------------------------------------------------------------- training


@check(
    {
        "columns_mod_128": (64, 64),
        "lowest_logsumexp": (-_ANY, -88.7),
        "nonfinite_gradients": (0, 0),
        "gradient_difference": (0, 0.15),
        "math_attention": (0, 0),
    },
    on_cpu=True,
)
def masked_backward(machine: Machine, folder: Path) -> Facts:
    """Gradients of `packing: tree` where cuDNN's attention returned NaN, compared with plain rows on the CPU."""
    return machine.measure(folder, "masked", str(folder / "model"), machine.device)


def recipe_of(recipe: str, machine: Machine, folder: Path) -> Facts:
    """Train 200 steps of a recipe, and compare the memory that the GPU takes with the estimate of the dry run."""
    words: Words = ("train.steps=200",)
    while "error" in (
        plan := _json(machine.call(folder, *machine.recipe("check", recipe, *words, "--dry-run", "--json")))
    ):
        error = plan["error"]
        if (instead := _INSTEAD.get(error["column"])) and instead not in words:
            words += (instead,)
        elif error["column"] in _INSTEAD or error["kind"] in ("missing-file", "unreachable"):
            raise NotRun(error["message"][:200])
        else:
            raise Failure(error["message"][:300])
    before, run, estimate = machine.memory(), folder / "run", plan["estimate"]["memory_gb"]
    done = machine.do(folder, *machine.recipe("train", recipe, *words, "--out", str(run)))
    facts = fall(losses(run)) | {"seconds": round(done.seconds), "changed": list(words), "estimate_gib": estimate}
    shutil.rmtree(run)
    return facts | {"memory_to_estimate": round((done.peak - before) / 1024 / estimate, 3)}


for _file in sorted(Path("recipes/gpu").rglob("*.yaml")):
    if "\ntrain:" in _file.read_text(encoding="utf-8"):
        check(
            {"steps": (200, 200), **_LEARNS, "memory_to_estimate": (0.8, 1.2)},
            name=f"recipe-{_file.stem}",
            title=f"200 steps of {_file}",
            disk=40,
            minutes=180,
        )(partial(recipe_of, str(_file)))


@check({**_LEARNS, "loss_difference": (0, 0.02), "steps_when_killed": (_STOPPED_AT, 119)}, on_cpu=True)
def quantised(machine: Machine, folder: Path) -> Facts:
    """120 steps of qlora and lora8; qlora again, killed at step 60 and resumed, with the same losses."""
    facts: Facts = {}
    for method, more in {"qlora": (), "lora8": ("train.optim=paged_adamw_8bit",)}.items():
        # Eight bits need a GPU.
        if machine.gpus or method == "qlora":
            facts[method] = fall(machine.train(_FOUR, folder / method, f"train.method={method}", *_SHORT, *more))
    cut = folder / "cut"
    command = machine.recipe("train", _FOUR, "train.method=qlora", *_SHORT, "--out", str(cut))
    machine.call(folder, *command, until=lambda: len(losses(cut)) >= _STOPPED_AT)
    facts["steps_when_killed"] = len(losses(cut))
    machine.do(folder, *command)
    return facts | {"resumed": apart(losses(folder / "qlora"), losses(cut))}


@check(_EQUAL, on_cpu=True)
def equal_losses(machine: Machine, folder: Path) -> Facts:
    """Losses of steps in parts, with torch.compile and with Liger's kernels, compared with those of plain steps."""
    words: Words = ("train.micro_tokens=128",)
    if machine.gpus:
        machine.do(folder, machine.python, "-m", "pip", "install", "--quiet", "--editable", ".[liger]")
        words = ("train.micro_tokens=512", "train.torch_compile=true", "train.use_liger_kernel=true")
    plain = machine.train(_FOUR, folder / "plain", "train.steps=30")
    return {word: apart(plain, machine.train(_FOUR, folder / word, "train.steps=30", word)) for word in words}


@check({**_EQUAL, "status_of_killed": (1, 255), "seconds_to_end": (0, 120)}, gpus=2, on_cpu=True)
def launch(machine: Machine, folder: Path) -> Facts:
    """Losses with `--launch 2`, compared with those of one process; then one of two killed."""
    words = ("train.packing=tree", "train.steps=40", "train.save_every=20", "train.lora.dropout=0")
    one, two = folder / "one", folder / "two"
    facts = apart(machine.train(_FOUR, one, *words), machine.train(_FOUR, two, *words, "--launch", "2"))
    speeds = [json.loads((run / "train.json").read_text(encoding="utf-8"))["tokens_per_second"] for run in (one, two)]
    run, lost = folder / "killed", list[float]()

    def lose() -> None:
        if not lost and len(losses(run)) >= 2 and kill_rank(run, 1):
            lost.append(time.monotonic())

    done = machine.call(folder, *machine.recipe("train", _FOUR, *words, "--launch", "2", "--out", str(run)), until=lose)
    facts |= {"speed_up": round(speeds[1] / speeds[0], 2), "status_of_killed": done.status}
    return facts | {"seconds_to_end": round(time.monotonic() - lost[0]) if lost else None}


def kill_rank(run: Path, rank: int) -> bool:
    """Kill one of the training processes of a run folder, and return whether it was found."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment, command = ((process / name).read_bytes().split(b"\0") for name in ("environ", "cmdline"))
            if f"RANK={rank}".encode() in environment and str(run).encode() in command:
                os.kill(int(process.name), signal.SIGKILL)
                return True
    return False


@check(_EQUAL, gpus=2, disk=40)
def fsdp(machine: Machine, folder: Path) -> Facts:
    """Losses with FSDP over two GPUs, compared with those of one process: tied and untied head, lora and full."""
    config, untied, facts = folder / "fsdp.yaml", folder / "untied", Facts()
    config.write_text(fsdp_config((machine.root / "docs/scaling.md").read_text(encoding="utf-8")), encoding="utf-8")
    machine.measure(folder, "model", "llama-1b", str(untied), machine.device)
    launch = (machine.python, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "llmrec")
    for (head, model), method in product((("tied", ""), ("untied", str(untied))), ("lora", "full")):
        words = ("train.steps=20", f"train.method={method}", *((f"model.name={model}",) if model else ()))
        one, two = folder / f"{head}-{method}", folder / f"{head}-{method}-fsdp"
        plain = machine.train(_FOUR, one, *words)
        machine.do(folder, *launch, *machine.recipe("train", _FOUR, *words, "--out", str(two))[3:])
        facts[f"{head}, {method}"] = apart(plain, losses(two))
    return facts


def fsdp_config(page: str) -> str:
    """Return the configuration of accelerate that docs/scaling.md shows, for two processes."""
    block = page.partition("distributed_type: FSDP")
    return f"distributed_type: FSDP{block[2].partition('```')[0]}".replace("num_processes: 8", "num_processes: 2")


@check({"peak_to_weights": (0, 0.5)}, disk=90, minutes=120)
def merge(machine: Machine, folder: Path) -> Facts:
    """A run with 8 billion random weights, merged in the memory of half of them, and exported."""
    base, run = folder / "base", folder / "run"
    machine.measure(folder, "model", "llama-3-8b" if machine.gpus else "tiny", str(base), machine.device)
    words = (f"model.name={base}", "train.method=qlora", "train.steps=2", "train.valid_rows=0")
    machine.do(folder, *machine.recipe("train", _FOUR, *words, "--out", str(run)))
    facts = machine.measure(folder, "merge", str(base), str(run / "adapter"), str(folder / "merged"))
    export = ("export", str(run), "--out", str(folder / "export"), "--base-licence", "apache-2.0")
    done = machine.do(folder, *machine.llmrec(*export))
    for name in ("base", "run", "merged", "export"):
        shutil.rmtree(folder / name)
    return facts | {"export_seconds": round(done.seconds)}


# --------------------------------------------------------------------------- answering


def ways(recipe: str, other: Words, machine: Machine, folder: Path) -> Facts:
    """Run a recipe, evaluate its fine-tuned model again with other options, and compare the metrics of each model."""
    recipe = recipe if machine.gpus else _FOUR
    run, copy = folder / "run", folder / "other"
    one, seconds = machine.evaluate(recipe, run, f"eval.backend={machine.engine}")
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("answers.sqlite*", "rows", "results.json"))
    two, more = machine.evaluate(recipe, copy, f"eval.backend={machine.engine}", *other)
    # The second evaluation may have fewer settings.
    largest = max(abs(one[row] - two[row]) for row in two) if two and one.keys() >= two.keys() else None
    return {"rows": len(two), "difference": largest, "seconds": round(seconds), "other_seconds": round(more)}


for _name, _recipe, _other, _gpus in (
    ("quickstart", _QUICKSTART, "eval.backend=hf", 1),
    ("four-tasks", _FOUR, "eval.backend=hf", 1),
    # If the base model is evaluated too, one engine serves it and the adapter; otherwise it serves the merged weights.
    ("adapter", _FOUR, "eval.arms=[tuned]", 1),
    ("tensor-parallel", _FOUR, "eval.tensor_parallel=2", 2),
    ("eval-launch", _FOUR, "--launch 2", 2),
):
    check(
        _AGREE,
        name=_name,
        title=f"{_recipe} on vLLM, and evaluated again with `{_other}`",
        gpus=_gpus,
        on_cpu=_name in ("adapter", "eval-launch"),
    )(partial(ways, _recipe, tuple(_other.split())))


@check({"logprob_difference": (0, 1e-3), "scores": (1, _ANY)}, on_cpu=True)
def likelihood(machine: Machine, folder: Path) -> Facts:
    """Log-probabilities of titles and labels by two routes of vLLM and by transformers, in float32."""
    ways, prompts = ("prefill,nodes,hf", "200") if machine.gpus else ("hf,hf", "5")
    return machine.measure(folder, "engines", str(machine.model or ""), ways, machine.device, prompts)


@check({"not_answered": (0, 0), "answered": (3, _ANY), **_RELEASED}, on_cpu=True)
def serve(machine: Machine, folder: Path) -> Facts:
    """`llmrec serve` with one model and with two: rank, reload, rank, stop."""
    run, facts = folder / "run", Facts()
    machine.train(_FOUR, run, "train.steps=20")
    question = {"history": [{"title": "Toy Story (1995)"}], "candidates": [{"title": "Heat"}, {"title": "Fargo"}]}
    for names in (("tuned",), ("tuned", "untuned")):
        before, begin, statuses = machine.memory(), time.monotonic(), list[int]()
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        words = (f"--port={port}", f"--backend={machine.engine}", f"--store={folder / 'store.sqlite'}")
        models = (word for name in names for word in ("--models", name))
        with machine.started(folder, *machine.llmrec("serve", str(run), *words, *models)) as process:
            while process.poll() is None and status_of(port, "/ready") != 200 and time.monotonic() < machine.ends:
                time.sleep(0.5)
            ready = time.monotonic() - begin
            for path in ("/v1/rank", "/v1/reload", "/v1/rank"):
                for name in names if path == "/v1/rank" else (None,):
                    statuses.append(status_of(port, path, question | {"model": name} if name else {}))
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(90)
        facts[" ".join(names)] = released(machine, before) | {
            "seconds_to_ready": round(ready, 1),
            "answered": statuses.count(200),
            "refused": [status for status in statuses if status != 200],
            "not_answered": sum(status != 200 for status in statuses),
        }
    return facts


def status_of(port: int, path: str, body: Mapping[str, Any] | None = None) -> int:
    """Return the status of a request to a service; 0 without a response."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=900) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def released(machine: Machine, before: int) -> Facts:
    """Wait up to a minute until the GPUs release memory, and return the remaining increase."""
    begin = time.monotonic()
    while (held := machine.memory() - before) > _HELD and time.monotonic() < begin + 60:
        time.sleep(0.5)
    return {"memory_left_mib": held, "seconds_to_release": round(time.monotonic() - begin, 1)}


@check({"rows": (1, _ANY), "holder_lives": (1, 1)})
def holder(machine: Machine, folder: Path) -> Facts:
    """An engine of vLLM while another process holds 3 GB of the GPU, and while it leaves 7 GB."""
    facts: Facts = {}
    for name, size in (("3 GB held", "3e9"), ("7 GB left", "max(1, torch.cuda.mem_get_info()[0] - 7e9)")):
        held = f"held = torch.empty(int({size}), dtype=torch.uint8, device='cuda')"
        code = f"import time, torch; {held}; print('held', flush=True); time.sleep(9e4)"
        workdir = folder / name
        workdir.mkdir()
        with machine.started(workdir, machine.python, "-c", code) as process:
            while process.poll() is None and not (workdir / "out.txt").stat().st_size:
                time.sleep(0.5)
            rows, seconds = machine.evaluate(_FOUR, folder / f"run, {name}", *_FEW, "eval.backend=vllm")
            facts[name] = {"rows": len(rows), "seconds": round(seconds), "holder_lives": int(process.poll() is None)}
    return facts


@check({**_RELEASED, "answers_when_killed": (1, _ANY), "rows": (1, _ANY)}, on_cpu=True)
def kill(machine: Machine, folder: Path) -> Facts:
    """`kill -9` while the engine answers: the memory comes back, and the same command completes the run."""
    before, run = machine.memory(), folder / "run"
    command = machine.recipe("run", _FOUR, *_FEW, "eval.users=200", f"eval.backend={machine.engine}", "--out", str(run))
    machine.call(folder, *command, until=lambda: answers(run) > 0)
    facts = released(machine, before) | {"answers_when_killed": answers(run)}
    machine.do(folder, *command)
    return facts | {"rows": len(figures(run))}


def answers(run: Path) -> int:
    """Return the number of answers that a run has stored."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{run / 'answers.sqlite'}?mode=ro", uri=True)) as store:
        return int(store.execute("SELECT count(*) FROM answers").fetchone()[0])
    return 0


@check({"rows": (1, _ANY)}, disk=60, minutes=90)
def compose(machine: Machine, folder: Path) -> Facts:
    """The GPU service of docker/compose.yaml: built, `llmrec doctor`, and a few questions."""
    if shutil.which("docker") is None:
        raise NotRun("needs docker")
    service = ("docker", "compose", "-f", "docker/compose.yaml")
    machine.do(folder, *service, "build", "gpu")
    machine.do(folder, *service, "run", "--rm", "gpu", "doctor")
    done = machine.do(folder, *service, "run", "--rm", "gpu", "run", _FOUR, *_FEW, "--json")
    return {"rows": len(_json(done)["rows"]), "seconds": round(done.seconds)}
