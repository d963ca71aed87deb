"""Adds LoRA adapters to a base model, and merges adapters into unquantised weights."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import ModelError, RecipeError, require
from llmrec.models import soft_prompt
from llmrec.models.load import device, dtype, load_model
from llmrec.models.streaming import exact_dtype, save_by_blocks
from llmrec.models.tensors import mark_tied_tables, vocabulary_tables
from llmrec.models.traits import is_encoder_decoder
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

QUANTISED_METHODS = ("qlora", "lora8")
"""Methods with a quantised base model."""
# bitsandbytes optimisers; paged ones move optimiser state between GPU and CPU memory.
_BITSANDBYTES_OPTIMISERS = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")


def load_trainable(folder: str, model: ModelSection, train: TrainSection, *, tokens: Sequence[int] = ()) -> Any:
    """Load the base model for ``train.method``, and select its trainable weights.

    Those include the rows of item tokens in the embeddings, and in an untied head, which are trained fully.

    Raises:
        RecipeError: If 8-bit training is requested without CUDA, or no module matches ``train.lora.targets``.
    """
    torch = require("torch", "train")
    if train.method == "full":
        # Updates are too small for bfloat16 weights; autocast still multiplies in bfloat16.
        full = load_model(folder, model, dtype=torch.float32)
        full.llmrec_float32 = dtype(model) == torch.float32
        return _with_pruning_masks(full, train)
    base = _load_quantised(folder, model, train) if train.method in QUANTISED_METHODS else load_model(folder, model)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    blocks = _count_block_weights(base)
    adapted = add_lora_adapters(base, train.lora, tokens)
    if not train.lora.targets and train.lora.top_layers is None:
        _warn_low_coverage(adapted, blocks)
    adapted.llmrec_float32 = dtype(model) == torch.float32
    return _with_pruning_masks(adapted, train)


def merge_adapter(folder: str, model: ModelSection, adapter: Path, target: Path) -> None:
    """Merge an adapter into the unquantised base in float32, and save the result in the model's dtype.

    A QLoRA adapter is merged the same way, since merging into NF4 would round more. One block of the model is in memory
    at a time; see `llmrec.models.streaming`.
    """
    torch, peft = require("torch", "train"), require("peft", "train")
    if (prompt := soft_prompt.read_soft_prompt(adapter)) is not None:
        from llmrec.train.heads import merge_soft_prompt_model

        merge_soft_prompt_model(folder, model, adapter, prompt).to(dtype(model)).save_pretrained(target)
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = load_model(folder, model, dtype=exact_dtype(Path(folder)))
    if getattr(base, "is_quantized", False):
        raise ModelError(
            f"{folder} has quantised weights, into which adapters cannot be merged; set model.name to the unquantised "
            "model, and train.method=qlora to train it quantised",
            kind="unsupported",
            at=folder,
            column="model.name",
        )
    with mark_tied_tables(base):
        adapted = peft.PeftModel.from_pretrained(base, adapter)
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    plain = adapted.unload()

    def merged(block: Mapping[str, Any]) -> None:
        within = {id(weight) for weight in block.values()}
        for layer in layers:
            weights = list(layer.get_base_layer().parameters(recurse=False))
            if weights and within.issuperset(map(id, weights)):
                for weight in weights:
                    weight.data = weight.data.to(torch.float32)
                layer.merge()

    _save_model(plain, adapter, model, target, merged)


def save_full_model(trained: Path, model: ModelSection, target: Path) -> None:
    """Save fully fine-tuned float32 weights in the model's dtype, for serving."""
    _save_model(load_model(str(trained), model, dtype=exact_dtype(trained)), trained, model, target)


def _save_model(
    plain: Any,
    trained: Path,
    model: ModelSection,
    target: Path,
    merged: Callable[[Mapping[str, Any]], None] | None = None,
) -> None:
    """Save a model in the dtype of its recipe, with pruned weights set to zero."""
    from llmrec.train import pruning as magnitude

    zero = magnitude.zeroing_function(plain, trained)

    def change(block: Mapping[str, Any]) -> None:
        if merged is not None:
            merged(block)
        zero(block)

    save_by_blocks(plain, target, dtype(model), change)


def _with_pruning_masks(model: torch.nn.Module, train: TrainSection) -> Any:
    if train.prune is not None:
        from llmrec.train import pruning as magnitude

        magnitude.attach_masks(model)
    return model


