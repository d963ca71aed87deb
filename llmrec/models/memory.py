"""Memory of models: size of weights, free GPU memory, and one-line errors if memory is insufficient."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec import machine, processes
from llmrec.errors import LlmrecError, require
from llmrec.machine import gpu_has_bf16
from llmrec.models import bottleneck
from llmrec.models.load import device, dtype
from llmrec.models.streaming import exact_dtype, largest_block_size, tensor_sizes
from llmrec.models.tensors import vocabulary_tables
from llmrec.models.traits import auto_class
from llmrec.recipe.schema import SOFT_PROMPT_METHODS, ModelSection, TrainSection

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

TRAINING_ADVICE = (
    "set train.micro_tokens (gradient accumulation), train.gradient_checkpointing=true or train.method=qlora; "
    "`llmrec check --dry-run` estimates the memory of a setting"
)
"""Advice for training that runs out of memory."""
EVALUATION_ADVICE = (
    "lower eval.batch_tokens or eval.beams, or close other programs that use the GPU's memory (nvidia-smi)"
)
"""Advice for evaluation through transformers that runs out of memory."""
LOADING_ADVICE = (
    "choose a smaller model.name, set model.dtype=bfloat16 or model.device=cpu, or close other GPU programs"
)
"""Advice for a model that does not fit into memory."""

# torch's message without its advice about the allocator.
_OUT_OF_MEMORY = re.compile(
    r"Tried to allocate [\d.]+ \w+\.(?: GPU \d+ has a total capacity of [\d.]+ \w+ of which [\d.]+ \w+ is free\.)?"
)


@contextmanager
def convert_memory_errors(what: str, fix: str, column: str, *, instead: bool = False) -> Iterator[None]:
    """Convert torch's out-of-memory errors to one-line errors.

    Args:
        what: The operation, for the message.
        fix: The advice.
        column: The recipe key to lower first.
        instead: Replace the advice of an inner call, whose keys do not apply here.

    Raises:
        LlmrecError: If the memory of the GPU did not suffice.
    """
    try:
        yield
    except (RuntimeError, LlmrecError) as error:
        full = error.__cause__ if instead and isinstance(error, LlmrecError) else error
        # compared by name, to avoid importing torch
        if type(full).__name__ != "OutOfMemoryError":
            raise
        match = _OUT_OF_MEMORY.search(str(full))
        raise LlmrecError(
            f"{what}: the memory of the GPU is full ({match[0].rstrip('.') if match else 'no details'}); {fix}",
            kind="exhausted",
            column=column,
        ) from error


def place_model(model: torch.nn.Module, target: str) -> Any:
    """Move an unquantised model from the CPU to where it fits: the GPU, the GPU in half precision, or the CPU."""
    if target == "cpu":
        return model
    torch = require("torch", "train")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free, gib = free_gpu_bytes(), 2.0**30
    if _inference_bytes(size) <= free:
        return model.to(target)
    name = str(model.dtype).removeprefix("torch.")
    text = f"the model takes {size / gib:.1f} GiB as {name}, and {free / gib:.1f} GiB of the GPU are free"
    half = torch.bfloat16 if gpu_has_bf16() else torch.float16
    if model.dtype == torch.float32 and _inference_bytes(size // 2) <= free:
        log.warning("%s: using %s for inference", text, str(half).removeprefix("torch."))
        return model.to(half).to(target)
    log.warning("%s: using the CPU for inference, which is slow", text)
    return model


def weights_size(folder: str, config: PretrainedConfig, itemsize: int) -> int:
    """Return the bytes of a model's weights when loaded; 0 if they are not on this machine."""
    stored = getattr(getattr(config, "dtype", None), "itemsize", itemsize)
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) * itemsize // stored


def _inference_bytes(size: int) -> float:
    """Return the memory needed for inference with a model of ``size`` bytes."""
    return 1.05 * size + 1.5 * 2**30


def free_gpu_bytes() -> int:
    """Return the free memory of the current GPU, including torch's cache."""
    cuda = require("torch", "train").cuda
    free, _ = cuda.mem_get_info()
    return int(free) + int(cuda.memory_reserved()) - int(cuda.memory_allocated())


# Memory of training: the optimiser steps, loading the model, and merging its adapter.

# Activation bytes kept for the backward pass, per token, layer and unit of width: adapters with bfloat16 autocast and
# in float32, and full fine-tuning; and what gradient checkpointing keeps per layer.
_KEPT, _KEPT_WIDE, _KEPT_FULL, _KEPT_CHECKPOINT, _KEPT_CHECKPOINT_WIDE = 50.0, 83.0, 100.0, 2.1, 4.0
# Bytes per trained weight: weight and gradient in float32, and optimiser state, which is two moments in
# float32, or in 8 bits with scales. Paged optimisers move it to CPU memory when the GPU is full.
_TRAINED, _MOMENTS = 8.0, {"adamw_8bit": 2.1, "paged_adamw_8bit": 0.0, "paged_adamw_32bit": 0.0, "adafactor": 0.1}
_EXPERT_TENSOR = re.compile(r"\.experts\.\d+\.")
# bytes per weight in NF4, including scales
_NF4_BYTES = 0.6


