"""CPU memory of a training: the estimate, the error before training, and the merge that is repeated alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmrec import machine
from llmrec.errors import LlmrecError
from llmrec.models.load import load_config, load_model, weights_stamp
from llmrec.models.memory import check_memory, cpu_memory
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.runs import open_run
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import ModelSection, Recipe, TrainSection
from llmrec.train import lora, sft
from tests.answer.rank_cases import TRAINED
from tests.facts import Facts, raises
from tests.train.test_merge import base_of

TRAIN = TrainSection(batch_tokens=64)


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(total=2**40, available=int(size)))


def needed(folder: Path, dtype: str, train: TrainSection = TRAIN) -> Any:
    section = ModelSection(name=str(folder), dtype=dtype, device="cpu")
    return cpu_memory(str(folder), load_config(str(folder), section), section, train)


def test_a_model_in_its_stored_dtype_is_mapped_and_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base_of("llama", tmp_path)
    weights = sum(p.numel() for p in load_model(str(folder), ModelSection(name=str(folder))).parameters())
    assert needed(folder, "bfloat16").loading == 0
    assert needed(folder, "float32").loading == 4 * weights
    assert needed(folder, "bfloat16", TrainSection(method="full")).loading == 4 * weights
    alone = needed(folder, "bfloat16").training
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert needed(folder, "float32").loading == 16 * weights
    assert needed(folder, "bfloat16").training == pytest.approx(4 * alone - 3 * 2 * weights)
    # Two machines with two processes each.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert needed(folder, "float32").loading == 8 * weights


def test_the_merge_takes_its_largest_block_and_joined_tensors_are_read_first(tmp_path: Path) -> None:
    folder = base_of("llama", tmp_path)
    model = load_model(str(folder), ModelSection(name=str(folder)))
    table = model.get_input_embeddings().weight.numel()
    layer = sum(parameter.numel() for parameter in model.get_decoder().layers[0].parameters())
    assert needed(folder, "bfloat16").merging == 12 * max(table, layer)
    experts = base_of("qwen3-moe", tmp_path)
    joined = [item.numel() for name, item in load_file(experts / "model.safetensors").items() if ".experts." in name]
    size = needed(experts, "bfloat16")
    assert len(joined) > 8 and size.merging > size.loading == 2 * sum(joined)
    soft = TrainSection(method="prompt")
    assert needed(folder, "bfloat16", soft).merging == 4 * sum(p.numel() for p in model.parameters())


def test_too_little_memory_is_an_error_before_training_and_a_tight_step_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = base_of("llama", tmp_path)
    section = ModelSection(name=str(folder), dtype="float32", device="cpu")
    config, size = load_config(str(folder), section), needed(folder, "float32")
    free(monkeypatch, max(size.loading, size.merging) - 1)
    with raises(LlmrecError, Facts("exhausted", column="model.name", says=("GiB", "smaller model.name"))):
        check_memory(str(folder), config, section, TRAIN)
    free(monkeypatch, size.training - 1)
    assert size.training - 1 > max(size.loading, size.merging)
    with caplog.at_level(logging.WARNING):
        check_memory(str(folder), config, section, TRAIN)
    assert "too little" in caplog.text
    caplog.clear()
    free(monkeypatch, 2 * size.training)
    check_memory(str(folder), config, section, TRAIN)
    assert not caplog.text


def test_a_gpu_needs_the_memory_to_load_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base_of("llama", tmp_path, torch.float32)
    monkeypatch.setattr("llmrec.models.memory.device", lambda _: "cuda")
    size = needed(folder, "bfloat16")
    assert size.training == size.loading > 0
    assert needed(folder, "bfloat16", TrainSection(method="qlora")).loading == 0
    assert needed(folder, "float32", TrainSection(method="full")).training == 0


@pytest.fixture
def recipe(llama_folder: Path) -> Recipe:
    changes = [f"model.name={llama_folder}", *TRAINED, "train.steps=3", "model.dtype=float32"]
    return load_recipe("recipes/movielens-100k/four-tasks.yaml", changes)


def test_a_killed_merge_is_repeated_without_training(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def killed(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(lora, "merge", killed)
        with pytest.raises(MemoryError):
            pipeline.train(recipe, tmp_path, quiet=True)
    record = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    assert record["merged_sha256"] is None
    assert open_run(tmp_path).merged is None
    monkeypatch.setattr(sft, "train", lambda *_, **__: pytest.fail("it trains again"))
    with caplog.at_level(logging.WARNING):
        done = pipeline.train(recipe, tmp_path, quiet=True)
    assert "is complete; merging only" in caplog.text
    assert done["merged_sha256"] == weights_stamp(str(tmp_path / "merged"))
    assert done["adapter_sha256"] == record["adapter_sha256"]
    # What merged now is reused, and an adapter that is damaged is not.
    assert pipeline.train(recipe, tmp_path, quiet=True) == done
    (tmp_path / "merged" / "config.json").unlink()
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(pytest.fail.Exception, match="it trains again"):
        pipeline.train(recipe, tmp_path, quiet=True)


def test_memory_is_compared_before_training(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 2**20)
    monkeypatch.setattr(lora, "load_trainable", lambda *_, **__: pytest.fail("a model is loaded"))
    with raises(LlmrecError, Facts("exhausted", column="model.name", says="and merging")):
        pipeline.train(recipe, tmp_path, quiet=True)
