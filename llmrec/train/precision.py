"""The precision of training: bfloat16 products where the hardware supports them, adapters always in float32."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from llmrec.models.load import cpu_has_bf16, gpu_has_bf16

log = logging.getLogger(__name__)


def mixed_precision(model: torch.nn.Module) -> Any:
    """Autocast to bfloat16 where base weights are bfloat16 or fully trained, and the hardware multiplies it natively.

    Adapters stay in float32 either way. A recipe that asks for a float32 model trains in float32 throughout.
    """
    device = model.device
    if getattr(model, "llmrec_float32", False):
        return nullcontext()
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16) if gpu_has_bf16() else nullcontext()
    return torch.autocast("cpu", dtype=torch.bfloat16) if cpu_has_bf16() else nullcontext()


def widen(model: torch.nn.Module) -> None:
    """Convert a float16 model to float32 where bfloat16 is not available: small gradients underflow in float16."""
    if model.dtype != torch.float16 or not isinstance(mixed_precision(model), nullcontext):
        return
    for parameter in model.parameters():
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()
    for module in model.modules():
        # Layers in NF4 are unpacked to this dtype.
        if getattr(module, "compute_dtype", None) == torch.float16:
            module.compute_dtype = torch.float32
    log.warning(
        "this hardware multiplies no bfloat16: the model is trained in float32, which takes more memory and time"
    )


@contextmanager
def adapters_as_they_are(model: torch.nn.Module) -> Iterator[None]:
    """Keep adapters in float32 while the trainer is created: on a quantised base TRL converts them to bfloat16.

    Small optimiser steps would be lost in them, and their gradients are rounded.
    """
    held = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in held:
        # The trainer may have moved the model.
        parameter.data = data.to(parameter.device)
