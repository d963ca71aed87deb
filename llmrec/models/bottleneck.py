"""Bottleneck adapters parallel to the feed-forward block of every layer, as in M6-Rec (arXiv 2205.08084).

A layer's FFN(Z) becomes FFN(Z) + lambda * (act(Z W1 + b1) W2 + b2). Lambda is trained too and starts at 0,
where the model is bit-identical to the base. The paper does not name its activation; here it is GELU. Plain
architectures have no such layers, so the adapters cannot be merged: they are stored with a model's weights as
``bottlenecks.safetensors``, and only `llmrec.models.load` loads them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import ModelError, require
from llmrec.models.tensors import base_of, reading_trained_file

if TYPE_CHECKING:
    import torch

BOTTLENECKS_FILE = "bottlenecks.safetensors"
_BOTTLENECK_ATTRIBUTE = "llmrec_bottleneck"


def attach(model: torch.nn.Module, rank: int, *, seed: int) -> None:
    """Add a trainable float32 adapter with a bottleneck of width ``rank`` to every layer.

    Raises:
        ModelError: If its layers have no ``mlp`` of one input and one output.
    """
    torch = require("torch", "train")
    drawn = torch.Generator().manual_seed(seed)
    for part in _feed_forward_blocks(model):
        width = base_of(model).config.get_text_config().hidden_size
        adapter = torch.nn.Module()
        for name, rows, columns in (("down", width, rank), ("up", rank, width)):
            weight = torch.randn((rows, columns), generator=drawn) / math.sqrt(rows)
            adapter.register_parameter(f"{name}_weight", torch.nn.Parameter(weight))
            adapter.register_parameter(f"{name}_bias", torch.nn.Parameter(torch.zeros(columns)))
        adapter.register_parameter("scale", torch.nn.Parameter(torch.zeros(())))
        setattr(part, _BOTTLENECK_ATTRIBUTE, adapter.to(next(part.parameters()).device))
        part.register_forward_hook(_add_adapter_output)
    base = base_of(model)
    # The original files of the model remain readable for other programs that use transformers.
    base._keys_to_ignore_on_save = set(_adapter_parameters(base)).union(base._keys_to_ignore_on_save or ())


def weights_per_layer(width: int, rank: int) -> int:
    """Return the number of weights that `attach` adds to a layer of a given width."""
    return 2 * width * rank + width + rank + 1


def _add_adapter_output(part: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    adapter, states = getattr(part, _BOTTLENECK_ATTRIBUTE), inputs[0]
    torch = require("torch", "train")
    with torch.autocast(states.device.type, enabled=False):
        inner = torch.nn.functional.gelu(states.float() @ adapter.down_weight + adapter.down_bias)
        return output + (adapter.scale * (inner @ adapter.up_weight + adapter.up_bias)).to(output.dtype)


def save(model: torch.nn.Module, folder: Path) -> None:
    """Save the adapters of a model to a folder, if it has any."""
    if tensors := _adapter_parameters(model):
        safetensors = require("safetensors.torch", "train")
        safetensors.save_file(
            {name: item.detach().cpu().contiguous() for name, item in tensors.items()}, folder / BOTTLENECKS_FILE
        )


def load(model: torch.nn.Module, folder: Path) -> None:
    """Add the adapters stored in a folder to a model, if there are any.

    Raises:
        ModelError: If they cannot be read, or do not belong to the model.
    """
    if not (folder / BOTTLENECKS_FILE).is_file():
        return
    torch, safetensors = require("torch", "train"), require("safetensors.torch", "train")
    file = folder / BOTTLENECKS_FILE
    with reading_trained_file(f"{file} cannot be read, or belongs to another model", file):
        result = safetensors.load_file(file)
        if not _adapter_parameters(model):
            attach(model, next(item for name, item in result.items() if name.endswith("down_weight")).shape[1], seed=0)
        parameters = _adapter_parameters(model)
        if result.keys() != parameters.keys():
            raise ValueError("other layers")
        with torch.no_grad():
            for name, item in parameters.items():
                item.copy_(result[name])


def _adapter_parameters(model: torch.nn.Module) -> dict[str, Any]:
    """Return the adapter parameters by their names in the base model."""
    return {name: item for name, item in base_of(model).named_parameters() if f".{_BOTTLENECK_ATTRIBUTE}." in name}


def _feed_forward_blocks(model: torch.nn.Module) -> list[Any]:
    """Return the feed-forward block of every layer."""
    layers = getattr(base_of(model).get_decoder(), "layers", None)
    parts = [getattr(layer, "mlp", None) for layer in layers or ()]
    if not parts or any(part is None or hasattr(part, "experts") for part in parts):
        raise ModelError(
            f"train.method: a {base_of(model).config.model_type} does not have one plain feed-forward block per layer, "
            "which bottleneck adapters need; set train.method=option",
            kind="unsupported",
            column="train.method",
        )
    return parts
