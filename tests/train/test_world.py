"""Several processes train like one: equal losses and weights, one writer, and only supported kinds of processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="the train extra is not installed")

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from llmrec import processes
from llmrec.backends.encode import TokenRow
from llmrec.durable import matches_manifest
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline import run as pipeline
from llmrec.recipe.schema import JudgeSection, LoraSection, ModelSection, TrainSection
from llmrec.train import lora, sft
from llmrec.train.batches import plan_steps
from llmrec.train.packing import PackedRows
from llmrec.train.steps import Step
from llmrec.train.world import (
    check_parallelism,
    check_same_inputs,
    connect_processes,
    current_world,
    requested_parallelism,
)
from tests.conftest import encoder_of
from tests.facts import Facts, raises
from tests.train.tiny import examples
from tests.train.together import together

STEPS = 6
# float32 sums in another order: how far the same training may differ from one process to several.
LOSS, WEIGHT = 1e-5, 1e-4


def training(
    model: Path, out: Path, *, width: int | None = None, dtype: str = "float32", **settings: Any
) -> Callable[[], Any]:
    """Return a function that trains for a few steps, alone or as one of several processes."""
    values = {"learning_rate": 1e-2, "valid_every": 3, "save_every": 2, "report_to": (), **settings}
    train = TrainSection(steps=STEPS, lora=LoraSection(rank=4, alpha=8, dropout=0.0), **values)

    def once() -> Any:
        section = ModelSection(name=str(model), dtype=dtype, device="cpu")
        encoder = encoder_of(model)
        rows = [encoder.row(example) for example in examples()[:60]]
        torch.manual_seed(0)
        trained = lora.load_trainable(str(model), section, train)
        # Each step is one packed row, which cannot be divided.
        planned = plan_steps(cycle(rows), steps=STEPS, batch_tokens=width or 160, seed=0, width=width)
        figures = iter((0.5, 0.4, 0.3))
        with connect_processes("cpu"):
            judge = (lambda _: next(figures)) if train.judge and current_world().first else None
            options: Any = {"folder": out, "seed": 0, "quiet": True, "device": "cpu", "judge": judge}
            done = sft.train(trained, encoder, planned, {"rating": rows[:4]}, train, **options)
        return [done.processes, done.distributed, done.steps, [line["loss"] for line in done.log[1:]]]

    return once


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = (out / "adapter").glob("*.safetensors")
    return load_file(file)


def assert_alike(one: Path, two: Path) -> None:
    expected, results = weights(one), weights(two)
    assert expected.keys() <= results.keys()
    worst = max(float((expected[name] - results[name]).abs().max()) for name in expected)
    assert worst < WEIGHT, worst


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"width": 96},
        pytest.param({"method": "full", "learning_rate": 1e-3}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True, "method": "full", "learning_rate": 1e-3}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_like_one(llama_folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    number, kind, steps, losses = training(llama_folder, tmp_path / "one", **settings)()
    assert (number, kind, steps) == (1, "no", STEPS)
    reports = together(2, training(llama_folder, tmp_path / "two", **settings), tmp_path / "reports")
    assert reports[0] == reports[1]
    assert reports[0][:3] == [2, "MULTI_CPU", STEPS]
    assert reports[0][3] == pytest.approx(losses, rel=LOSS)
    assert_alike(tmp_path / "one", tmp_path / "two")
    lines = (tmp_path / "two" / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS + 1))
    assert matches_manifest(tmp_path / "two" / "checkpoints" / f"checkpoint-{STEPS}")


@pytest.mark.slow
def test_training_resumes_in_any_number_of_processes(llama_folder: Path, tmp_path: Path) -> None:
    _, _, _, losses = training(llama_folder, tmp_path / "one")()
    together(2, training(llama_folder, tmp_path / "two"), tmp_path / "first")
    for count in (3, 1):
        torn = tmp_path / "two" / "checkpoints" / f"checkpoint-{STEPS}"
        (torn / "manifest.json").unlink()
        reports = together(count, training(llama_folder, tmp_path / "two"), tmp_path / f"again{count}")
        assert reports[0][3] == pytest.approx(losses, rel=LOSS)
        assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_early_stopping_ends_all_processes(llama_folder: Path, tmp_path: Path) -> None:
    judged = JudgeSection(patience=1)
    reports = together(2, training(llama_folder, tmp_path / "two", judge=judged), tmp_path / "reports")
    assert [each[2] for each in reports] == [3, 3]


def test_killed_process_ends_the_others_with_an_error(llama_folder: Path, tmp_path: Path) -> None:
    once = training(llama_folder, tmp_path / "two")

    def killed() -> Any:
        if processes.rank() == 1:
            count = iter(range(3))
            before = sft.run_in_wrapped_forward

            def run_in_wrapped_forward(*args: Any) -> Any:
                if next(count) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return before(*args)

            sft.run_in_wrapped_forward = run_in_wrapped_forward  # type: ignore[assignment]
        try:
            once()
        except LlmrecError as error:
            return [error.kind, str(error), processes.is_first_to_fail(), processes.is_first_to_fail()]

    reports = together(2, killed, tmp_path / "reports")
    assert reports[1] is None
    assert reports[0][0] == "failed"
    assert "another of the 2 processes ended" in reports[0][1]
    assert reports[0][2:] == [True, False]


def test_rejects_different_data_in_one_process(tmp_path: Path) -> None:
    def differs() -> Any:
        try:
            with connect_processes("cpu") as world:
                check_same_inputs(world, "ab" if world.first else "cd", "training rows")
                world.wait()
        except LlmrecError as error:
            return str(error)

    first, second = together(2, differs, tmp_path / "reports")
    assert "another of the 2 processes ended" in first
    assert "process 1 of 2 has different training rows" in second


ONE_OF_TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "facts"),
    [
        ({"WORLD_SIZE": "2"}, Facts("unsupported", says=("2 processes", "RANK", "--launch"))),
        ({**ONE_OF_TWO, "ACCELERATE_USE_FSDP": "true"}, Facts("unsupported", says=("FSDP", "MULTI_CPU"))),
        ({"ACCELERATE_USE_FSDP": "1"}, Facts("unsupported", says="FSDP")),
        ({**ONE_OF_TWO, "ACCELERATE_USE_DEEPSPEED": "true"}, Facts("unsupported", says="DEEPSPEED")),
        # The environment of accelerate launch for MULTI_CPU without mpirun, which starts only one process.
        (
            {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            Facts("unsupported", says=("starts only one", "torchrun")),
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, Facts("contradiction", column="model.dtype", says="mixed_precision")),
    ],
)
def test_rejects_unsupported_settings_of_accelerate(
    environment: dict[str, str], facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with raises(RecipeError, facts), connect_processes("cpu"):
        pass


def test_rejects_other_kinds_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert requested_parallelism("cpu") == "no"
    check_parallelism("no", "NO")
    for name, value in ONE_OF_TWO.items():
        monkeypatch.setenv(name, value)
    assert requested_parallelism("cpu") == "MULTI_CPU"
    with raises(RecipeError, Facts("mismatch", says=("MULTI_CPU", "has NO"))):
        check_parallelism("MULTI_CPU", "NO")
    with raises(RecipeError, Facts("unsupported", says=("llmrec run", "2", "--launch"))):
        pipeline.run("recipes/demo.yaml", tmp_path / "run")
    assert not list(tmp_path.iterdir())


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 5), st.booleans())
def test_steps_are_divided_by_tokens(lengths: list[int], count: int, packed: bool) -> None:
    rows = tuple(TokenRow((n,) * length, (n,) * length) for n, length in enumerate(lengths))
    step = Step(rows, tuple(PackedRows((row,), len(row.ids)) for row in rows) if packed else ())
    parts = step.split(count)
    assert len(parts) == count
    assert sorted(row.ids for part in parts for row in part.rows) == sorted(row.ids for row in rows)
    assert all(part.rows == tuple(each.rows[0] for each in part.bins) for part in parts) or not packed
    loads = [part.tokens if part.rows else 0 for part in parts]
    assert max(loads) - min(loads) <= max(lengths)
