"""Early exits: answers from the hidden states of a layer before the last one.

M6-Rec (arXiv 2205.08084) applies the task's loss at every depth k of L, with weights 2k / (L (L + 1)), which sum to 1,
so that inference may stop at any of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from llmrec.errors import ModelError, RecipeError, require
from llmrec.models.traits import chosen_logprobs, is_encoder_decoder, is_plain_head

if TYPE_CHECKING:
    import torch


def exit_weights(layers: int) -> list[float]:
    """Return the weight of the loss after each layer, from the first to the last."""
    return [2 * depth / (layers * (layers + 1)) for depth in range(1, layers + 1)]


def check_early_exits(model: torch.nn.Module, key: str) -> None:
    """Reject a model whose head cannot be applied to hidden states of earlier layers.

    Raises:
        ModelError: If it is an encoder-decoder, its logits are more than one matrix product, or it has no final norm.
    """
    body = None if is_encoder_decoder(model.config) else model.get_decoder()
    layered = hasattr(body, "layers") and hasattr(body, "norm")
    head = model.get_output_embeddings()
    # With item tokens, the head is wrapped by their trained rows, which the loss also reads.
    wrapper = getattr(head, "token_adapter", None)
    if not (layered and is_plain_head(model.config, head if wrapper is None else wrapper.base_layer)):
        raise ModelError(
            f"{key}: early exits need a decoder with layers, a final norm and a linear output layer, unlike "
            f"{model.config.model_type}; remove the key",
            kind="unsupported",
            column=key,
        )


def states_by_depth(model: torch.nn.Module, **inputs: Any) -> list[Any]:
    """Return the hidden states after each layer and the final norm, shape (rows, columns, d) each."""
    body = model.get_decoder()
    out = body(**inputs, use_cache=False, output_hidden_states=True)
    return [*(body.norm(states) for states in out.hidden_states[1:-1]), out.last_hidden_state]


class _ExitReached(Exception):
    """Raised to stop a forward pass at the exit layer."""

    def __init__(self, state: Any, depth: int) -> None:
        self.state, self.depth = state, depth


class EarlyExits:
    """Scores one-token labels with only the first layers of a model.

    Args:
        model: A decoder.
        exit: A layer number: exit after this layer. A fraction: exit after the first layer at which one of the labels
            has this probability among them.

    Attributes:
        taken: The number of layers used for each answer.
        whole: The number of prompts that used all layers, because their answers are not one-token labels.

    Raises:
        RecipeError: If the model has fewer layers.
        ModelError: See `check_early_exits`.
    """

    def __init__(self, model: torch.nn.Module, exit: float) -> None:
        check_early_exits(model, "eval.exit")
        self._torch, self._model, self._exit = require("torch", "train"), model, exit
        self._layers = list(model.get_decoder().layers)
        self.taken: Counter[int] = Counter()
        self.whole = 0
        if exit > len(self._layers):
            raise RecipeError(
                f"eval.exit: this model has only {len(self._layers)} layers; set at most this number, or a "
                "probability below 1",
                kind="bad-value",
                column="eval.exit",
            )

    def score(self, ids: Sequence[int], labels: Sequence[int]) -> list[float]:
        """Return the log-probabilities of labels after a prompt, over the full vocabulary."""
        torch, body = self._torch, self._model.get_decoder()
        label_ids = torch.tensor(list(labels), device=self._model.device)
        watched = range(len(self._layers)) if self._exit < 1 else [int(self._exit) - 1]
        hooks = [self._layers[n].register_forward_hook(partial(self._stop_at_exit, n + 1, label_ids)) for n in watched]
        try:
            with torch.inference_mode():
                body(input_ids=torch.tensor([list(ids)], device=self._model.device), use_cache=False)
        except _ExitReached as reached:
            self.taken[reached.depth] += 1
            head = self._model.get_output_embeddings()
            with torch.inference_mode():
                result = chosen_logprobs(head, reached.state, torch.zeros_like(label_ids), label_ids)
        finally:
            for hook in hooks:
                hook.remove()
        return [float(item) for item in result]

    def _stop_at_exit(self, depth: int, labels: torch.Tensor, layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        state = self._model.get_decoder().norm(states[0, -1:])
        last = depth == len(self._layers) or self._exit >= 1
        if not last:
            logits = state.float() @ self._model.get_output_embeddings().weight[labels].float().T
            last = bool(logits.softmax(-1).max() >= self._exit)
        if last:
            raise _ExitReached(state, depth)
