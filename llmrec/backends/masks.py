"""Which models read a mask that says token by token what is seen."""

from __future__ import annotations

from typing import Any

from llmrec.backends.kinds import is_paired


def takes_block_mask(config: Any) -> bool:
    """Whether every layer is full attention in an implementation that reads a four-dimensional mask.

    An encoder-decoder reads prompt and answer in two halves, so no one mask holds both. Where positions are a bias on
    attention (ALiBi), it counts columns, and those of a tree are not the places in a text.
    """
    if is_paired(config):
        return False
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None)
    full = all(kind == "full_attention" for kind in kinds) if kinds else window is None
    # GPT-Neo alternates between global layers and a window, under names of its own.
    local = "local" in (getattr(text, "attention_layers", None) or ())
    attention = getattr(text, "attn_config", None)
    biased = text.model_type == "bloom" or any(getattr(each, "alibi", False) for each in (text, attention))
    recurrent = any(word in text.model_type for word in ("mamba", "rwkv", "jamba", "zamba", "recurrent"))
    reads = getattr(config, "_attn_implementation", "sdpa") in ("sdpa", "eager")
    return full and reads and not (local or biased or recurrent)
