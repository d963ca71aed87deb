"""Memory of models: the size of weights, free GPU memory, and a one-line error where it is not enough."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import LlmrecError, require
from llmrec.models.load import gpu_has_bf16

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

TRAINING = (
    "set train.micro_tokens (a step in parts), train.gradient_checkpointing=true or train.method=qlora; `llmrec check "
    "--dry-run` estimates what each takes"
)
"""Advice for training that runs out of memory."""
ASKING = "lower eval.batch_tokens or eval.beams, or close what else holds the GPU's memory (nvidia-smi)"
"""Advice for evaluation through transformers that runs out of memory."""
LOADING = (
    "choose a smaller model.name, set model.dtype=bfloat16, close what else holds the GPU's memory, or model.device=cpu"
)
"""Advice for a model that does not fit into memory."""

# torch's message, without its advice on the allocator.
_TOLD = re.compile(
    r"Tried to allocate [\d.]+ \w+\.(?: GPU \d+ has a total capacity of [\d.]+ \w+ of which [\d.]+ \w+ is free\.)?"
)


@contextmanager
def reporting_full_memory(what: str, fix: str, column: str) -> Iterator[None]:
    """Turn torch's out-of-memory error into a one-line error.

    Args:
        what: The operation, for the message.
        fix: What makes it smaller.
        column: The key to begin with.

    Raises:
        LlmrecError: If the memory of the GPU did not suffice.
    """
    try:
        yield
    except RuntimeError as error:
        # By name, so that torch need not be imported.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        match = _TOLD.search(str(error))
        raise LlmrecError(
            f"{what}: the memory of the GPU is full ({match[0].rstrip('.') if match else 'torch says no more'}); {fix}",
            kind="exhausted",
            column=column,
        ) from error


def placed(model: torch.nn.Module, place: str) -> Any:
    """Place a model where it fits: on the GPU, on the GPU in half precision, or on the CPU.

    Args:
        model: An unquantised model on the CPU.
        place: Where it is wanted, ``"cpu"`` or ``"cuda"``.
    """
    if place == "cpu":
        return model
    torch = require("torch", "train")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free, gib = free_bytes(), 2.0**30
    if _with_room(size) <= free:
        return model.to(place)
    name = str(model.dtype).removeprefix("torch.")
    text = f"the model takes {size / gib:.1f} GiB as {name}, and {free / gib:.1f} GiB of the GPU are free"
    half = torch.bfloat16 if gpu_has_bf16() else torch.float16
    if model.dtype == torch.float32 and _with_room(size // 2) <= free:
        log.warning("%s: it is asked in %s", text, str(half).removeprefix("torch."))
        return model.to(half).to(place)
    log.warning("%s: it is asked on the CPU, which takes long", text)
    return model


def weights_size(folder: str, config: PretrainedConfig, itemsize: int) -> int:
    """Return the bytes of a model's loaded weights; 0 if they are not on this machine.

    Args:
        folder: The model folder.
        config: Its configuration.
        itemsize: Bytes of a number once it is loaded.
    """
    stored = getattr(getattr(config, "dtype", None), "itemsize", itemsize)
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) * itemsize // stored


def _with_room(size: int) -> float:
    """Return the memory of a model of ``size`` bytes during inference on a few rows."""
    return 1.05 * size + 1.5 * 2**30


def free_bytes() -> int:
    """Return the free memory of the GPU in use, including torch's cache."""
    cuda = require("torch", "train").cuda
    free, _ = cuda.mem_get_info()
    return int(free) + int(cuda.memory_reserved()) - int(cuda.memory_allocated())