def load_adapted(folder: str, model: ModelSection, train: TrainSection, adapter: Path) -> Any:
    """Load a trained model: the base model with its adapter, or fully fine-tuned weights.

    Used to check merged weights. The base is quantised for ``train.method``, or in float32.

    Raises:
        RecipeError: If the method needs CUDA and there is none.
        MissingExtra: If the method needs a package that is not installed.
    """
    torch, peft = require("torch", "train"), require("peft", "train")
    from llmrec.train import pruning as magnitude

    if train.method == "full":
        full = load_model(str(adapter), model, dtype=torch.float32)
        magnitude.zeroing_function(full, adapter)(dict(full.named_parameters()))
        return full.eval()
    if (prompt := soft_prompt.read_soft_prompt(adapter)) is not None:
        from llmrec.train.heads import merge_soft_prompt_model

        return merge_soft_prompt_model(folder, model, adapter, prompt).eval()
    if train.method in QUANTISED_METHODS:
        base = _load_quantised(folder, model, train)
    else:
        base = load_model(folder, model, dtype=torch.float32)
    with mark_tied_tables(base):
        adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
    magnitude.load(adapted, adapter)
    return adapted


def add_lora_adapters(base: torch.nn.Module, lora: LoraSection, tokens: Sequence[int] = ()) -> Any:
    """Add new adapters to a base model and freeze the other weights.

    Raises:
        RecipeError: If no module matches ``train.lora.targets``.
    """
    peft = require("peft", "train")
    layers = None
    if lora.top_layers is not None:
        count = base.config.get_text_config().num_hidden_layers
        layers = list(range(max(0, count - lora.top_layers), count))
    targets: str | list[str] = list(lora.targets) or (_linear_layer_names(base) if layers else "all-linear")
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        layers_to_transform=layers,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        trainable_token_indices={name: list(tokens) for name, _ in vocabulary_tables(base)} if tokens else None,
        task_type="SEQ_2_SEQ_LM" if is_encoder_decoder(base.config) else "CAUSAL_LM",
    )
    try:
        with mark_tied_tables(base):
            return peft.get_peft_model(base, config)
    except ValueError as error:
        raise RecipeError(
            f"train.lora.targets {targets}: {error}; known linear layers: {_linear_layer_names(base)}",
            kind="unknown-name",
            column="train.lora.targets",
        ) from error


def _count_block_weights(base: torch.nn.Module) -> int:
    """Return the number of weights without embeddings and head."""
    tables = {id(module.weight) for _, module in vocabulary_tables(base)}
    return sum(weight.numel() for weight in base.parameters() if id(weight) not in tables)


def _warn_low_coverage(adapted: torch.nn.Module, blocks: int) -> None:
    """Warn if the default target modules cover less than half of the weights.

    Their weights would silently not be adapted.
    """
    base = adapted.get_base_model()
    reached = sum(m.base_layer.weight.numel() for m in base.modules() if hasattr(m, "lora_A") and len(m.lora_A))
    if 2 * reached < blocks:
        log.warning(
            "training: adapters cover only %d %% of the weights of a %s, because experts that are stored as one "
            "tensor are not trained",
            100 * reached // blocks,
            base.config.model_type,
        )


def _linear_layer_names(base: torch.nn.Module) -> list[str]:
    """Return the names of linear layers in the transformer blocks, such as q_proj, without the head."""
    torch = require("torch", "train")
    head = base.get_output_embeddings()
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in base.named_modules()
        if (isinstance(module, torch.nn.Linear) or "Linear" in type(module).__name__) and module is not head
    }
    return sorted(names)


def _load_quantised(folder: str, model: ModelSection, train: TrainSection) -> Any:
    """Load a base model in 8 or 4 bits for training of adapters.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 changes the layout of a layer's 4-bit weights at its first forward pass
    in evaluation mode, for a kernel without gradient, and never changes it back. One validation before the first step
    would stop every gradient through the layer, with a warning and no error.
    """
    base = load_model(folder, model, quantization_config=_quantisation_config(model, train))
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


def check_method_support(model: ModelSection, train: TrainSection) -> None:
    """Reject a training method, optimiser or kernel that this machine does not support.

    Raises:
        RecipeError: If 8-bit training or Liger's kernels are requested without CUDA, or compilation without a compiler.
        MissingExtra: If a package is not installed.
    """
    if train.method in QUANTISED_METHODS or train.optim in _BITSANDBYTES_OPTIMISERS:
        require("bitsandbytes", "quant")
    if train.method == "lora8" and device(model) == "cpu":
        raise RecipeError(
            "train.method 'lora8' needs a CUDA GPU; use 'qlora', which runs on the CPU too",
            kind="unsupported",
            column="train.method",
        )
    if train.use_liger_kernel:
        if device(model) == "cpu":
            raise RecipeError(
                "train.use_liger_kernel: Liger's kernels are written in Triton and need a CUDA GPU; set the key to "
                "false",
                kind="unsupported",
                column="train.use_liger_kernel",
            )
        require("liger_kernel", "liger")
    if train.torch_compile and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        raise RecipeError(
            "train.torch_compile: torch needs a C compiler, but none is on the PATH; install gcc and g++, or set the "
            "key to false",
            kind="unsupported",
            column="train.torch_compile",
        )


def _quantisation_config(model: ModelSection, train: TrainSection) -> Any:
    transformers = require("transformers", "train")
    check_method_support(model, train)
    if train.method == "lora8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype(model),
    )
