"""Checks that two Ray nodes give the output of one process, even after kills, and measures the overhead.

Run by ``make bench NAME=ray``; it needs the extra ``ray``. It is small (a random model of two layers, some hundred
requests and two actors), since it checks that nothing is lost, duplicated or misplaced. Each node is a separate ``ray
start``. Results are written after each case, so that an interrupted run keeps them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import typer

from eval.benchmarks.faults.works import augmented
from eval.benchmarks.provenance import provenance
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.run import rank_file
from llmrec.cli.console import facts
from llmrec.cluster.actors import finish_on, rank_on
from llmrec.data.features import FeatureStore
from llmrec.durable import read_json, sha256_of
from llmrec.machine import versions
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.augmenting import augment
from llmrec.pipeline.shards import SHARD, shards_of
from llmrec.recipe.load import as_recipe, load_recipe
from llmrec.recipe.schema import Recipe
from tests.answer.rank_cases import items_csv, jsonl, records
from tests.conftest import make_model

REQUESTS, SHARDS = 320, 5
ACTORS, CPUS, NODE_CPUS = 2, 2.0, 3
TRIES, PAUSE, PATIENCE = 8, 0.2, 900.0
WEEK = 7 * 24 * 3600.0
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "label": {"task": "direct", "strategy": "label"},
    "likelihood": {"task": "sequential", "strategy": "likelihood"},
    "search": {"candidates": "all", "beams": 3, "top": 3},
}
CASES = (
    *("rank, label", "rank, likelihood", "rank, search", "rank, label, again"),
    *("eval, likelihood and label", "augment"),
)
EVALUATED = (
    "data={source: made-reviews, noun: products}",
    "reviews=null",
    "model.dtype=float32",
    "tasks={sequential: {templates: [continue-list], strategies: [likelihood], baselines: [random, popularity, "
    "markov-1, item-knn]}, direct: {templates: [after-history], strategies: [label]}}",
    "eval={arms: [zero-shot], users: 12, batch: 2, bootstrap: 20, backend: hf, candidates: {count: 4}}",
    f"ray={{actors: {ACTORS}, cpus: {CPUS}, gpus: 0, shards: {SHARDS}}}",
)


class Nodes:
    """Nodes of one cluster on this machine, with processes that can be killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.address = f"127.0.0.1:{_free()}"
        self.ports: dict[str, int] = {}
        self.seconds: dict[str, list[float]] = {}
        self.failed_starts = 0

    def start(self, name: str) -> None:
        """Start a node, with retries, since Ray may time out on a busy machine."""
        for _ in range(TRIES):
            ports = [_free() for _ in range(5)]
            self.ports[name] = ports[0]
            head = ["--head", "--port", self.address.rpartition(":")[2], "--include-dashboard", "false"]
            words = [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"),
                *([*head, "--temp-dir", str(self._folder)] if name == "head" else ["--address", self.address]),
                *("--node-ip-address", "127.0.0.1", "--num-cpus", str(NODE_CPUS), "--num-gpus", "0"),
                *("--object-store-memory", "100000000", "--node-manager-port", str(ports[0])),
                # With given ports, a node does not wait for the process that chooses them.
                *("--metrics-export-port", str(ports[1]), "--runtime-env-agent-port", str(ports[2])),
                *("--dashboard-agent-grpc-port", str(ports[3]), "--dashboard-agent-listen-port", str(ports[4])),
            ]
            begin = time.monotonic()
            done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode == 0:
                self.seconds.setdefault(name, []).append(round(time.monotonic() - begin, 1))
                return
            self.failed_starts += 1
            if name == "head":
                self.end()
            else:
                self.kill(name)
        raise SystemExit(f"Ray does not start here: {done.stdout[-800:]}{done.stderr[-800:]}")

    def processes(self, name: str) -> list[psutil.Process]:
        """Return the processes of a node: services and workers."""
        port, found = f"={self.ports[name]}", []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if any(str(self._folder) in word for word in words) and any(
                "node_manager_port" in word and word.endswith(port) for word in words
            ):
                found += [process, *process.children(recursive=True)]
        return found

    def actors(self) -> list[psutil.Process]:
        """Return the processes of actors, on all nodes."""
        found = [process for name in self.ports for process in self.processes(name)]
        return [process for process in found if "MapWorker" in " ".join(_words(process))]

    def kill(self, name: str) -> None:
        """Kill a node and its processes."""
        for process in self.processes(name):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def end(self) -> None:
        """Kill every process of the cluster."""
        for name in self.ports:
            self.kill(name)
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self._folder) in word for word in process.info["cmdline"] or []):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def _words(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        return list(map(str, process.cmdline()))
    return []


def _free() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def finished(target: Path) -> list[Path]:
    """Return the records of the finished shards."""
    return sorted(shards_of(target).glob(f"*/{SHARD}"))


@contextmanager
def meanwhile(target: Path, harm: Callable[[], str] | None) -> Iterator[list[str]]:
    """Kill something once the first shard is finished, and yield a description of it."""
    said: list[str] = []
    over = threading.Event()

    def wait() -> None:
        while harm is not None and not over.wait(PAUSE):
            if finished(target):
                said.append(harm())
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield said
    finally:
        over.set()
        thread.join()


class Bench:
    """The cases and their results."""

    def __init__(self, folder: Path, target: Path) -> None:
        self._folder, self._target = folder, target
        self.model = make_model(folder / "model")
        self.items = items_csv(folder)
        self.requests = jsonl(folder / "in.jsonl", records(REQUESTS, candidates=3, history=2))
        self.nodes = Nodes(Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")))
        self.cases: list[dict[str, Any]] = []

    def options(self, name: str, strategy: str, **more: Any) -> RankOptions:
        return RankOptions(
            model=str(self.model),
            requests=self.requests,
            items=self.items,
            out=self._folder / f"{name}.jsonl",
            backend="hf",
            dtype="float32",
            batch=16,
            **STRATEGIES[strategy],
            **more,
        )

    def rank(self, strategy: str, harm: Callable[[], str] | None = None) -> None:
        """Rank in one process and on the cluster, with a kill."""
        begin = time.monotonic()
        whole = rank_file(self.options(f"whole-{strategy}", strategy))
        alone = time.monotonic() - begin
        cluster = {"actors": ACTORS, "cpus": CPUS, "gpus": 0, "shards": SHARDS}
        chosen = self.options(f"ray-{strategy}", strategy, **cluster)
        begin = time.monotonic()
        with meanwhile(chosen.target, harm) as said, suppress(typer.Exit):
            rank_on(chosen, self.nodes.address)
        spent = time.monotonic() - begin
        self._found(f"rank, {strategy}", chosen.target, alone, spent, sha256_of(chosen.target) == whole["sha256"], said)

    def driver(self, strategy: str) -> None:
        """Kill the command once some shards are finished, and run it again."""
        chosen = self.options("ray-driver", strategy, actors=ACTORS, cpus=CPUS, gpus=0, shards=SHARDS)
        words = [
            sys.executable,
            "-m",
            "llmrec.cli.main",
            "rank",
            "--ray",
            self.nodes.address,
            "--actors",
            str(ACTORS),
        ]
        words += ["--cpus", str(CPUS), "--gpus", "0", "--shards", str(SHARDS), "--model", chosen.model, "--batch", "16"]
        words += ["--in", str(chosen.requests), "--items", str(chosen.items), "--out", str(chosen.out)]
        words += ["--backend", "hf", "--dtype", "float32", "--task", chosen.task, "--strategy", chosen.strategy]
        begin = time.monotonic()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(finished(chosen.target)) < 2 and time.monotonic() - begin < PATIENCE:
            time.sleep(PAUSE)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = {path: path.stat().st_mtime_ns for path in finished(chosen.target)}
        said = [f"the command was killed with {len(before)} of {SHARDS} shards finished, and given again"]
        with suppress(typer.Exit):
            rank_on(chosen, self.nodes.address)
        whole = self._folder / f"whole-{strategy}.jsonl"
        kept = all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
        same = sha256_of(chosen.target) == sha256_of(whole)
        spent = time.monotonic() - begin
        self._found(f"rank, {strategy}, again", chosen.target, None, spent, same, said, finished_shards_kept=kept)

    def evaluate(self) -> None:
        chosen = load_recipe("recipes/movielens-100k/four-tasks.yaml", [f"model.name={self.model}", *EVALUATED])
        begin = time.monotonic()
        pipeline.run(chosen, self._folder / "run-whole", quiet=True, may_train=False)
        alone = time.monotonic() - begin
        spent = self._finish("eval", self._folder / "run-ray", chosen)
        one, other = (_figures(self._folder / name) for name in ("run-whole", "run-ray"))
        self._found("eval, likelihood and label", self._folder / "run-ray", alone, spent, one == other, [])

    def augment(self) -> None:
        cluster = {"actors": ACTORS, "cpus": CPUS, "gpus": 0, "shards": SHARDS}
        chosen = as_recipe({**augmented(self.model), "ray": cluster})
        begin = time.monotonic()
        whole = augment(chosen, self._folder / "store-whole", quiet=True)
        alone = time.monotonic() - begin
        target = self._folder / "store-ray"
        spent = self._finish("augment", target, chosen)
        same = FeatureStore.open(whole.folder).stamp == FeatureStore.open(target).stamp
        self._found("augment", target, alone, spent, same, [])

    def _finish(self, command: Any, target: Path, recipe: Recipe) -> float:
        begin = time.monotonic()
        finish_on(self.nodes.address, command, target, recipe)
        return time.monotonic() - begin

    def _found(
        self, name: str, target: Path, alone: float | None, spent: float, same: bool, said: list[str], **more: Any
    ) -> None:
        told = [read_json(path, "start again")["told"] for path in finished(target)]
        stages = [each["seconds"] for each in told]
        opening = [sum(each.get(stage, 0.0) for stage in ("start", "data", "model")) for each in stages]
        engines = [
            spent for each in stages for stage, spent in each.items() if stage.startswith("start ") and spent > 0
        ]
        ray: Any = facts.get("ray")
        self.cases.append(
            {
                "case": name,
                "killed": said[0] if said else None,
                "as_one_process": same,
                **more,
                "seconds_one_process": None if alone is None else round(alone, 1),
                "seconds_command": round(spent, 1),
                "actor_seconds": round(ray["actor_seconds"], 1),
                "actors": ray["actors"],
                "nodes": ray["nodes"],
                "engine_starts": len(engines),
                "seconds_to_open_a_shard": round(sum(opening) / len(opening), 2),
                "seconds_to_start_an_engine": round(sum(engines) / len(engines), 2) if engines else None,
                "load": round(os.getloadavg()[0], 1),
            }
        )
        sys.stdout.write(f"{json.dumps(self.cases[-1])}\n")
        sys.stdout.flush()
        self.write()

    def write(self) -> None:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._target.write_text(json.dumps(self.results(), indent=1) + "\n", encoding="utf-8")

    def results(self) -> dict[str, Any]:
        return {
            "command": "make bench NAME=ray",
            "what": f"{REQUESTS} requests, 12 users and 40 texts on a random model of two blocks, hf in float32, "
            f"{SHARDS} shards on {ACTORS} actors of two nodes of Ray on one machine",
            "cases": self.cases,
            "cases_not_run": [name for name in CASES if name not in {each["case"] for each in self.cases}],
            "node_start_seconds": self.nodes.seconds,
            "node_starts_that_ray_gave_up": self.nodes.failed_starts,
            "estimate": estimate(self.cases),
            **provenance(),
            "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("OMP_")},
            "versions": {**versions(), "ray": version("ray")},
        }


def estimate(cases: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Estimate the duration of one GPU-week of work on more GPUs, from measured constants; not measured."""
    plain = [each for each in cases if not each["killed"] and each["seconds_one_process"] is not None]
    if not plain:
        return None
    # The overhead of the command: joining, starting actors, merging.
    fixed = sum(each["seconds_command"] - each["actor_seconds"] / ACTORS for each in plain) / len(plain)
    opening = sum(each["seconds_to_open_a_shard"] for each in plain) / len(plain)
    each_actor = 4
    found = {}
    for gpus in (8, 64):
        total = fixed + WEEK / gpus + each_actor * opening + WEEK / gpus / each_actor
        least = fixed + WEEK / gpus + each_actor * opening
        found[str(gpus)] = {"hours_at_least": round(least / 3600, 2), "hours_at_most": round(total / 3600, 2)}
    return {
        "is": "an estimate: no run on a GPU or on several machines was made",
        "formula": "hours = (fixed + W/g + k*open [+ W/(g*k), where the last shards end one after another]) / 3600",
        "W": WEEK,
        "k": each_actor,
        "fixed_seconds": round(fixed, 1),
        "open_seconds": round(opening, 2),
        "gpus": found,
        "left_out": "the start of an engine on a GPU, data that are read by all nodes at once, GPUs that differ",
    }


def _figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))
    for row in found["rows"]:
        del row["cost"]["seconds"]
    told = {name: found[name] for name in ("rows", "comparisons", "headline")}
    return {**told, "predictions": sha256_of(folder / "predictions.parquet")}


def main() -> None:
    """Start the nodes, run the cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("target", type=Path)
    target = parser.parse_args().target
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # An actor uses the same number of threads as one process, since sums depend on it.
    os.environ["OMP_NUM_THREADS"] = "1"
    # By default Ray lowers the priority of its actors.
    os.environ.update({"RAY_worker_niceness": "0"})
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(folder, target)
        nodes = bench.nodes
        opened.callback(nodes.end)
        nodes.start("head")
        nodes.start("second")

        def kill_actor() -> str:
            found = nodes.actors()
            found[0].kill()
            return f"one of {len(found)} actors"

        def kill_node() -> str:
            count = len(nodes.processes("second"))
            nodes.kill("second")
            return f"one of 2 nodes, {count} processes"

        bench.rank("label")
        bench.rank("likelihood", kill_actor)
        bench.rank("search", kill_node)
        nodes.start("second")
        bench.driver("label")
        bench.evaluate()
        bench.augment()
    failed = [each["case"] for each in bench.cases if not each["as_one_process"]]
    if failed:
        raise SystemExit(f"not as one process: {', '.join(failed)}")


if __name__ == "__main__":
    main()
