"""Weights that FSDP2 shards across processes, on the CPU, which accelerate treats as a GPU."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="the train extra is not installed")

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from llmrec.durable import matches_manifest
from llmrec.errors import LlmrecError, RecipeError
from llmrec.recipe.schema import TrainSection
from llmrec.train import sft, world
from llmrec.train.world import SHARDED
from tests.facts import Facts, raises
from tests.train.test_item_tokens import untied
from tests.train.test_world import LOSS, STEPS, assert_alike, training, weights
from tests.train.together import together

# The accelerate configuration of docs/scaling.md, as accelerate launch passes it on.
SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def as_on_gpus() -> None:
    """Let accelerate shard weights on the CPU, in this process."""
    warnings.simplefilter("ignore")
    os.environ.update(SETTINGS)
    original = PartialState.__init__

    def begin(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin
    sft.requested_parallelism = world.requested_parallelism = lambda device: SHARDED


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"method": "full", "learning_rate": 1e-3}])
def test_trainer_shards_a_model_and_resumes_in_other_numbers_of_processes(
    llama_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    _, _, _, losses = training(llama_folder, tmp_path / "one", **settings)()

    def divided() -> Any:
        as_on_gpus()
        return training(llama_folder, tmp_path / "two", **settings)()

    last = tmp_path / "two" / "checkpoints" / f"checkpoint-{STEPS}"
    for count in (2, 3):
        reports = together(count, divided, tmp_path / f"reports{count}")
        assert reports[0][:3] == [count, SHARDED, STEPS]
        assert reports[0][3] == pytest.approx(losses, rel=LOSS)
        assert_alike(tmp_path / "one", tmp_path / "two")
        assert matches_manifest(last)
        # A run that was killed before its last checkpoint was sealed.
        (last / "manifest.json").unlink()

    def alone() -> Any:
        try:
            training(llama_folder, tmp_path / "two", **settings)()
        except LlmrecError as error:
            return str(error)

    (message,) = together(1, alone, tmp_path / "alone")
    assert "was saved with FSDP" in message


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untied(tmp_path_factory.mktemp("untied"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "dtype", "near", "settings"),
    [
        (False, "float32", LOSS, {"micro_tokens": 48}),
        (False, "float32", LOSS, {"method": "full", "learning_rate": 1e-3}),
        (True, "bfloat16", 1e-2, {"method": "full", "learning_rate": 1e-3}),
        (False, "bfloat16", 1e-2, {}),
    ],
)
def test_untied_heads_and_half_precision_are_sharded(
    tied: bool,
    dtype: str,
    near: float,
    settings: dict[str, Any],
    llama_folder: Path,
    untied_folder: Path,
    tmp_path: Path,
) -> None:
    """A base in bfloat16 with adapters in float32, and a head whose weight is read outside its module."""
    folder = llama_folder if tied else untied_folder
    _, _, _, losses = training(folder, tmp_path / "one", dtype=dtype, **settings)()

    def divided() -> Any:
        as_on_gpus()
        return training(folder, tmp_path / "two", dtype=dtype, **settings)()

    reports = together(2, divided, tmp_path / "reports")
    assert reports[0][:3] == [2, SHARDED, STEPS]
    assert reports[0][3] == pytest.approx(losses, rel=near)
    if dtype == "float32":
        assert_alike(tmp_path / "one", tmp_path / "two")
    kinds = {value.dtype for name, value in weights(tmp_path / "two").items() if settings or "lora" in name}
    assert kinds == {torch.float32}


@pytest.mark.parametrize(
    ("changed", "settings"),
    [
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}),
        ({"FSDP_VERSION": "1"}, {}),
        ({}, {"method": "qlora"}),
        ({}, {"judge": {}}),
    ],
)
def test_rejects_settings_that_cannot_be_sharded(
    changed: dict[str, str], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SETTINGS, **changed}.items():
        monkeypatch.setenv(name, value)
    with raises(RecipeError, Facts("unsupported")), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world.check_sharding_settings(FullyShardedDataParallelPlugin(), TrainSection(**settings), plain=True)