def training_step_bytes(config: Any, model: ModelSection, train: TrainSection) -> float:
    """Return the peak bytes of a training step: weights, trainable parameters and activations.

    Activations were counted in the graph of the loss, for blocks of Llama and Qwen3 on a CPU: 43 and 49 bytes under
    bfloat16 autocast, 83 in float32, 85 to 96 in full fine-tuning. It was not measured on a GPU.
    """
    total, tables, adapters = count_weights(config, train)
    text = config.get_text_config()
    layers, width = int(text.num_hidden_layers), int(text.hidden_size)
    row, wide = min(train.batch_tokens, train.micro_tokens or train.batch_tokens) * width, dtype(model).itemsize == 4
    # weights, gradients and optimiser state
    trained = _TRAINED + _MOMENTS.get(train.optim, 8.0)
    if train.method == "full":
        # bitsandbytes keeps the moments of embeddings in float32.
        held, kept = trained * total + (5.9 * tables if train.optim == "adamw_8bit" else 0.0), _KEPT_FULL
    else:
        entry, kept = dtype(model).itemsize, _KEPT_WIDE if wide else _KEPT
        blocks = {"qlora": _NF4_BYTES, "lora8": 1.0}.get(train.method, entry)
        held = blocks * (total - tables) + entry * tables + trained * adapters
    learning = (
        min(layers, train.lora.top_layers or layers) if train.method not in ("full", *SOFT_PROMPT_METHODS) else layers
    )
    if train.gradient_checkpointing:
        return held + row * ((_KEPT_CHECKPOINT_WIDE if wide else _KEPT_CHECKPOINT) * learning + kept)
    return held + row * kept * learning


def count_weights(config: Any, train: TrainSection) -> tuple[int, int, int]:
    """Count the weights of a model: all, in the vocabulary, and in adapters or soft prompts."""
    torch = require("torch", "train")
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    tables = {id(module.weight): module.weight.numel() for _, module in vocabulary_tables(model)}
    total, vocabulary = sum(p.numel() for p in model.parameters()), sum(tables.values())
    if train.method in SOFT_PROMPT_METHODS:
        text, soft = config.get_text_config(), train.soft
        bottlenecks = (
            bottleneck.weights_per_layer(text.hidden_size, soft.rank) if train.method == "option-adapter" else 0
        )
        return total, vocabulary, soft.prompts * text.hidden_size + bottlenecks * text.num_hidden_layers
    targets = train.lora.targets
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and id(module.weight) not in tables
        and (not targets or name.rpartition(".")[2] in targets)
    ]
    adapters = train.lora.rank * sum(module.in_features + module.out_features for module in linear)
    return total, vocabulary, adapters


@dataclass(frozen=True, kw_only=True)
class CpuMemory:
    """Estimated CPU memory that a training needs, in addition to what its processes already use, in bytes.

    Attributes:
        loading: Loading the model, summed over processes.
        training: The peak of a step, summed over processes; on a GPU that of loading.
        merging: Merging the adapter, or saving the weights in the model's dtype.
        processes: The number of processes on this machine.
        usable: Free memory.
    """

    loading: float
    training: float
    merging: float
    processes: int
    usable: int

    @property
    def text(self) -> str:
        """One line that compares the estimate with the free memory, with the fix if it is too small."""
        count = f" in {self.processes} processes" if self.processes > 1 else ""
        text = (
            f"training{count} needs {_format_gib(max(self.loading, self.training))} and merging "
            f"{_format_gib(self.merging)}, and {_format_gib(self.usable)} are free"
        )
        if max(self.training, self.merging) <= self.usable:
            return text
        fewer = "train in fewer processes, " if self.processes > 1 else ""
        advice = f"{fewer}choose a smaller model.name, train.method=lora, or a machine with more memory"
        return f"{text}: too little; {advice}"


def estimate_cpu_memory(folder: str, config: PretrainedConfig, model: ModelSection, train: TrainSection) -> CpuMemory:
    """Estimate the CPU memory of a training in the processes of this machine.

    A model that is loaded in its stored dtype is memory-mapped: it takes no further memory before weights change, and
    all processes share its pages.
    """
    torch, count, stored = require("torch", "train"), processes.local_process_count(), exact_dtype(Path(folder))
    tensors = tensor_sizes(Path(folder))
    total = sum(size for _, size in tensors.values())
    # tensors of single experts are joined, which makes a copy
    joined = sum(size for name, (_, size) in tensors.items() if _EXPERT_TENSOR.search(name))
    loaded_dtype = torch.float32 if train.method == "full" else dtype(model)
    on_gpu, mapped = device(model) == "cuda", stored == loaded_dtype
    if on_gpu and train.method in ("qlora", "lora8"):
        # quantised on the GPU, one tensor at a time
        loaded = 0.0
    else:
        loaded = float((joined if mapped else total) * loaded_dtype.itemsize)
    training = count * loaded
    if not on_gpu:
        shared = total * loaded_dtype.itemsize - loaded if train.method != "full" else 0.0
        training = max(training, count * training_step_bytes(config, model, train) - (count - 1) * shared)
    # A block in float32, its update, and its copy in the new dtype.
    merging = 12.0 * largest_block_size(tensors) + joined * stored.itemsize
    if train.method in SOFT_PROMPT_METHODS:
        merging = 4.0 * total
    return CpuMemory(
        loading=count * loaded, training=training, merging=merging, processes=count, usable=machine.read_memory().usable
    )


def check_memory(folder: str, config: PretrainedConfig, model: ModelSection, train: TrainSection) -> None:
    """Compare the CPU memory of a training with the free memory before it begins.

    Raises:
        LlmrecError: If loading the model or merging its adapter would not fit; if only the estimate of a training step
            does not, it is a warning.
    """
    if getattr(config, "quantization_config", None) is not None or getattr(config, "auto_map", None):
        # Only the code of such models knows their sizes.
        return
    needed = estimate_cpu_memory(folder, config, model, train)
    if max(needed.loading, needed.merging) > needed.usable:
        raise LlmrecError(f"CPU memory: {needed.text}", kind="exhausted", column="model.name")
    if needed.training > needed.usable:
        log.warning("CPU memory: %s", needed.text)


def _format_gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
