"""SASRec: self-attention over the history, trained with a softmax over all items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from llmrec.baselines.base import AutoSetting
from llmrec.baselines.neural import ProfiledConfig, SequenceConfig, SequenceNetwork
from llmrec.errors import require
from llmrec.recipe.schema import Depth, Width

if TYPE_CHECKING:
    import torch


class AttentionConfig(SequenceConfig):
    """Parameters of a network of attention blocks."""

    dim: Width = Field(64, description="Dimension of item embeddings and hidden states; a multiple of `heads`.")
    layers: Depth = Field(2, description="Number of transformer layers.")
    heads: Width = Field(2, description="Number of attention heads.")

    @model_validator(mode="after")
    def _check_heads(self) -> AttentionConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, not {self.dim} and {self.heads}")
        return self


class SASRecConfig(AttentionConfig, ProfiledConfig):
    """Parameters of `SASRec`."""


class SASRec(SequenceNetwork[SASRecConfig]):
    """SASRec: predicts the next item by causal self-attention (Kang and McAuley, ICDM 2018).

    The loss is the cross-entropy over all items at every position instead of the paper's binary loss with a single
    sampled negative, which lowered published SASRec results (Klenitskiy and Vasilev, RecSys 2023; Petrov and Macdonald,
    RecSys 2023). ``negatives`` estimates it from sampled items, for large catalogues. Blocks use pre-normalisation; the
    item embeddings are input and output; learned position embeddings count from the start of the input.

    Training ends when validation NDCG@10 has not risen for ``patience`` epochs, and the best epoch's weights are kept.
    With ``patience=None`` the validation split is not used.
    """

    name = "sasrec"
    Config = SASRecConfig
    AUTO = (AutoSetting(17),)
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "dropout": (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8),
        "dim": (32, 64, 128, 256),
        "learning_rate": (3e-4, 1e-3, 3e-3),
        "layers": (1, 2, 3, 4),
    }
    FITS: ClassVar[int] = 12

    def _build(self, items: int) -> Any:
        table = require("torch", "baselines").nn.Embedding(items, self._config.dim)
        return attention_network(self._config, self._config.steps, table=table)

    def _encode(self, network: torch.nn.Module, items: Any) -> Any:
        return apply_attention_blocks(network, self._embedded(network, items), self._config.heads, self._config.dropout)


def attention_network(config: AttentionConfig, steps: int, **parts: Any) -> Any:
    """Return an untrained network for `apply_attention_blocks`.

    Args:
        config: Its shape.
        steps: Maximum number of positions.
        parts: Further modules of the network.
    """
    nn, dim = require("torch", "baselines").nn, config.dim
    blocks = [
        {
            "attend_norm": nn.LayerNorm(dim),
            "attend_in": nn.Linear(dim, 3 * dim),
            "attend_out": nn.Linear(dim, dim),
            "feed_norm": nn.LayerNorm(dim),
            "feed_in": nn.Linear(dim, 4 * dim),
            "feed_out": nn.Linear(4 * dim, dim),
        }
        for _ in range(config.layers)
    ]
    parts |= {
        "places": nn.Embedding(steps, dim),
        "blocks": nn.ModuleList([nn.ModuleDict(block) for block in blocks]),
        "last_norm": nn.LayerNorm(dim),
    }
    return initialise_weights(nn.ModuleDict(parts))


def initialise_weights(network: torch.nn.Module) -> Any:
    """Initialise weight matrices from a narrow normal distribution and biases with 0."""
    init = require("torch", "baselines").nn.init
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            init.zeros_(parameter)
    return network


def apply_attention_blocks(network: torch.nn.Module, items: Any, heads: int, dropout: float) -> Any:
    """Return one vector per position, computed from this and earlier positions, shape (b, t, dim).

    Padding is on the right and attention is causal, so that padding needs no mask.

    Args:
        network: With ``places``, ``blocks`` and ``last_norm``.
        items: Vectors of items, shape (b, t, dim).
        heads: Number of attention heads.
        dropout: Dropout rate in training.
    """
    functional = require("torch", "baselines").nn.functional
    rows, length, dim = items.shape
    share = dropout if network.training else 0.0

    def drop(values: Any) -> Any:
        return functional.dropout(values, share, network.training)

    state = drop(items + network["places"].weight[:length])
    for block in network["blocks"]:
        mixed = block["attend_in"](block["attend_norm"](state))
        query, key, value = mixed.view(rows, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=share)
        state = state + drop(block["attend_out"](seen.transpose(1, 2).reshape(rows, length, dim)))
        wide = functional.gelu(block["feed_in"](block["feed_norm"](state)))
        state = state + drop(block["feed_out"](drop(wide)))
    return network["last_norm"](state)
