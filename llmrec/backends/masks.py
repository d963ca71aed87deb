"""Which models read a mask that says token by token what is seen."""

from __future__ import annotations

from typing import Any

from llmrec.backends.kinds import is_paired


def takes_block_mask(config: Any) -> bool:
    """Whether every layer is full attention in an implementation that reads a four-dimensional mask.

    An encoder-decoder reads prompt and answer in two halves, so no one mask holds both.
    """
    if is_paired(config):
        return False
    text = config.get_text_config()
    layers = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    full = all(kind == "full_attention" for kind in layers) if layers else window is None
    recurrent = any(word in text.model_type for word in ("mamba", "rwkv", "jamba", "zamba", "recurrent"))
    return full and not recurrent and getattr(config, "_attn_implementation", "sdpa") in ("sdpa", "eager")
