"""Recomputed and compiled layers, Liger's kernels, and optimisers: results of training do not change."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.models.llama import modeling_llama

from llmrec.errors import MissingExtra, RecipeError
from llmrec.recipe.schema import ModelSection, TrainSection
from llmrec.train import checkpoint, precision, sft, world
from llmrec.train import lora as lora_module
from llmrec.train.kernels import enable_gradient_checkpointing, use_faster_layers
from llmrec.train.lora import check_method_support
from llmrec.train.loss import label_loss
from tests.facts import Facts, raises
from tests.train.test_world import LOSS, assert_alike, training
from tests.train.tiny import assert_equal, tear, trained
from tests.train.together import together

OPTIMISERS = ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor")
TREE = {"width": 96, "packing": "tree"}


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("lora", "bfloat16"),
        pytest.param("lora", "float32", marks=pytest.mark.slow),
        pytest.param("qlora", "bfloat16", marks=pytest.mark.slow),
        pytest.param("full", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_recomputed_layers_have_equal_losses_and_gradients(
    method: str, dtype: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    settings: dict[str, Any] = {"dtype": dtype, "method": method, **TREE}
    losses, one = trained(monkeypatch, llama_folder, tmp_path / "one", **settings)
    again, two = trained(monkeypatch, llama_folder, tmp_path / "two", gradient_checkpointing=True, **settings)
    assert again == losses
    assert_equal(one, two, 0.0)


def counted(model: Any) -> list[int]:
    """Make a model count the forward passes of its layers."""
    counts = [0] * len(model.get_decoder().layers)

    def count(n: int) -> Any:
        def hook(*_: Any) -> None:
            counts[n] += 1

        return hook

    for n, layer in enumerate(model.get_decoder().layers):
        layer.mlp.register_forward_pre_hook(count(n))
    return counts


@pytest.mark.parametrize("top", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_only_layers_with_a_backward_pass_are_recomputed(
    top: int, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "convert_to_float32", lambda model, device: counts.append(counted(model.get_base_model())))
    counts: list[list[int]] = []
    settings: dict[str, Any] = {"lora": {"rank": 4, "top_layers": top}, "steps": 1}
    losses, one = trained(monkeypatch, llama_folder, tmp_path / "one", **settings)
    again, two = trained(monkeypatch, llama_folder, tmp_path / "two", gradient_checkpointing=True, **settings)
    assert counts == [[1, 1], [1, 2] if top == 1 else [2, 2]]
    assert again == losses
    assert_equal(one, two, 0.0)


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("eager", {}),
        pytest.param("aot_eager", {"gradient_checkpointing": True, **TREE}, marks=pytest.mark.slow),
        pytest.param("aot_eager", {"method": "full"}, marks=pytest.mark.slow),
        pytest.param("inductor", TREE, marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_have_equal_losses(
    backend: str, settings: dict[str, Any], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("no compiler")
    torch._dynamo.reset()
    original, compiled = torch.nn.Module.compile, []

    def compile_(self: Any, *args: Any, **options: Any) -> None:
        compiled.append(type(self).__name__)
        original(self, *args, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    losses, one = trained(monkeypatch, llama_folder, tmp_path / "one", steps=3, **settings)
    assert compiled == []
    again, two = trained(monkeypatch, llama_folder, tmp_path / "two", steps=3, torch_compile=True, **settings)
    assert compiled == ["LlamaDecoderLayer"] * 2
    assert again == pytest.approx(losses, rel=1e-5)
    assert_equal(one[:1], two[:1], 1e-4)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_layers_train_in_two_processes(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiling takes minutes if other programs use the cores.
    monkeypatch.setattr("tests.train.together._PATIENCE", 600.0)
    _, _, _, losses = training(llama_folder, tmp_path / "one")()

    def compiled() -> Any:
        original = torch.nn.Module.compile
        torch.nn.Module.compile = lambda self, **named: original(self, backend="aot_eager", **named)
        return training(llama_folder, tmp_path / "two", torch_compile=True)()

    reports = together(2, compiled, tmp_path / "reports")
    assert all(report[3] == pytest.approx(losses, rel=LOSS) for report in reports)
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_one_compiled_graph_serves_all_layers_and_lengths(llama_folder: Path) -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True, backend=backend)
    for length in (7, 9, 12, 30):
        ids = torch.arange(3 * length).remainder(60).view(3, length)
        label_loss(model, ids, ids)[0].backward()
    assert len(graphs) <= 3, len(graphs)
    torch._dynamo.reset()


def fake_liger(monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]) -> None:
    """Stand in for liger-kernel, which needs Triton and a GPU."""

    def patch(model: Any, rope: bool = True, rms_norm: bool = True, swiglu: bool = True, **losses: bool) -> None:
        modeling_llama.apply_rotary_pos_emb = None
        calls.append({"model": model, "rope": rope, "rms_norm": rms_norm, "swiglu": swiglu, **losses})

    def instance(model: Any, **options: Any) -> None:
        patch(model=model, **options)

    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    patches = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": patch}  # type: ignore[attr-defined]
    transformers._apply_liger_kernel_to_instance = instance  # type: ignore[attr-defined]
    for module in (package, transformers, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)


def tiny(config: Any = LlamaConfig) -> Any:
    width = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return AutoModelForCausalLM.from_config(config(**width, **layers))


def test_liger_replaces_layers_during_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    fake_liger(monkeypatch, calls)
    section, before, model = TrainSection(use_liger_kernel=True), modeling_llama.apply_rotary_pos_emb, tiny()
    with use_faster_layers(model, section):
        assert modeling_llama.apply_rotary_pos_emb is None
    assert modeling_llama.apply_rotary_pos_emb is before
    layers = {"rope": True, "rms_norm": True, "swiglu": True}
    assert calls == [{"model": model, **layers, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    with use_faster_layers(model, TrainSection()):
        pass
    assert len(calls) == 1
    wrong = Facts("unsupported", column="train.use_liger_kernel", says="qwen3")
    with raises(RecipeError, wrong), use_faster_layers(tiny(Qwen3Config), section):
        pass


def test_rejects_kernels_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    liger, compiled = TrainSection(use_liger_kernel=True), TrainSection(torch_compile=True)
    with raises(RecipeError, Facts("unsupported", column="train.use_liger_kernel", says="CUDA")):
        check_method_support(ModelSection(device="cpu"), liger)
    monkeypatch.setattr(lora_module, "device", lambda model: "cuda")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with raises(MissingExtra, Facts("not-installed", says="llmrec[liger]")):
        check_method_support(ModelSection(), liger)
    monkeypatch.setattr(lora_module, "shutil", SimpleNamespace(which=lambda name: None))
    with raises(RecipeError, Facts("unsupported", column="train.torch_compile", says="compiler")):
        check_method_support(ModelSection(), compiled)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with raises(MissingExtra, Facts("not-installed", says="llmrec[quant]")):
        check_method_support(ModelSection(), TrainSection(optim="adamw_8bit"))
    for section in (compiled, TrainSection(optim="adamw_8bit")):
        with raises(RecipeError, Facts("unsupported", column="train.optim")):
            world.check_sharding_settings(None, section, plain=True)


@pytest.mark.parametrize(
    "name",
    # Slow: the default, and those that differ from another one only in a kernel or the memory of their state.
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith("adamw_torch") or "paged" in name else ())
        for name in OPTIMISERS
    ],
)
def test_every_optimiser_learns_and_resumes(
    name: Any, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "8bit" in name or "paged" in name:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    settings: dict[str, Any] = {"optim": name, "steps": 8, "learning_rate": 1e-2, "save_every": 4}
    losses, _ = trained(monkeypatch, llama_folder, tmp_path, **settings)
    assert losses[-1] < 0.8 * losses[0]
    tear(tmp_path, 8)
    again, _ = trained(monkeypatch, llama_folder, tmp_path, **settings)
    assert again == pytest.approx(losses, rel=1e-6)


def test_checkpoints_are_saved_by_time(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10**6, 40))
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    settings: dict[str, Any] = {"steps": 8, "save_every": 100, "keep_checkpoints": 9}
    trained(monkeypatch, llama_folder, tmp_path, save_minutes=2.0, **settings)
    # The clock advances by 40 seconds at each reading.
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [8, 6, 3]


def test_checkpoints_by_time_wait_for_the_last_update_of_a_rollout() -> None:
    saving = checkpoint.CheckpointCallback([], world.World(), minutes=0.0001, every=3)
    saving._since = -(10.0**6)
    for step in range(1, 7):
        control = SimpleNamespace(should_save=False)
        saving.on_step_end(None, SimpleNamespace(global_step=step), control)
        assert control.should_save == (step % 3 == 0)


def test_recomputation_needs_no_gradients_of_inputs() -> None:
    model = tiny()
    model.requires_grad_(False)
    enable_gradient_checkpointing(model)
    assert model.is_gradient_checkpointing
    assert not model.get_input_embeddings()(torch.tensor([1])).requires_grad
