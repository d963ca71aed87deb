"""Saves the weights of a model block by block, so that changing all weights needs the memory of only one block.

transformers maps safetensors files into memory, so a model loaded in its stored dtype takes almost no memory:
the system reads pages as they are needed and drops them again. A block, the tensors of one layer, is copied,
changed, written to its place in the new file, and released.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmrec.errors import require

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
"""The file that names the file of each tensor of a model in several files."""

_FILENAME_PATTERN = "model{suffix}.safetensors"
# as in save_pretrained, so that the files are equal
_MAX_FILE_SIZE = "50GB"
# Name of a numbered layer, in which tensors of a checkpoint may be joined or split during loading.
_LAYER_NAME = re.compile(r".*?\.\d+(?=\.)")
_SAFETENSORS_DTYPES = {
    **{"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that contain the weights of a model."""
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def tensor_sizes(folder: Path) -> dict[str, tuple[str, int]]:
    """Return the stored dtype, such as ``BF16``, and the number of elements of each tensor in a model folder."""
    safetensors, result = require("safetensors", "train"), {}
    for file in weight_files(folder):
        with safetensors.safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor, count = opened.get_slice(name), 1
                for size in tensor.get_shape():
                    count *= size
                result[name] = tensor.get_dtype(), count
    return result


def exact_dtype(folder: Path) -> Any:
    """Return the smallest dtype that represents all weights of a folder exactly, usually the stored one."""
    torch = require("torch", "train")
    stored = {dtype for dtype, _ in tensor_sizes(folder).values()}
    return {frozenset(["BF16"]): torch.bfloat16, frozenset(["F16"]): torch.float16}.get(
        frozenset(stored), torch.float32
    )


def block_name(name: str) -> str:
    """Return the block that contains a tensor: its numbered layer, or its module."""
    layer = _LAYER_NAME.match(name)
    return layer[0] if layer else name.rpartition(".")[0]


def largest_block_size(tensors: Mapping[str, tuple[str, int]]) -> int:
    """Return the number of weights in the largest block, given the result of `tensor_sizes`."""
    counts: dict[str, int] = {}
    for name, (_, count) in tensors.items():
        counts[block_name(name)] = counts.get(block_name(name), 0) + count
    return max(counts.values(), default=0)


def save_by_blocks(
    model: Any, target: Path, dtype: torch.dtype, change: Callable[[Mapping[str, Any]], None] | None = None
) -> None:
    """Save a model in another dtype, in the same files as ``model.to(dtype).save_pretrained(target)``.

    The model has no weights afterwards.

    Args:
        model: A model, loaded with `exact_dtype`.
        target: The folder to write.
        dtype: The dtype of floating-point weights.
        change: Called with the parameters and buffers of each block by name before they are rounded; replaces their
            ``data``.
    """
    torch = require("torch", "train")
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    def rounded(tensor: Any) -> Any:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    count = model.num_parameters()
    ignored = set(model._keys_to_ignore_on_save or ())
    tensors = {name: item for name, item in model.state_dict(keep_vars=True).items() if name not in ignored}
    tensors = remove_tied_weights_from_state_dict(tensors, model)
    outline = {name: rounded(torch.empty_like(item, device="meta")) for name, item in tensors.items()}
    # Names and shapes in the checkpoint, where they differ from the modules.
    outline = revert_weight_conversion(model, outline)
    split = split_torch_state_dict_into_shards(
        outline, filename_pattern=_FILENAME_PATTERN, max_shard_size=_MAX_FILE_SIZE
    )
    blocks: dict[str, dict[str, Any]] = {}
    for name, item in tensors.items():
        blocks.setdefault(block_name(name), {})[name] = item
    with torch.no_grad(), ExitStack() as stack:
        target.mkdir(parents=True, exist_ok=True)
        files: dict[str, _TensorFile] = {}
        for file, names in split.filename_to_tensors.items():
            stream = stack.enter_context((target / file).open("wb"))
            files |= dict.fromkeys(names, _TensorFile(stream, {name: outline[name] for name in names}))
        for block in blocks.values():
            if change is not None:
                change(block)
            stored = revert_weight_conversion(model, {name: rounded(item.detach()) for name, item in block.items()})
            for name, tensor in stored.items():
                files.pop(name).write(name, tensor)
            for item in block.values():
                item.data = torch.empty(0, dtype=item.dtype)
    if files:
        raise RuntimeError(f"the tensors {sorted(files)[:3]} belong to several blocks")
    if split.is_sharded:
        index = {"metadata": {"total_parameters": count, **split.metadata}, "weight_map": split.tensor_to_filename}
        (target / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _save_settings(model.to(dtype), target)


def _save_settings(model: Any, target: Path) -> None:
    """Save configurations and the model's own code, as `save_pretrained` does."""
    for name in model.config.sub_configs:
        if (part := getattr(model.config, name, None)) is not None:
            part.dtype = model.dtype
    written = set(target.iterdir())
    model.save_pretrained(target / "settings", state_dict={})
    for file in (target / "settings").iterdir():
        if file.suffix != ".safetensors" and target / file.name not in written:
            file.rename(target / file.name)
        else:
            file.unlink()
    (target / "settings").rmdir()


class _TensorFile:
    """A safetensors file written one tensor at a time; its header needs only names, dtypes and shapes."""

    def __init__(self, stream: IO[bytes], outline: Mapping[str, torch.Tensor]) -> None:
        self._stream, self._places, end = stream, dict[str, int](), 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        # In the order of the safetensors library: wide dtypes first, so that all are aligned.
        for name in sorted(outline, key=lambda name: (-outline[name].element_size(), name)):
            item = outline[name]
            self._places[name], end = end, end + item.numel() * item.element_size()
            header[name] = {
                "dtype": _SAFETENSORS_DTYPES[str(item.dtype).removeprefix("torch.")],
                "shape": list(item.shape),
                "data_offsets": [self._places[name], end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        stream.write(len(text).to_bytes(8, "little") + text)
        self._start = stream.tell()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        torch = require("torch", "train")
        self._stream.seek(self._start + self._places[name])
        self._stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
