"""Cross-entropy on label rows only.

The language-model head is the widest matrix of a small model; applying it to the rows that carry a label, a few
hundred at a time, keeps both its cost and its memory proportional to the number of targets.
"""

from __future__ import annotations

from typing import Any

import torch

from llmrec.backends.encode import IGNORED
from llmrec.backends.heads import plain_head

_CHUNK = 256


class _FrozenHeadLoss(torch.autograd.Function):  # type: ignore[misc]
    """Sum of cross-entropies through a frozen head; the gradient is formed in the forward pass.

    With the head frozen only d(loss)/d(hidden) = (softmax - onehot) W is ever needed, so each chunk of logits is
    turned into its gradient while it is still at hand, and no logits outlive their chunk. Rows of new tokens, which
    are trained, get theirs from the same chunk: (softmax - onehot)' hidden, in the columns of these tokens.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, rows: Any = None, places: Any = None) -> Any:
        grad = torch.empty_like(hidden)
        grad_rows = None if rows is None else torch.zeros_like(rows)
        if rows is not None:
            weight = weight.index_copy(0, places, rows.to(weight.dtype))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), _CHUNK):
            states, wanted = hidden[start : start + _CHUNK], targets[start : start + _CHUNK, None]
            logits = (states @ weight.T).float()
            peak = logits.amax(-1, keepdim=True)
            picked = logits.gather(-1, wanted)
            logits.sub_(peak).exp_()
            mass = logits.sum(-1, keepdim=True)
            total += (peak + mass.log() - picked).sum()
            logits.div_(mass).scatter_add_(-1, wanted, torch.full_like(picked, -1.0))
            grad[start : start + _CHUNK] = logits.to(weight.dtype) @ weight
            if grad_rows is not None:
                grad_rows += logits[:, places].T @ states.float()
        ctx.save_for_backward(grad, grad_rows)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        grad, grad_rows = ctx.saved_tensors
        onto_rows = None if grad_rows is None else grad_rows * upstream[0]
        return grad * upstream[0].to(grad.dtype), None, None, onto_rows, None


def label_loss(model: Any, input_ids: Any, labels: Any) -> tuple[Any, int]:
    """Return the summed cross-entropy over labelled positions and their number.

    Args:
        model: A causal language model, with or without PEFT adapters.
        input_ids: Token ids, right-padded, shape (rows, length). No attention mask is needed: under causal
            attention no position sees the padding that follows it.
        labels: Same shape; -100 where there is no loss.
    """
    wanted = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][wanted]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, rows, places = _head(base)
    if not plain_head(base.config, head):
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1][wanted]
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)
    hidden = base.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1][wanted]
    if not head.weight.requires_grad:
        return _FrozenHeadLoss.apply(hidden.to(head.weight.dtype), head.weight, targets, rows, places), len(targets)
    total = torch.zeros((), device=hidden.device)
    for start in range(0, len(hidden), _CHUNK):
        total = total + torch.utils.checkpoint.checkpoint(
            _chunk_loss, head, hidden[start : start + _CHUNK], targets[start : start + _CHUNK], use_reentrant=False
        )
    return total, len(targets)


def _chunk_loss(head: Any, hidden: Any, targets: Any) -> Any:
    return torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


def _head(base: Any) -> tuple[Any, Any, Any]:
    """Return the head, and of one with new tokens the trained rows and their places in it; else None and None."""
    head = base.get_output_embeddings()
    adapter = getattr(head, "token_adapter", None)
    if adapter is None:
        return head, None, None
    (name,) = adapter.active_adapters
    places = torch.tensor(adapter.token_indices[name], device=adapter.base_layer.weight.device)
    return adapter.base_layer, adapter.trainable_tokens_delta[name], places
