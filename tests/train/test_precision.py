"""Half precision: its type on each device, scaled gradients in float16, and adapters without copies of inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from llmrec.errors import RecipeError
from llmrec.recipe.schema import LoraSection, TrainSection
from llmrec.train import precision, sft, world
from llmrec.train.lora import add_lora_adapters
from llmrec.train.loss import label_loss
from tests.facts import Facts, raises
from tests.train.tiny import assert_equal, tear, trained

SHAPE = {
    "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 64, "attn_implementation": "sdpa",
}  # fmt: skip


def test_half_precision_depends_on_gpu_and_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute capability 7.5 only emulates bfloat16; a recipe with float32 gets it on every GPU."""
    model = torch.nn.Linear(2, 2)
    for native, float32, expected in ((True, False, torch.bfloat16), (False, False, torch.float16), (True, True, None)):
        supported = partial(lambda native, including_emulation=True: native or including_emulation, native)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        model.llmrec_float32 = float32
        assert precision.autocast_dtype(model, "cuda") == expected


def test_trained_weights_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "gpu_has_bf16", lambda: False)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).half()
    model[0].requires_grad_(False)
    precision.convert_to_float32(model, "cuda")
    assert (model[0].weight.dtype, model[1].weight.dtype) == (torch.float16, torch.float32)


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Train on the CPU like on a GPU without bfloat16; accelerate itself scales gradients on GPUs only."""

    def half(model: Any, device: str | None = None) -> Any:
        return None if model.llmrec_float32 else torch.float16

    def with_scale(scale: float) -> None:
        original = Accelerator.__init__

        def begin(self: Any, *args: Any, **options: Any) -> None:
            original(self, *args, **options)
            if self.mixed_precision == "fp16":
                self.scaler, self.native_amp = torch.amp.GradScaler("cpu", init_scale=scale), True

        monkeypatch.setattr(precision, "autocast_dtype", half)
        monkeypatch.setattr(sft, "autocast_dtype", half)
        monkeypatch.setattr(Accelerator, "__init__", begin)

    return with_scale


def figures(out: Path) -> list[dict[str, float]]:
    lines = (out / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["figures"] for line in map(json.loads, lines) if "figures" in line]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"width": 96, "packing": "tree", "micro_tokens": 64},
        pytest.param({"method": "full"}, marks=pytest.mark.slow),
        pytest.param({"method": "qlora"}, marks=pytest.mark.slow),
    ],
)
def test_scaled_float16_trains_like_float32(
    settings: dict[str, Any], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turing: Any
) -> None:
    if settings.get("method") == "qlora":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    losses, one = trained(monkeypatch, llama_folder, tmp_path / "one", steps=3, **settings)
    turing(2.0**10)
    scaled, two = trained(monkeypatch, llama_folder, tmp_path / "two", steps=3, dtype="float16", **settings)
    assert scaled == pytest.approx(losses, rel=5e-3)
    # The gradients of trained weights are unscaled before clipping, and in float32.
    assert_equal(one[:1], two[:1], 0.1)
    assert [line["scaler/skipped"] for line in figures(tmp_path / "two")] == [0.0] * 3
    assert not figures(tmp_path / "one")


def test_step_with_overflowing_gradients_is_skipped(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turing: Any
) -> None:
    turing(2.0**40)
    losses, gradients = trained(monkeypatch, llama_folder, tmp_path, steps=3, dtype="float16")
    assert not all(bool(value.isfinite().all()) for value in gradients[0].values())
    results = figures(tmp_path)
    assert [line["scaler/skipped"] for line in results] == [1.0] * 3
    assert [line["scaler/scale"] for line in results] == [2.0**39, 2.0**38, 2.0**37]
    assert all(math.isfinite(loss) for loss in losses)
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    turing(2.0**40)
    trained(monkeypatch, llama_folder, tmp_path / "one", steps=1, dtype="float16")
    (other,) = (tmp_path / "one" / "adapter").glob("*.safetensors")
    assert file.read_bytes() == other.read_bytes()


def test_resumed_run_keeps_the_scale(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turing: Any
) -> None:
    turing(2.0**40)
    settings: dict[str, Any] = {"steps": 4, "dtype": "float16", "save_every": 2}
    trained(monkeypatch, llama_folder, tmp_path, **settings)
    full = figures(tmp_path)
    tear(tmp_path, 4)
    trained(monkeypatch, llama_folder, tmp_path, **settings)
    assert figures(tmp_path) == full


def test_rejects_sharding_of_scaled_gradients() -> None:
    with raises(RecipeError, Facts("unsupported", says="bfloat16")):
        world.check_sharding_settings(None, TrainSection(), plain=True, scaled=True)


def kept(model: Any, *, cast: bool) -> tuple[int, float, list[torch.Tensor]]:
    """Return the bytes stored for the backward pass, the loss and the gradients."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    stored: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.arange(128).remainder(60).view(2, 64)
    model.zero_grad()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
        precision.without_input_casting(model, active=not cast),
    ):
        loss, _ = label_loss(model, ids, ids)
    size = sum(bytes_ for bytes_, _ in stored.values())
    loss.backward()
    return size, float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
def test_adapters_store_no_copies_of_inputs(config: Any) -> None:
    """Saves 8 bytes per token, layer and unit of width: seven linear layers, one of them three times as wide."""
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for layers in (1, 2):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(num_hidden_layers=layers, **SHAPE), dtype=torch.bfloat16)
        model = add_lora_adapters(model, LoraSection(rank=4)).train()
        (size, loss, gradients), (without, same, equal) = kept(model, cast=True), kept(model, cast=False)
        assert loss == same and all(torch.equal(one, two) for one, two in zip(gradients, equal, strict=True))
        sizes[True].append(size)
        sizes[False].append(without)
    one, two = ((sizes[cast][1] - sizes[cast][0]) / 128 / 128 for cast in (True, False))
    assert one - two == pytest.approx(8, abs=0.1)


@pytest.mark.parametrize("dora", [False, True])
def test_training_without_copies_is_equal(
    dora: bool, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"lora": {"rank": 4, "dora": dora}}
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    losses, one = trained(monkeypatch, llama_folder, tmp_path / "one", dtype="bfloat16", **settings)
    calls: list[bool] = []

    def casting(model: Any, *, active: bool) -> Any:
        calls.append(active)
        return precision.without_input_casting(model, active=False)

    monkeypatch.setattr(sft, "without_input_casting", casting)
    same, two = trained(monkeypatch, llama_folder, tmp_path / "two", dtype="bfloat16", **settings)
    assert calls == [True, True] and same == losses
    assert_equal(one, two, 0.0)
    trained(monkeypatch, llama_folder, tmp_path / "three", dtype="float32", **settings)
    assert calls[2:] == [False, False]
