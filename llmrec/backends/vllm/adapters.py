"""LoRA adapters that vLLM can load into a running engine, instead of merged weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llmrec.durable import parse_json
from llmrec.errors import require
from llmrec.types import Backend

# The adapter ranks that vLLM supports: `vllm.config.lora.MaxLoRARanks`.
_SUPPORTED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_WEIGHTS = "adapter_model.safetensors"
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The layers that adapters may change."""
_ADAPTER_TENSOR = re.compile(rf"\.(?:{'|'.join(LINEAR_LAYERS)})\.lora_[AB]\.weight$")
# PEFT settings that vLLM ignores or rejects, with their neutral values. An adapter has one rank and scale for all
# modules.
_NEUTRAL_SETTINGS: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "lora_bias": (False, None),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, "gaussian"),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that vLLM applies to its base model for each request.

    Attributes:
        base: The folder of the base model.
        weights: The digest of the base's weights.
        folder: The folder of the adapter.
        digest: The digest of the merged weights.
        rank: Its rank.
    """

    base: str
    weights: str
    folder: Path
    digest: str
    rank: int


@runtime_checkable
class Adaptable(Protocol):
    """A backend whose engine can apply adapters."""

    def adapted(self, adapter: Adapter) -> Backend:
        """Return a backend that uses the same engine with an adapter."""
        ...


def loadable_adapters(base: str, weights: str, folder: Path, digest: str) -> list[Adapter]:
    """Return the adapter in a folder as a list; empty if vLLM does not support it."""
    rank = loadable_rank(folder)
    return [] if rank is None else [Adapter(base, weights, folder, digest, rank)]


def loadable_rank(folder: Path) -> int | None:
    """Return the rank of the adapter in a folder; None if vLLM does not support it and it must be merged.

    Supported are LoRA and rsLoRA of linear layers, and nothing else: no DoRA, no trained token rows, and no other
    trained file (a rating head, soft prompts, masks of pruned weights).
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if {name for name in names if name.endswith((".safetensors", ".bin", ".pt"))} != {_WEIGHTS}:
        return None
    if not {name for name in names if name.endswith(".json")} <= {"adapter_config.json"}:
        return None
    config: dict[str, Any] = parse_json((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if any(key in config and config[key] not in values for key, values in _NEUTRAL_SETTINGS.items()):
        return None
    with require("safetensors", "train").safe_open(folder / _WEIGHTS, "np") as weights:
        if not all(_ADAPTER_TENSOR.search(name) for name in weights.keys()):  # noqa: SIM118
            return None
    rank = int(config["r"])
    return rank if rank <= _SUPPORTED_RANKS[-1] else None


def required_engine_rank(rank: int) -> int:
    """Return the maximum rank with which an engine must be started to serve adapters of this rank."""
    return next(known for known in _SUPPORTED_RANKS if known >= rank)
