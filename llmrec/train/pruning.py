"""Magnitude pruning during training: gradual on a cubic schedule (Zhu and Gupta, arXiv 1710.01878), or all at once.

Every linear layer of the blocks has a mask, which sets the weights of least magnitude to 0. With an adapter, the merged
weight ``W + BA`` is masked in the forward pass, so that only the factors are trained and the exported model has the
same zeros. Masked weights keep their value and get no gradient; while the schedule runs, a later mask may restore
them. Embeddings, the head, norms and biases are not pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from llmrec.errors import RecipeError
from llmrec.models.tensors import base_of, reading_trained_file
from llmrec.recipe.schema import PruneSection

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

MASKS_FILE = "masks.safetensors"
"""The file next to an adapter that marks the kept weights of each layer, one bit per weight, eight per byte."""

_MASK_ATTRIBUTE = "llmrec_mask"


def sparsity_at(section: PruneSection, steps: int, step: int) -> float:
    """Return the share of pruned weights after ``step`` of ``steps`` optimiser steps.

    Between ``begin`` (t0) and ``end`` (t1) it is equation 1, ``s_f (1 - (1 - (t - t0) / (t1 - t0))^3)``, of the last
    step t at which masks were recomputed.
    """
    first, last = round(section.begin * steps), round(section.end * steps)
    if step >= last:
        return section.sparsity
    if step < first or section.schedule == "one-shot":
        return 0.0
    updated = step - (step - first) % section.every
    return section.sparsity * (1 - (1 - (updated - first) / (last - first)) ** 3)


class PruningCallback(TrainerCallback):  # type: ignore[misc]
    """Updates the pruning masks of a model on schedule."""

    def __init__(self, model: torch.nn.Module, section: PruneSection, steps: int) -> None:
        self._model, self._section, self._steps = model, section, steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the masks before the first step, if due."""
        if state.global_step == 0 and (share := self._scheduled_sparsity(0)) > 0:
            prune_to_share(self._model, share)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the masks after a step, before validation and saving."""
        share = self._scheduled_sparsity(state.global_step)
        if share > self._scheduled_sparsity(state.global_step - 1):
            prune_to_share(self._model, share)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add the share of pruned weights to the log for trackers."""
        if logs and "loss" in logs:
            logs["sparsity"] = self._scheduled_sparsity(state.global_step)

    def _scheduled_sparsity(self, step: int) -> float:
        return sparsity_at(self._section, self._steps, step)


def attach_masks(model: torch.nn.Module) -> None:
    """Prepare all linear layers of the transformer blocks for pruning masks.

    Raises:
        RecipeError: If it has no linear layers.
    """
    base = base_of(model)
    results = list(_linear_layers(base))
    if not results:
        raise RecipeError(
            f"train.prune: a {base.config.model_type} has no linear layers to prune; choose another model, or "
            "remove train.prune",
            kind="unsupported",
            column="train.prune",
        )
    for _, layer in results:
        # not part of the saved weights, but moved to another device with the layer
        layer.register_buffer(_MASK_ATTRIBUTE, None, persistent=False)
        layer.forward = partial(_masked_forward, layer)


def prune_to_share(model: torch.nn.Module, share: float) -> None:
    """Prune the weights with the smallest magnitude in each layer, up to the given share."""
    with torch.no_grad():
        for _, layer in _prepared_layers(model):
            setattr(layer, _MASK_ATTRIBUTE, magnitude_mask(_merged_weight(layer), share))


def magnitude_mask(weight: torch.Tensor, share: float) -> Any:
    """Return a mask of the weights to keep, in the shape of the weight."""
    count = round(share * weight.numel())
    size = weight.detach().abs().float().flatten()
    if not count:
        return torch.ones_like(weight, dtype=torch.bool)
    bound = size.kthvalue(count).values
    mask = size > bound
    below, ties = int((size < bound).sum()), (size == bound).nonzero()[:, 0]
    mask[ties[count - below :]] = True
    return mask.view(weight.shape)


def sparsity(model: torch.nn.Module) -> float | None:
    """Return the share of pruned weights; None if the model has no masks."""
    masks = [mask for _, layer in _prepared_layers(model) if (mask := getattr(layer, _MASK_ATTRIBUTE)) is not None]
    if not masks:
        return None
    total = sum(int(mask.numel()) for mask in masks)
    return 1 - sum(int(mask.sum()) for mask in masks) / total


