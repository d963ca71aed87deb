"""Precision of training: half-precision products where the hardware supports them, trained weights in float32."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from llmrec.machine import cpu_has_bf16, gpu_has_bf16

log = logging.getLogger(__name__)

# The attribute that switches this in PEFT layers.
_CAST_ATTRIBUTE = "cast_input_dtype_enabled"


def autocast_dtype(model: torch.nn.Module, device: str | None = None) -> torch.dtype | None:
    """Return the dtype of matrix products under autocast; None without autocast.

    bfloat16 where the hardware multiplies it natively. GPUs that only emulate it (Turing) multiply float16, in which
    small gradients underflow unless the loss is scaled up, as accelerate does with ``fp16=True``. A float32 model is
    trained in float32 throughout.

    Args:
        model: The model.
        device: The training device, ``"cpu"`` or ``"cuda"``; None: the model's.
    """
    if getattr(model, "llmrec_float32", False):
        return None
    if (device or model.device.type) == "cuda":
        return torch.bfloat16 if gpu_has_bf16() else torch.float16
    return torch.bfloat16 if cpu_has_bf16() else None


def mixed_precision(model: torch.nn.Module) -> Any:
    """Return an autocast context for the half precision of a model, if it has one; trained weights stay in float32."""
    dtype = autocast_dtype(model)
    return nullcontext() if dtype is None else torch.autocast(model.device.type, dtype=dtype)


@contextmanager
def without_input_casting(model: torch.nn.Module, *, active: bool) -> Iterator[None]:
    """Let adapters use inputs in half precision, because float32 copies under autocast would waste memory.

    DoRA's layers still convert their input, since its norms are computed in the precision of the input. PEFT's
    `disable_input_dtype_casting` affects them too, and is incompatible with trained token rows.
    """
    layers = [m for m in model.modules() if active and getattr(m, _CAST_ATTRIBUTE, False) and not m.lora_variant]
    for layer in layers:
        setattr(layer, _CAST_ATTRIBUTE, False)
    try:
        yield
    finally:
        for layer in layers:
            setattr(layer, _CAST_ATTRIBUTE, True)


def convert_to_float32(model: torch.nn.Module, device: str) -> None:
    """Convert trained float16 weights to float32; the whole model if half precision is not available.

    Small optimiser steps would be lost in float16.
    """
    everything = autocast_dtype(model, device) is None
    parameters = [p for p in model.parameters() if p.dtype == torch.float16 and (everything or p.requires_grad)]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    if not everything or not parameters:
        return
    for module in model.modules():
        # the dtype to which NF4 layers are dequantised
        if getattr(module, "compute_dtype", None) == torch.float16:
            module.compute_dtype = torch.float32
    log.warning("this hardware does not support bfloat16: training in float32, which takes more memory and time")


@contextmanager
def preserve_adapter_dtype(model: torch.nn.Module) -> Iterator[None]:
    """Keep adapters in float32 while the trainer is created, although TRL would convert them.

    In bfloat16 small optimiser steps would be lost, and gradients rounded.
    """
    saved = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in saved:
        # the trainer may have moved the model
        parameter.data = data.to(parameter.device)
