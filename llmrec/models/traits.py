"""Properties of a model according to its configuration: its kind, its head, and the supported attention masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmrec.errors import require

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

# Number of rows of logits in float32 at a time.
_LOGIT_ROWS = 256
# Number of logits per row that are computed in float32 for the normaliser.
_EXACT_LOGITS = 16
# Configuration keys of models whose logits are more than one matrix product.
_LOGIT_SCALE_KEYS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def is_plain_head(config: PretrainedConfig, head: torch.nn.Module) -> bool:
    """Whether logits are exactly ``hidden @ weight.T``, without soft cap, scale or bias."""
    text = config.get_text_config()
    shaped = any(getattr(text, name, None) for name in _LOGIT_SCALE_KEYS)
    return not shaped and type(head) is require("torch", "train").nn.Linear and head.bias is None


def chosen_logprobs(head: torch.nn.Module, states: torch.Tensor, after: Any, tokens: Any) -> Any:
    """Return full-softmax log-probabilities of chosen tokens for a head with `is_plain_head`, float64, shape (n,).

    Logits of a bfloat16 head are 1/8 apart from 16 on: many labels would tie, and an almost certain token would have a
    log-probability above 0, which breaks the search. So the chosen logits are computed in float32, and so are the
    largest ones of each row, which dominate its normaliser; the errors of the others average out.

    Args:
        head: The output layer.
        states: Last hidden states, shape (rows, d).
        after: The row that precedes each chosen token, shape (n,).
        tokens: The tokens, shape (n,).
    """
    torch = require("torch", "train")
    totals = torch.empty(len(states), dtype=torch.float64, device=states.device)
    result = torch.empty(len(tokens), dtype=torch.float64, device=states.device)
    exact = states.dtype == torch.float32
    for start in range(0, len(states), _LOGIT_ROWS):
        part = states[start : start + _LOGIT_ROWS]
        logits = head(part).float()
        if exact:
            selected = ((after >= start) & (after < start + _LOGIT_ROWS)).nonzero()[:, 0]
            result[selected] = logits[after[selected] - start, tokens[selected]].double()
        else:
            largest = logits.topk(min(_EXACT_LOGITS, logits.shape[-1])).indices
            logits.scatter_(-1, largest, (part[:, None].float() * head.weight[largest].float()).sum(-1))
        totals[start : start + _LOGIT_ROWS] = logits.logsumexp(-1).double()
    if not exact:
        for part in torch.arange(len(tokens), device=states.device).split(_LOGIT_ROWS):
            products = states[after[part]].float() * head.weight[tokens[part]].float()
            result[part] = products.sum(-1).double()
    return (result - totals[after]).clamp(max=0.0)


def is_encoder_decoder(config: PretrainedConfig) -> bool:
    """Whether the model is an encoder-decoder, such as T5."""
    return bool(getattr(config, "is_encoder_decoder", False))


def cache_bytes_per_token(config: PretrainedConfig, itemsize: int) -> int:
    """Return the bytes of the KV cache per token, over all layers.

    An upper bound for layers with a window or a compressed state.
    """
    text = config.get_text_config()
    # recurrent models have no attention heads
    heads = getattr(text, "num_attention_heads", None) or 1
    kept = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * text.num_hidden_layers * kept * width * itemsize)


def auto_class(config: PretrainedConfig) -> Any:
    """Return the transformers Auto class for a configuration, including the head."""
    transformers = require("transformers", "train")
    return transformers.AutoModelForSeq2SeqLM if is_encoder_decoder(config) else transformers.AutoModelForCausalLM


def can_use_block_mask(config: PretrainedConfig) -> bool:
    """Whether all layers use full attention in an implementation that accepts a four-dimensional mask.

    An encoder-decoder reads prompt and answer separately, so one mask cannot cover both. Where positions are an
    attention bias (ALiBi), the bias counts columns, which differ from positions in a packed tree.
    """
    if is_encoder_decoder(config):
        return False
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None)
    full = all(kind == "full_attention" for kind in kinds) if kinds else window is None
    # GPT-Neo alternates between global and windowed layers, with its own key names.
    local = "local" in (getattr(text, "attention_layers", None) or ())
    attention = getattr(text, "attn_config", None)
    biased = text.model_type == "bloom" or any(getattr(item, "alibi", False) for item in (text, attention))
    recurrent = any(word in text.model_type for word in ("mamba", "rwkv", "jamba", "zamba", "recurrent"))
    reads = getattr(config, "_attn_implementation", "sdpa") in ("sdpa", "eager")
    return full and reads and not (local or biased or recurrent)
