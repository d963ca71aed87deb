"""`llmrec eval --launch`: GPUs of each process, results equal to one process, and errors."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from llmrec.cli.main import app
from llmrec.cli.run import RunOptions
from llmrec.cluster import local
from llmrec.cluster.local import process_environments
from llmrec.data.features import FeatureStore
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline import engines
from llmrec.pipeline.augmenting import augment
from llmrec.pipeline.shards import shard_folder
from llmrec.processes import Program, start_programs
from llmrec.records import Shard
from tests.augment_recipe import augmenting_recipe
from tests.cluster.test_shards import BASE, figures, recipe
from tests.facts import Facts, raises
from tests.spawned import llmrec


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that fakes the GPUs of this process."""
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
        (["A"] * 4, None, 1, 2, ["0", "1"]),
        (["A"] * 4, None, 2, 2, ["0,1", "2,3"]),
        (["A"] * 3, "5, 2,7", 1, 3, ["5", "2", "7"]),
        (["A"] * 2, "GPU-11,GPU-22", 2, 1, ["GPU-11,GPU-22"]),
        # torch stops counting at the first name that is not a GPU.
        (["A"], "3,-1,4", 1, 1, ["3"]),
        # The last GPU, of another type, is not needed.
        (["A", "A", "B"], None, 1, 2, ["0", "1"]),
    ],
)
def test_gpus_of_each_process(
    gpus: Callable[..., None], names: list[str], visible: str | None, parallel: int, count: int, devices: list[str]
) -> None:
    gpus(*names, visible=visible)
    recipe_ = recipe(Path("model"), f"eval.tensor_parallel={parallel}", "eval.backend=vllm")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in process_environments(recipe_, count)] == devices


def test_rejects_too_few_and_mixed_gpus(gpus: Callable[..., None]) -> None:
    gpus(*["A"] * 3)
    with raises(RecipeError, Facts("unsupported", column="--launch", says=("need 4 GPUs", "3 are", "--launch 3"))):
        process_environments(recipe(Path("model")), 4)
    pairs = recipe(Path("model"), "eval.tensor_parallel=2", "eval.backend=vllm")
    with raises(RecipeError, Facts("unsupported", column="--launch", says=("2 GPUs each", "--launch 1"))):
        process_environments(pairs, 2)
    gpus("A", "B")
    with raises(RecipeError, Facts("unsupported", column="--launch", says=("A, B", "CUDA_VISIBLE_DEVICES"))):
        process_environments(recipe(Path("model")), 2)


def test_no_gpus_without_a_local_engine_on_a_gpu(gpus: Callable[..., None]) -> None:
    gpus("A", "B")
    server = "eval.server={url: 'http://127.0.0.1:1/v1', model: m}"
    for changed in (("model.device=cpu",), ("eval.backend=openai", server)):
        assert not any(
            "CUDA_VISIBLE_DEVICES" in each for each in process_environments(recipe(Path("model"), *changed), 3)
        )


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(engines, "device", lambda _: "cpu")
    monkeypatch.setattr(local.machine, "read_processor", lambda: type("P", (), {"usable": 8}))
    environments = process_environments(recipe(Path("model")), 3)
    assert [each["OMP_NUM_THREADS"] for each in environments] == ["2"] * 3
    assert not any("CUDA_VISIBLE_DEVICES" in each for each in environments)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert process_environments(recipe(Path("model")), 2)[0]["OMP_NUM_THREADS"] == "5"


_WAITS = "import time; time.sleep(600)"
# Leaves a process running, as an engine with a separate process does.
_LEAVES = (
    "import subprocess, sys, os, signal; child = subprocess.Popen([sys.executable, '-c', 'import time; "
    "time.sleep(600)']); print(child.pid, file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
)


def program(code: str, log: Path) -> Program:
    return Program(("-c", code), {}, log)


