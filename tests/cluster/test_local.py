"""`llmrec eval --launch`: which process has which GPUs, the figures of one process, and one error whatever fails."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmrec.cli.run import RunOptions
from llmrec.cluster import local
from llmrec.cluster.local import environments_of
from llmrec.data.features import FeatureStore
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline import engines
from llmrec.pipeline.augmenting import augment
from llmrec.pipeline.shards import shard_folder
from llmrec.processes import Program, started
from llmrec.records import Shard
from tests.augment_recipe import augmenting_recipe
from tests.cluster.test_shards import BASE, figures, recipe
from tests.facts import Facts, raises
from tests.spawned import llmrec

# --------------------------------------------------------------------------- GPUs and cores


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes torch and this process see GPUs."""
    torch = pytest.importorskip("torch")

    def see(*names: str, visible: str | None = None) -> None:
        monkeypatch.setattr(engines, "device", lambda model: "cpu" if model.device == "cpu" else "cuda")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return see


@pytest.mark.parametrize(
    ("names", "visible", "parallel", "count", "devices"),
    [
        (["A"] * 4, None, 1, 4, ["0", "1", "2", "3"]),
        (["A"] * 4, None, 1, 2, ["0", "1"]),
        (["A"] * 4, None, 2, 2, ["0,1", "2,3"]),
        (["A"] * 3, "5, 2,7", 1, 3, ["5", "2", "7"]),
        (["A"] * 2, "GPU-11,GPU-22", 2, 1, ["GPU-11,GPU-22"]),
        # torch counts up to the first name that is no GPU.
        (["A"], "3,-1,4", 1, 1, ["3"]),
        # The last GPU, of another kind, is not needed.
        (["A", "A", "B"], None, 1, 2, ["0", "1"]),
    ],
)
def test_each_process_has_gpus_of_its_own(
    gpus: Callable[..., None],
    names: Sequence[str],
    visible: str | None,
    parallel: int,
    count: int,
    devices: Sequence[str],
) -> None:
    gpus(*names, visible=visible)
    asked = recipe(Path("model"), f"eval.tensor_parallel={parallel}", "eval.backend=vllm")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments_of(asked, count)] == devices


def test_too_few_gpus_and_gpus_of_two_kinds_are_refused(gpus: Callable[..., None]) -> None:
    gpus(*["A"] * 3)
    with raises(RecipeError, Facts("unsupported", column="--launch", says=("need 4 GPUs", "3 are", "--launch 3"))):
        environments_of(recipe(Path("model")), 4)
    pairs = recipe(Path("model"), "eval.tensor_parallel=2", "eval.backend=vllm")
    with raises(RecipeError, Facts("unsupported", column="--launch", says=("2 GPUs each", "--launch 1"))):
        environments_of(pairs, 2)
    gpus("A", "B")
    with raises(RecipeError, Facts("unsupported", column="--launch", says=("A, B", "CUDA_VISIBLE_DEVICES"))):
        environments_of(recipe(Path("model")), 2)


def test_what_uses_no_gpu_gets_none(gpus: Callable[..., None]) -> None:
    gpus("A", "B")
    server = "eval.server={url: 'http://127.0.0.1:1/v1', model: m}"
    for changed in (("model.device=cpu",), ("eval.backend=openai", server)):
        assert not any("CUDA_VISIBLE_DEVICES" in each for each in environments_of(recipe(Path("model"), *changed), 3))


def test_without_gpus_the_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(engines, "device", lambda _: "cpu")
    monkeypatch.setattr(local.machine, "processor", lambda: type("P", (), {"usable": 8}))
    environments = environments_of(recipe(Path("model")), 3)
    assert [each["OMP_NUM_THREADS"] for each in environments] == ["2"] * 3
    assert not any("CUDA_VISIBLE_DEVICES" in each for each in environments)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environments_of(recipe(Path("model")), 2)[0]["OMP_NUM_THREADS"] == "5"


# --------------------------------------------------------------------------- processes

_WAITS = "import sys, time; print('begun', flush=True); time.sleep(600)"
# Leaves a process behind, as an engine does that runs in a process of its own.
_LEAVES = (
    "import subprocess, sys, os, signal; child = subprocess.Popen([sys.executable, '-c', 'import time; "
    "time.sleep(600)']); print(child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
)


def program(code: str, log: Path) -> Program:
    return Program(("-c", code), {}, log)


