"""Faster and smaller computation of the same layers: Liger's kernels, torch.compile, and recomputed activations."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from llmrec.errors import RecipeError, require
from llmrec.recipe.schema import TrainSection

log = logging.getLogger(__name__)

# What Liger replaces that is not part of a layer: losses here read the decoder's states, and never call its losses.
_LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def recompute(model: torch.nn.Module) -> None:
    """Have layers keep only their inputs and compute everything else again in the backward pass.

    The inputs of the first layer get no gradient, which transformers and TRL ask for and only reentrant checkpoints
    need: layers below the first trained weight then have no backward pass, and are not computed again for it.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()


@contextmanager
def faster_layers(model: torch.nn.Module, section: TrainSection) -> Iterator[None]:
    """Compute the layers of a model with the kernels that the recipe asks for.

    Liger replaces functions of the module in transformers that defines the model; they are restored at the end, since
    other models of the process may be on a CPU.

    Args:
        model: A model on its device, with or without PEFT adapters.
        section: The training settings.

    Raises:
        RecipeError: If Liger has no kernels for this kind of model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    defined = vars(sys.modules[type(base).__module__])
    before = dict(defined)
    try:
        if section.use_liger_kernel:
            _apply_liger(base)
        if section.torch_compile:
            # Layers alone, since losses call the decoder and the head apart; one graph serves all of them. Rows of
            # every step are of another length.
            for module in base.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.compile(dynamic=True)
        with warnings.catch_warnings():
            # torch's compiler looks at the gradient of every tensor that it meets.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
            yield
    finally:
        defined.update(before)


def _apply_liger(base: torch.nn.Module) -> None:
    from transformers.integrations.liger import apply_liger_kernel

    known = require("liger_kernel.transformers.monkey_patch", "liger").MODEL_TYPE_TO_APPLY_LIGER_FN
    if base.config.model_type not in known:
        raise RecipeError(
            f"train.use_liger_kernel: Liger has no kernels for a {base.config.model_type}; set it to false",
            kind="unsupported",
            column="train.use_liger_kernel",
        )
    apply_liger_kernel(base, _LOSSES)


@contextmanager
def unpaged(section: TrainSection, device: str) -> Iterator[None]:
    """Note once that on a CPU the moments of a paged optimiser stay where they are; bitsandbytes warns of it."""
    if device == "cpu" and section.optim.startswith("paged"):
        log.info("training: train.optim=%s has no paging on a CPU", section.optim)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield
