"""Devices of models on fake machines: an unusable GPU, and GPUs of several generations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from llmrec import machine
from llmrec.cli.main import app
from llmrec.errors import ModelError, RecipeError
from llmrec.models import load
from llmrec.pipeline import engines
from llmrec.recipe.schema import EvalSection, ModelSection, RQVAEIndex
from llmrec.setup_env import has_nvidia_gpu
from tests.facts import Facts, raises

torch = pytest.importorskip("torch")

AUTO, CPU, CUDA = (ModelSection(device=name) for name in ("auto", "cpu", "cuda"))


@pytest.fixture(autouse=True)
def clear_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cached = (has_nvidia_gpu, machine._prepare_cuda)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an nvidia-smi on the path that lists a GPU; torch has none."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA L4 (UUID: GPU-1)'\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Fake a GPU of this compute capability in torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "compute_120"])
    native = capability >= (8, 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)


def test_rejects_gpu_that_torch_cannot_use(listed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with raises(
        ModelError,
        Facts("unsupported", column="model.device", says=("a driver that supports CUDA 13.0", "model.device=cpu")),
    ):
        load.device(AUTO)
    monkeypatch.setattr(torch.version, "cuda", None)
    with raises(
        ModelError, Facts("unsupported", column="model.device", says=("built for the CPU only", "model.device=cpu"))
    ):
        load.device(AUTO)


def test_cpu_can_be_forced(listed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load.device(CPU) == "cpu"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert load.device(AUTO) == "cpu"


def test_run_stops_at_once_with_an_unusable_gpu(listed: None, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\ndata: {source: table, path: none.csv}\ntasks: {sequential: {}}\neval: {backend: hf}\n")
    result = CliRunner().invoke(app, ["run", str(recipe), "--out", str(tmp_path / "run")])
    assert isinstance(result.exception, ModelError) and "model.device=cpu" in str(result.exception)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert load.device(AUTO) == "cpu"
    with raises(ModelError, Facts("unsupported", column="model.device", says="`llmrec doctor`")):
        load.device(CUDA)


def test_rejects_gpu_older_than_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, (6, 1))
    with raises(ModelError, Facts("unsupported", column="model.device", says=("Card", "6.1 is below 7.5"))):
        load.device(AUTO)
    assert not machine.has_cuda()


class Moved(Exception):
    """Raised instead of a move to the GPU."""


def _engine(folder: Path, out: Path) -> None:
    from llmrec.pipeline.resume import StageTimer

    encoder: Any = SimpleNamespace(digest="d", max_length=512)
    opened = engines.Engines(AUTO, EvalSection(backend="hf"), encoder, 0, StageTimer(quiet=True), None)
    opened.get("hf", str(folder), "w").start()


def _text_encoder(folder: Path, out: Path) -> None:
    from llmrec.models.text_encoder import load_text_encoder

    load_text_encoder(str(folder))


def _sequence_network(folder: Path, out: Path) -> None:
    from llmrec.baselines.sasrec import SASRec
    from tests.baselines.test_networks_on_gpu import scores

    scores(SASRec, "auto")


def _rq_vae(folder: Path, out: Path) -> None:
    from llmrec.index import semantic

    semantic.fit_rqvae(np.zeros((4, 2), dtype=np.float32), RQVAEIndex(), 2, 2, quiet=True)


def _end_states(folder: Path, out: Path) -> None:
    from llmrec.systems.m6.end_states import EndStates

    EndStates(str(folder), half=False)


def _training(folder: Path, out: Path) -> None:
    from tests.train.test_training import run

    run(folder, out, steps=1)


@pytest.mark.parametrize("path", [_engine, _text_encoder, _sequence_network, _rq_vae, _end_states, _training])
def test_cudnn_attention_is_disabled_before_gpu_use(
    path: Callable[[Path, Path], None], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    from llmrec.train import sft

    card(monkeypatch, (9, 0))
    settings: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    for kind in (torch.nn.Module, torch.Tensor):

        def move(self: Any, *args: Any, to: Any = kind.to, **kwargs: Any) -> Any:
            if any(str(value).startswith("cuda") for value in (*args, *kwargs.values())):
                raise Moved
            return to(self, *args, **kwargs)

        monkeypatch.setattr(kind, "to", move)

    def configured(**kwargs: Any) -> None:
        if not kwargs["use_cpu"]:
            raise Moved

    # The trainer moves a model by itself.
    monkeypatch.setattr(sft, "SFTConfig", configured)
    torch.backends.cuda.enable_cudnn_sdp(True)
    with pytest.raises(Moved):
        path(llama_folder, tmp_path)
    assert not torch.backends.cuda.cudnn_sdp_enabled() and settings == ["expandable_segments:True"]


def test_allocator_settings_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, (9, 0))
    settings: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    before = dict(os.environ)
    assert machine.has_cuda() and settings == ["expandable_segments:True"] and dict(os.environ) == before
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "backend:native")
            machine._prepare_cuda.cache_clear()
            assert machine.has_cuda() and len(settings) == 1


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 9), "bfloat16")])
def test_half_dtype_by_capability(capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    from llmrec.train.precision import autocast_dtype

    card(monkeypatch, capability)
    assert load.device(AUTO) == load.device(CUDA) == "cuda"
    model: Any = SimpleNamespace(device=torch.device("cuda"))
    assert load.dtype(AUTO) == autocast_dtype(model) == getattr(torch, dtype)


def test_rejects_gpu_build_of_vllm_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, (9, 0))
    section = EvalSection(backend="vllm")
    monkeypatch.setattr(engines, "package_versions", lambda: {"vllm": "0.32.0"})
    engines.check_engine_device(AUTO, section)
    with raises(RecipeError, Facts("unsupported", column="eval.backend", says="eval.backend=hf")):
        engines.check_engine_device(CPU, section)
    engines.check_engine_device(CPU, EvalSection(backend="hf"))
    monkeypatch.setattr(engines, "package_versions", lambda: {"vllm": "0.32.0+cpu"})
    engines.check_engine_device(CPU, section)


@pytest.mark.parametrize(
    ("free", "gpu_memory", "share"),
    [
        (80, None, 0.92),
        # 0.75 GiB are reserved for the context of the engine's process.
        (40, None, 39.25 / 80),
        (0.5, None, 0.01),
        (40, 0.9, 0.9),
    ],
)
def test_vllm_memory_share_of_a_gpu(
    free: float, gpu_memory: float | None, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (int(free * 2**30), 80 * 2**30))
    for on_cpu in (False, True):
        options = _start(monkeypatch, on_cpu, gpu_memory=gpu_memory)
        assert options.get("gpu_memory_utilization") == (None if on_cpu else pytest.approx(share))


def _start(monkeypatch: pytest.MonkeyPatch, on_cpu: bool, *, v2: bool = True, **options: Any) -> dict[str, Any]:
    """Return the options that a backend passes to vLLM, and its route; ``v2``: whether engines have the V2 runner."""
    from llmrec.backends.vllm import backend

    passed: dict[str, Any] = {}
    config = SimpleNamespace(use_v2_model_runner=v2)

    def start(folder: str, **kwargs: Any) -> SimpleNamespace:
        passed.update(kwargs)
        return SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))

    modules = {"vllm": SimpleNamespace(LLM=start), "torch": torch}
    platform = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: on_cpu))
    monkeypatch.setattr(backend, "prepare_environment", lambda: None)
    monkeypatch.setattr(backend, "require", lambda name, extra: modules.get(name) or platform)
    encoder: Any = SimpleNamespace(max_length=512)
    engine = backend.VLLMBackend("folder", encoder, dtype="float16", **options)
    return passed | {"route": engine.route}


@pytest.mark.parametrize(
    ("on_cpu", "v2", "route"), [(True, False, "forced"), (False, True, "prefill"), (False, False, "nodes")]
)
def test_route_depends_on_the_model_runner(on_cpu: bool, v2: bool, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (2**36, 2**36))
    options = _start(monkeypatch, on_cpu, v2=v2)
    assert options["route"] == route
    # The V2 runner rejects this logits processor.
    assert ("logits_processors" in options) == (route == "forced") and "enable_lora" not in options


def test_parallel_options_are_passed_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [60, 20, 50, 40]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu] * 2**30, 80 * 2**30))
    alone = _start(monkeypatch, on_cpu=False)
    assert (alone["tensor_parallel_size"], alone["pipeline_parallel_size"], alone["enforce_eager"]) == (1, 1, False)
    assert alone["gpu_memory_utilization"] == pytest.approx(59.25 / 80)
    shared = _start(monkeypatch, on_cpu=False, tensor_parallel=2, pipeline_parallel=2, eager=True)
    assert (shared["tensor_parallel_size"], shared["pipeline_parallel_size"], shared["enforce_eager"]) == (2, 2, True)
    # vLLM takes the same share of each GPU, so the fullest decides.
    assert shared["gpu_memory_utilization"] == pytest.approx(19.25 / 80)
    assert _start(monkeypatch, on_cpu=True, tensor_parallel=2)["tensor_parallel_size"] == 2


def test_recipe_options_are_passed_to_vllm(monkeypatch: pytest.MonkeyPatch, llama_folder: Path) -> None:
    from llmrec.backends.vllm.backend import Workload
    from llmrec.pipeline.resume import StageTimer

    def engines_of(section: EvalSection) -> engines.Engines:
        return engines.Engines(
            CPU, section, SimpleNamespace(digest="d", max_length=512), 0, StageTimer(quiet=True), None
        )  # type: ignore[arg-type]

    options: dict[str, Any] = {}
    monkeypatch.setattr(engines, "check_weights", lambda *_: None)
    monkeypatch.setattr(engines, "import_component", lambda *_: lambda *_, **kwargs: options.update(kwargs))
    sharing = engines_of(EvalSection(tensor_parallel=4, pipeline_parallel=2, enforce_eager=True, gpu_memory=0.5))
    folder = str(llama_folder)
    sharing._start("vllm", folder, lambda: 640)
    expected = {"tensor_parallel": 4, "pipeline_parallel": 2, "eager": True, "gpu_memory": 0.5}
    assert {name: options[name] for name in expected} == expected
    # Two layers with one head of 64 keys and 64 values, in the dtype of models on the CPU.
    itemsize = load.dtype(CPU).itemsize
    weights = (llama_folder / "model.safetensors").stat().st_size * itemsize // 4
    assert options["workload"] == Workload(tokens=640, token_bytes=2 * 2 * 64 * itemsize, weights=weights)
    assert sharing.identity("vllm", "w")["shared"] == [4, 2] and "shared" not in sharing.identity("hf", "w")
    assert "shared" not in engines_of(EvalSection()).identity("vllm", "w")
    # Other weights under the same path need another engine.
    monkeypatch.setattr(engines, "CachedBackend", lambda *_: SimpleNamespace(close=lambda: None))
    first = sharing.get("vllm", folder, "w")
    assert sharing.get("vllm", folder, "w") is first is not sharing.get("vllm", folder, "v")


def test_rejects_more_gpus_than_available(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(engines, "package_versions", lambda: {"vllm": "0.32.0"})
    engines.check_engine_device(AUTO, EvalSection(backend="vllm", tensor_parallel=2))
    with raises(
        RecipeError, Facts("unsupported", column="eval.tensor_parallel", says=("is 4", "2 GPUs", "eval.server.url"))
    ):
        engines.check_engine_device(AUTO, EvalSection(backend="vllm", tensor_parallel=2, pipeline_parallel=2))
    with raises(RecipeError, Facts("contradiction", column="eval.pipeline_parallel", says="eval.backend is hf")):
        engines.check_engine_device(AUTO, EvalSection(backend="hf", pipeline_parallel=2))