def ends(process: int, patience: float = 60.0) -> bool:
    """Whether a process ends in time."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_all_are_stopped_when_one_is_killed_and_what_it_started(tmp_path: Path) -> None:
    from llmrec.processes import ProcessEnded

    programs = [program(_WAITS, tmp_path / "1"), program(_LEAVES, tmp_path / "2")]
    lines, before = [], set(psutil.Process().children())
    with pytest.raises(ProcessEnded) as caught, started(programs) as output:
        lines.extend(line for line in output)
    assert (caught.value.first.process, caught.value.first.status) == (1, -signal.SIGKILL)
    assert "was stopped by SIGKILL" in caught.value.first.why and not set(psutil.Process().children()) - before
    orphans = [int(line) for line in lines if line.strip().isdigit()]
    assert all(ends(process) for process in orphans)


def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    worker = "from llmrec.processes import end_with_parent; end_with_parent(); " + _WAITS
    parent = (
        "from pathlib import Path; from llmrec.processes import Program, started\n"
        f"with started([Program(('-c', {worker!r}), {{}}, Path({str(tmp_path / 'log')!r}))]) as lines:\n"
        "    import psutil; next(lines)\n"
        "    print(psutil.Process().children()[0].pid, flush=True)\n"
        "    list(lines)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.communicate()
    assert ends(child)


# --------------------------------------------------------------------------- evaluations


def begun(model: Path, out: Path, *words: str, command: str = "eval", **environment: str) -> subprocess.Popen[str]:
    line = [command, "recipes/movielens-100k/four-tasks.yaml", f"model.name={model}", *BASE, *words]
    return llmrec(*line, "--out", str(out), **environment)


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=600)
    return process.returncode, output, errors


@pytest.mark.slow
def test_launched_processes_have_the_figures_of_one_and_resume(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    whole, out = tmp_path / "whole", tmp_path / "run"
    code, _, errors = finished(begun(llama_folder, whole))
    assert code == 0, errors
    code, output, errors = finished(begun(llama_folder, out, "--launch", "2", "--json"))
    assert code == 0, errors
    assert json.loads(output)["headline"] == json.loads((whole / "results.json").read_text("utf-8"))["headline"]
    assert figures(out) == figures(whole)
    assert (out / "predictions.parquet").read_bytes() == (whole / "predictions.parquet").read_bytes()

    # Finished shards are not made again, with another number of processes either, nor answers of the run folder.
    shards = [shard_folder(out, Shard(number, 2)) for number in (1, 2)]
    before = [(folder / "shard.json").stat().st_mtime_ns for folder in shards]
    assert finished(begun(llama_folder, out, "--launch", "3"))[0] == 0
    assert [(folder / "shard.json").stat().st_mtime_ns for folder in shards] == before
    assert not shard_folder(out, Shard(1, 3)).exists()
    code, output, errors = finished(begun(llama_folder, whole, "--launch", "2"))
    assert code == 0 and "start hf" not in shard_folder(whole, Shard(1, 2)).joinpath("shard.json").read_text("utf-8")
    assert figures(whole) == figures(out)


@pytest.mark.slow
def test_run_trains_and_evaluates_with_all_processes(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    small = ("train.steps=2", "train.batch_tokens=512", "train.lora.top_layers=1", "eval.arms=[zero-shot, tuned]")
    out, whole = tmp_path / "run", tmp_path / "whole"
    code, _, errors = finished(begun(llama_folder, out, *small, "eval.fusion={}", "--launch", "2", command="run"))
    assert code == 0, errors
    result = json.loads((out / "results.json").read_text("utf-8"))
    assert result["training"]["processes"] == 2 and {row["arm"] for row in result["rows"]} >= {"zero-shot", "tuned"}
    # One process evaluates the same model to the same figures.
    shutil.copytree(out, whole, ignore=shutil.ignore_patterns("answers.sqlite*", "rows", "results.json"))
    code, _, errors = finished(begun(llama_folder, whole, *small, "eval.fusion={}"))
    assert code == 0, errors
    assert figures(out) == figures(whole)


@pytest.mark.slow
def test_run_writes_texts_with_all_processes(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    chosen = augmenting_recipe(llama_folder, batch=2, model_dtype="float32")
    chosen = chosen.model_copy(update={"eval": chosen.eval.model_copy(update={"arms": ()})})
    whole = augment(chosen, tmp_path / "whole", quiet=True)
    done = local.run_here(chosen, tmp_path / "run", RunOptions(recipe="not read", launch=2))
    assert FeatureStore.open(tmp_path / "run" / "features").stamp == FeatureStore.open(whole.folder).stamp
    assert shard_folder(tmp_path / "run" / "features", Shard(2, 2)).exists() and done.rows


def test_a_killed_process_is_one_error_and_its_log_is_named(llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = begun(llama_folder, out, "--launch", "2")
    workers: list[Any] = []
    while len(workers) < 2:
        assert process.poll() is None, process.communicate()
        workers = [each for each in psutil.Process(process.pid).children() if "llmrec.cluster.local" in each.cmdline()]
        time.sleep(0.02)
    second = next(each for each in workers if each.cmdline()[-1] == "2")
    second.send_signal(signal.SIGKILL)
    code, output, errors = finished(process)
    assert (code, output) == (2, "")
    message = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and "process 2 of 2 was stopped by SIGKILL" in message[0]
    assert f"{out.name}.shards/process-2.log" in message[0] and "Traceback" not in errors
    assert all(ends(worker.pid) for worker in workers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_processes(llama_folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = begun(llama_folder, tmp_path / "run", "--launch", "2")
    workers: list[Any] = []
    while len(workers) < 2:
        assert process.poll() is None, process.communicate()
        workers = psutil.Process(process.pid).children()
        time.sleep(0.02)
    process.send_signal(number)
    code, output, errors = finished(process)
    assert (code, output) == (128 + number, "")
    assert errors.count("the same command resumes: llmrec eval") == 1 and "--launch 2" in errors
    assert "Traceback" not in errors and all(ends(worker.pid) for worker in workers)


def test_what_a_shard_reports_is_said_once(tmp_path: Path) -> None:
    code, output, errors = finished(begun(tmp_path / "nowhere", tmp_path / "run", "--launch", "2"))
    assert (code, output) == (2, "")
    (message,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "nowhere does not exist" in message and "process-" in message


def test_launch_and_shard_exclude_each_other(llama_folder: Path, tmp_path: Path) -> None:
    code, _, errors = finished(begun(llama_folder, tmp_path / "run", "--launch", "2", "--shard", "1/2"))
    assert code == 2 and "--shard and --launch" in errors
    with raises(LlmrecError, Facts("unsupported", column="eval.arms")):
        local.evaluate_here(recipe(llama_folder, "eval.arms=[]"), tmp_path / "run", 2)
