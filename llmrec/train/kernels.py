"""Faster layers and less memory with the same results: Liger kernels, torch.compile, and gradient checkpointing."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from llmrec.errors import RecipeError, require
from llmrec.models.tensors import base_of
from llmrec.recipe.schema import TrainSection

log = logging.getLogger(__name__)

# Liger options that do not affect layers: they replace losses that llmrec does not use.
_LIGER_OPTIONS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def enable_gradient_checkpointing(model: torch.nn.Module) -> None:
    """Enable gradient checkpointing, in which layers recompute activations in the backward pass.

    The inputs of the first layer get no gradient, which transformers and TRL enable but only reentrant checkpoints
    need: so layers below the first trained weight have no backward pass and are not recomputed.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()


@contextmanager
def use_faster_layers(model: torch.nn.Module, section: TrainSection) -> Iterator[None]:
    """Use the layer kernels that the recipe selects, for a model on its device.

    Liger replaces functions of the module in transformers that defines the model; they are restored at the end, since
    other models of the process may be on a CPU.

    Raises:
        RecipeError: If Liger has no kernels for this kind of model.
    """
    base = base_of(model)
    defined = vars(sys.modules[type(base).__module__])
    before = dict(defined)
    try:
        if section.use_liger_kernel:
            _apply_liger(base)
        if section.torch_compile:
            # Only layers are compiled, since losses call decoder and head separately; one graph serves all layers. The
            # length of examples changes with every step.
            for module in base.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.compile(dynamic=True)
        with warnings.catch_warnings():
            # torch's compiler reads the gradients of all tensors.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
            yield
    finally:
        defined.update(before)


def _apply_liger(base: torch.nn.Module) -> None:
    from transformers.integrations.liger import apply_liger_kernel

    known = require("liger_kernel.transformers.monkey_patch", "liger").MODEL_TYPE_TO_APPLY_LIGER_FN
    if base.config.model_type not in known:
        raise RecipeError(
            f"train.use_liger_kernel: Liger has no kernels for a {base.config.model_type}; set the key to false",
            kind="unsupported",
            column="train.use_liger_kernel",
        )
    apply_liger_kernel(base, _LIGER_OPTIONS)


@contextmanager
def log_missing_paging(section: TrainSection, device: str) -> Iterator[None]:
    """Log once that a paged optimiser does not page on a CPU, instead of the warnings of bitsandbytes."""
    if device == "cpu" and section.optim.startswith("paged"):
        log.info("training: train.optim=%s has no paging on a CPU", section.optim)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield
