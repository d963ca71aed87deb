"""Which models' logits are one matrix product with the last hidden states, so that chosen rows can be had alone."""

from __future__ import annotations

from typing import Any

from llmrec.errors import require

# Configuration keys of models whose logits are more than one matrix product.
_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def plain_head(config: Any, head: Any) -> bool:
    """Whether logits are exactly ``hidden @ weight.T``: no soft cap, scale or bias, and a plain matrix."""
    text = config.get_text_config()
    shaped = any(getattr(text, name, None) for name in _SCALES)
    return not shaped and type(head) is require("torch", "train").nn.Linear and head.bias is None