def save(model: torch.nn.Module, folder: Path) -> None:
    """Save the pruning masks of a model to a folder, if it has any."""
    masks = {
        name: mask for name, layer in _prepared_layers(model) if (mask := getattr(layer, _MASK_ATTRIBUTE)) is not None
    }
    if masks:
        bits = {name: np.packbits(mask.flatten().cpu().numpy()) for name, mask in masks.items()}
        save_file({name: torch.from_numpy(item) for name, item in bits.items()}, folder / MASKS_FILE)


def load(model: torch.nn.Module, folder: Path) -> None:
    """Load pruning masks from a folder into a model, if there are any.

    Raises:
        ModelError: If they cannot be read, or belong to another model.
    """
    if not (folder / MASKS_FILE).is_file():
        return
    if not any(True for _ in _prepared_layers(model)):
        attach_masks(model)
    layers = dict(_prepared_layers(model))
    for name, mask in _read_masks(folder, {name: _base_weight(layer) for name, layer in layers.items()}).items():
        setattr(layers[name], _MASK_ATTRIBUTE, mask.to(_base_weight(layers[name]).device))


def zeroing_function(model: torch.nn.Module, folder: Path) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that sets pruned weights of a plain model to 0, given parameters by name.

    Raises:
        ModelError: If the masks of the folder cannot be read, or belong to another model.
    """
    if not (folder / MASKS_FILE).is_file():
        return lambda _: None
    # Keep only shapes, since a weight may be released after it was written.
    shapes = {name: torch.empty_like(layer.weight, device="meta") for name, layer in _linear_layers(model)}
    _read_masks(folder, shapes, ())

    def zero(parameters: Mapping[str, Any]) -> None:
        names = [name for name in shapes if f"{name}.weight" in parameters]
        with torch.no_grad():
            for name, mask in _read_masks(folder, shapes, names).items():
                weight = parameters[f"{name}.weight"]
                weight.data = weight.data.masked_fill(~mask.to(weight.device), 0)

    return zero


def _read_masks(folder: Path, weights: Mapping[str, Any], names: Iterable[str] | None = None) -> Mapping[str, Any]:
    """Load the pruning masks of a folder by layer."""
    path, masks = folder / MASKS_FILE, {}
    what = f"{path} cannot be read, or belongs to another model"
    with reading_trained_file(what, path), safe_open(path, framework="np") as file:
        if set(file.keys()) != weights.keys():
            raise ValueError("other layers")
        for name, weight in weights.items():
            bits = file.get_slice(name)
            if bits.get_dtype() != "U8" or bits.get_shape() != [-(-weight.numel() // 8)]:
                raise ValueError(f"different shape of {name}")
        for name in weights if names is None else names:
            bits = np.unpackbits(file.get_tensor(name), count=weights[name].numel()).astype(bool)
            masks[name] = torch.from_numpy(bits).view(weights[name].shape)
    return masks


def _masked_forward(layer: torch.nn.Module, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute a linear layer with its pruning mask, if it has one."""
    mask = getattr(layer, _MASK_ATTRIBUTE)
    if mask is None:
        return type(layer).forward(layer, states, *args, **kwargs)
    weight, bias = _merged_weight(layer) * mask, _base_layer(layer).bias
    bias = None if bias is None else bias.to(states.dtype)
    return torch.nn.functional.linear(states, weight.to(states.dtype), bias)


def _merged_weight(layer: torch.nn.Module) -> Any:
    """Return the weight of a layer after merging its adapters, shape (out, in)."""
    weight = _base_weight(layer)
    if not hasattr(layer, "base_layer"):
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        return sum((layer.get_delta_weight(name).float() for name in layer.active_adapters), weight.float())


def _base_weight(layer: torch.nn.Module) -> Any:
    return _base_layer(layer).weight


def _base_layer(layer: torch.nn.Module) -> Any:
    """Return the base layer of an adapted layer; other layers unchanged."""
    return getattr(layer, "base_layer", layer)


def _prepared_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that `attach_masks` prepared, with their names in the base model."""
    yield from ((name, layer) for name, layer in base_of(model).named_modules() if hasattr(layer, _MASK_ATTRIBUTE))


def _linear_layers(base: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the linear layers of the transformer blocks, adapted or not, with their names."""
    inside = "\0"
    for name, module in base.named_modules():
        if name.startswith(inside) or not any(map(str.isdigit, name.split("."))):
            continue
        if hasattr(module, "base_layer"):
            inside = f"{name}."
        if isinstance(_base_layer(module), torch.nn.Linear):
            yield name, module
