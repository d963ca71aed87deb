"""Memory of training and models on CPU and GPU: estimates, errors, and a merge that is repeated without training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hub
from safetensors.torch import load_file

from llmrec import machine
from llmrec.cli.estimate import _describe_gpu_memory, training_step_bytes
from llmrec.errors import LlmrecError
from llmrec.models import memory
from llmrec.models.load import load_config, load_model, model_folder_hash
from llmrec.models.memory import (
    EVALUATION_ADVICE,
    TRAINING_ADVICE,
    check_memory,
    convert_memory_errors,
    estimate_cpu_memory,
    place_model,
)
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.runs import open_run
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import LoraSection, ModelSection, Recipe, TrainSection
from llmrec.train import lora, sft
from tests.answer.rank_cases import TRAINED
from tests.facts import Facts, raises
from tests.train.test_merge import base_of

TRAIN = TrainSection(batch_tokens=64)


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(machine, "read_memory", lambda: machine.Memory(total=2**40, available=int(size)))


def needed(folder: Path, dtype: str, train: TrainSection = TRAIN) -> Any:
    section = ModelSection(name=str(folder), dtype=dtype, device="cpu")
    return estimate_cpu_memory(str(folder), load_config(str(folder), section), section, train)


def test_model_in_its_stored_dtype_is_mapped_and_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_merge_needs_its_largest_block_and_joined_tensors(tmp_path: Path) -> None:
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


def test_too_little_memory_is_an_error_and_little_memory_a_warning(
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


def test_with_a_gpu_only_loading_needs_cpu_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_killed_merge_is_repeated_without_training(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def killed(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(lora, "merge_adapter", killed)
        with pytest.raises(MemoryError):
            pipeline.train(recipe, tmp_path, quiet=True)
    record = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    assert record["merged_sha256"] is None
    assert open_run(tmp_path).merged is None
    monkeypatch.setattr(sft, "train", lambda *_, **__: pytest.fail("it trains again"))
    with caplog.at_level(logging.WARNING):
        done = pipeline.train(recipe, tmp_path, quiet=True)
    assert "is complete; merging only" in caplog.text
    assert done["merged_sha256"] == model_folder_hash(str(tmp_path / "merged"))
    assert done["adapter_sha256"] == record["adapter_sha256"]
    # A complete merge is reused, a damaged adapter is not.
    assert pipeline.train(recipe, tmp_path, quiet=True) == done
    (tmp_path / "merged" / "config.json").unlink()
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(pytest.fail.Exception, match="it trains again"):
        pipeline.train(recipe, tmp_path, quiet=True)


def test_memory_is_checked_before_training(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 2**20)
    monkeypatch.setattr(lora, "load_trainable", lambda *_, **__: pytest.fail("a model is loaded"))
    with raises(LlmrecError, Facts("exhausted", column="model.name", says="and merging")):
        pipeline.train(recipe, tmp_path, quiet=True)


GIB = 2**30
BF16 = ModelSection(dtype="bfloat16", device="cpu")
# The shapes of Qwen3-1.7B and of Llama-3-8B.
QWEN = hub.Qwen3Config(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
LLAMA = hub.LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "train", "expected"),
    [
        # Weights and what is kept for backward, by hand; plus adapters of rank 16.
        (QWEN, {"batch_tokens": 1536}, 3.2 + 4.1 + 0.3),
        (QWEN, {"batch_tokens": 8192, "gradient_checkpointing": True}, 3.2 + 0.9 + 0.8 + 0.3),
        (QWEN, {"batch_tokens": 8192, "micro_tokens": 1536}, 3.2 + 4.1 + 0.3),
        (QWEN, {"batch_tokens": 1536, "method": "full"}, 25.6 + 8.2),
        (QWEN, {"batch_tokens": 1536, "method": "full", "optim": "adamw_8bit"}, 16.2 + 1.7 + 8.2),
        (LLAMA, {"batch_tokens": 1536}, 15.0 + 9.4 + 0.6),
        (LLAMA, {"batch_tokens": 1536, "method": "qlora"}, 3.9 + 2.0 + 9.4 + 0.6),
        (LLAMA, {"batch_tokens": 1536, "method": "lora8"}, 6.5 + 2.0 + 9.4 + 0.6),
        (LLAMA, {"batch_tokens": 1536, "lora": {"top_layers": 8}}, 15.0 + 9.4 / 4 + 0.6),
    ],
)
def test_memory_of_a_training_step(config: Any, train: dict[str, Any], expected: float) -> None:
    section = TrainSection(**{**train, "lora": LoraSection(**train.get("lora", {}))})
    assert training_step_bytes(config, BF16, section) / GIB == pytest.approx(expected, abs=0.3)


def test_estimate_is_compared_with_free_memory() -> None:
    assert _describe_gpu_memory(20.0, None) == ""
    assert "22.0 GiB" in _describe_gpu_memory(20.0, 22.0) and "too little" not in _describe_gpu_memory(20.0, 22.0)
    for key in ("train.gradient_checkpointing=true", "train.micro_tokens", "train.method=qlora"):
        assert key in _describe_gpu_memory(27.0, 22.0)


def test_full_gpu_gives_one_line_error_with_advice() -> None:
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which "
    message += "1.10 GiB is free. Including non-PyTorch memory, this process has 22.5 GiB memory in use. See the docs."

    @convert_memory_errors("training", TRAINING_ADVICE, "train.batch_tokens")
    def train(error: Exception) -> None:
        raise error

    says = ("Tried to allocate 2.00 GiB", "1.10 GiB is free", "train.gradient_checkpointing=true")
    for _ in range(2):
        with raises(LlmrecError, Facts("exhausted", column="train.batch_tokens", says=says)):
            train(torch.OutOfMemoryError(message))
    with pytest.raises(RuntimeError, match="another fault"):
        train(RuntimeError("another fault"))
    with (
        raises(LlmrecError, Facts("exhausted", column="eval.batch_tokens", says="memory of the GPU is full")),
        convert_memory_errors("asking the model", EVALUATION_ADVICE, "eval.batch_tokens"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    # An export cannot change the keys of the run that it reads.
    with (
        raises(LlmrecError, Facts("exhausted", column="--check-users", says=("measuring", "fewer"))),
        convert_memory_errors("measuring", "give fewer", "--check-users", instead=True),
        convert_memory_errors("asking the model", EVALUATION_ADVICE, "eval.batch_tokens"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with (
        raises(LlmrecError, Facts("bad-value", says="another fault")),
        convert_memory_errors("measuring", "give fewer", "--check-users", instead=True),
    ):
        raise LlmrecError("another fault", kind="bad-value")


class _Model:
    def __init__(self) -> None:
        self.dtype, self.sent = torch.float32, []  # type: ignore[var-annotated]

    def parameters(self) -> list[Any]:
        return [torch.empty(7 * GIB // 4, device="meta", dtype=self.dtype)]

    def to(self, target: Any) -> _Model:
        self.dtype = target if isinstance(target, torch.dtype) else self.dtype
        self.sent.append(target)
        return self


@pytest.mark.parametrize(
    ("free", "sent"), [(9, ["cuda"]), (7, [torch.bfloat16, "cuda"]), (4, [])], ids=["whole", "half", "CPU"]
)
def test_model_is_placed_where_it_fits(
    free: int, sent: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "free_gpu_bytes", lambda: free * GIB)
    monkeypatch.setattr(memory, "gpu_has_bf16", lambda: True)
    model = _Model()
    assert place_model(model, "cuda") is model and model.sent == sent
    assert len(caplog.messages) == (sent != ["cuda"])
    assert place_model(model, "cpu") is model and model.sent == sent