def ends(process: int, patience: float = 60.0) -> bool:
    """Return whether a process ends in time."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_killed_process_stops_all_processes_and_its_children(tmp_path: Path) -> None:
    from llmrec.processes import ProcessEnded

    programs = [program(_WAITS, tmp_path / "1"), program(_LEAVES, tmp_path / "2")]
    before = set(psutil.Process().children())
    with pytest.raises(ProcessEnded) as caught, start_programs(programs) as output:
        list(output)
    assert (caught.value.first.process, caught.value.first.status) == (1, -signal.SIGKILL)
    assert "was stopped by SIGKILL" in caught.value.first.why and not set(psutil.Process().children()) - before
    assert ends(int((tmp_path / "2").read_text()))


def test_worker_ends_with_its_parent(tmp_path: Path) -> None:
    worker = "from llmrec.processes import end_with_parent; end_with_parent(); print(1, flush=True); " + _WAITS
    parent = (
        "from pathlib import Path; from llmrec.processes import Program, start_programs\n"
        f"with start_programs([Program(('-c', {worker!r}), {{}}, Path({str(tmp_path / 'log')!r}))]) as lines:\n"
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


def start_command(
    model: Path, out: Path, *options: str, command: str = "eval", **environment: str
) -> subprocess.Popen[str]:
    line = [command, "recipes/movielens-100k/four-tasks.yaml", f"model.name={model}", *BASE, *options]
    return llmrec(*line, "--out", str(out), **environment)


def wait_for(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=600)
    return process.returncode, output, errors


@pytest.mark.slow
def test_launched_processes_equal_one_process_and_resume(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    single, out = tmp_path / "whole", tmp_path / "run"
    code, _, errors = wait_for(start_command(llama_folder, single))
    assert code == 0, errors
    code, output, errors = wait_for(start_command(llama_folder, out, "--launch", "2", "--json"))
    assert code == 0, errors
    assert json.loads(output)["headline"] == json.loads((single / "results.json").read_text("utf-8"))["headline"]
    assert figures(out) == figures(single)
    assert (out / "predictions.parquet").read_bytes() == (single / "predictions.parquet").read_bytes()

    # Finished shards and stored answers are reused, also with another number of processes.
    shards = [shard_folder(out, Shard(number, 2)) for number in (1, 2)]
    before = [(folder / "shard.json").stat().st_mtime_ns for folder in shards]
    assert wait_for(start_command(llama_folder, out, "--launch", "3"))[0] == 0
    assert [(folder / "shard.json").stat().st_mtime_ns for folder in shards] == before
    assert not shard_folder(out, Shard(1, 3)).exists()
    code, output, errors = wait_for(start_command(llama_folder, single, "--launch", "2"))
    assert code == 0 and "start hf" not in shard_folder(single, Shard(1, 2)).joinpath("shard.json").read_text("utf-8")
    assert figures(single) == figures(out)


@pytest.mark.slow
def test_run_trains_and_evaluates_with_all_processes(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    small = ("train.steps=2", "train.batch_tokens=512", "train.lora.top_layers=1", "eval.arms=[zero-shot, tuned]")
    out, single = tmp_path / "run", tmp_path / "whole"
    code, _, errors = wait_for(
        start_command(llama_folder, out, *small, "eval.fusion={}", "--launch", "2", command="run")
    )
    assert code == 0, errors
    result = json.loads((out / "results.json").read_text("utf-8"))
    assert result["training"]["processes"] == 2 and {row["arm"] for row in result["rows"]} >= {"zero-shot", "tuned"}
    # One process gives the same results for this model.
    shutil.copytree(out, single, ignore=shutil.ignore_patterns("answers.sqlite*", "rows", "results.json"))
    code, _, errors = wait_for(start_command(llama_folder, single, *small, "eval.fusion={}"))
    assert code == 0, errors
    assert figures(out) == figures(single)


@pytest.mark.slow
def test_run_writes_texts_with_all_processes(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    recipe_ = augmenting_recipe(llama_folder, batch=2, model_dtype="float32")
    recipe_ = recipe_.model_copy(update={"eval": recipe_.eval.model_copy(update={"arms": ()})})
    single = augment(recipe_, tmp_path / "whole", quiet=True)
    done = local.run_locally(recipe_, tmp_path / "run", RunOptions(recipe="not read", launch=2))
    assert FeatureStore.open(tmp_path / "run" / "features").stamp == FeatureStore.open(single.folder).stamp
    assert shard_folder(tmp_path / "run" / "features", Shard(2, 2)).exists() and done.rows


def test_killed_worker_is_one_error_with_its_log(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(words: object, environment: dict[str, str], log: Path) -> Program:
        code = "import os, sys; print('last message', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
        return Program(("-c", code if log.name == "process-2.log" else _WAITS), environment, log)

    monkeypatch.setattr(local.processes, "Program", killed)
    with pytest.raises(LlmrecError, match="process 2 of 2 was stopped by SIGKILL") as caught:
        local.evaluate_locally(recipe(llama_folder), tmp_path / "run", 2)
    assert Path(str(caught.value.file)).name == "process-2.log" and "last message" in str(caught.value)


def test_signal_stops_all_processes(llama_folder: Path, tmp_path: Path) -> None:
    process = start_command(llama_folder, tmp_path / "run", "--launch", "2")
    workers: list[Any] = []
    while len(workers) < 2:
        assert process.poll() is None, process.communicate()
        workers = psutil.Process(process.pid).children()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, output, errors = wait_for(process)
    assert (code, output) == (128 + signal.SIGTERM, "")
    assert errors.count("the same command resumes: llmrec eval") == 1 and "--launch 2" in errors
    assert "Traceback" not in errors and all(ends(worker.pid) for worker in workers)


def test_error_of_a_worker_is_raised(tmp_path: Path) -> None:
    with raises(LlmrecError, Facts("failed", says=("nowhere does not exist", "process-1.log"))):
        local.evaluate_locally(recipe(tmp_path / "nowhere"), tmp_path / "run", 1)


def test_launch_and_shard_exclude_each_other(llama_folder: Path, tmp_path: Path) -> None:
    options = ["--launch", "2", "--shard", "1/2", "--out", str(tmp_path / "run")]
    with pytest.raises(LlmrecError, match="--shard and --launch"):
        CliRunner().invoke(app, ["eval", "recipes/movielens-100k/four-tasks.yaml", *options], catch_exceptions=False)
    with raises(LlmrecError, Facts("unsupported", column="eval.arms")):
        local.evaluate_locally(recipe(llama_folder, "eval.arms=[]"), tmp_path / "run", 2)
