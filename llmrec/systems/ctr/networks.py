"""The CTR networks: DIN, DeepFM, DCN-v2 and AutoInt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from llmrec.errors import require
from llmrec.recipe.schema import Positive, Width
from llmrec.systems.ctr.host import CtrNetwork, CtrNetworkConfig, FeatureBatch, InputSizes, all_fields, dense_layers

if TYPE_CHECKING:
    import torch


class DIN(CtrNetwork[CtrNetworkConfig]):
    """Deep interest network (Zhou et al., KDD 2018, section 4.3).

    The weight of a history item h for the item q is a network over ``[q, h, q - h, q * h]``. Weights are not
    normalised, so that several relevant items have more weight than one; padding has weight 0.
    """

    name = "din"
    Config = CtrNetworkConfig
    POOLED: ClassVar[int] = 1

    def _build(self, sizes: InputSizes) -> Any:
        nn, config = require("torch", "baselines").nn, self._config
        return nn.ModuleDict(
            {
                "weigh": nn.Sequential(nn.Linear(4 * sizes.dim, 36), nn.PReLU(), nn.Linear(36, 1)),
                "deep": dense_layers((sizes.wide, *config.widths), config.dropout),
            }
        )

    def _represent(self, body: torch.nn.Module, seen: FeatureBatch) -> tuple[Any, ...]:
        torch = require("torch", "baselines")
        interest = attend_to_history(body["weigh"], seen.item, seen.events, seen.mask)
        wide = torch.cat([seen.fields.flatten(1), interest, seen.numbers], dim=1)
        return (body["deep"][:-1](wide),)

    def _output(self, body: torch.nn.Module, parts: tuple[Any, ...]) -> Any:
        return body["deep"][-1](parts[0])[:, 0]


def attend_to_history(weigh: Any, item: Any, events: Any, mask: torch.Tensor) -> Any:
    """Return the attention-weighted sum of the history, shape (b, d).

    Args:
        weigh: Maps 4 d dimensions to a weight.
        item: Item vectors, shape (b, d).
        events: Vectors of the history, shape (b, n, d).
        mask: 1 for history items, 0 for padding, shape (b, n).
    """
    torch = require("torch", "baselines")
    repeated = item[:, None, :].expand_as(events)
    weights = weigh(torch.cat([repeated, events, repeated - events, repeated * events], dim=-1))[:, :, 0] * mask
    return (weights[:, :, None] * events).sum(dim=1)


class DeepFM(CtrNetwork[CtrNetworkConfig]):
    """A factorisation machine and a deep network over the same embeddings (Guo et al., IJCAI 2017, section 2.1).

    Each feature has a weight in the first-order term, stored after its vector.
    """

    name = "deepfm"
    Config = CtrNetworkConfig
    FIRST_ORDER = True

    def _build(self, sizes: InputSizes) -> Any:
        nn, config = require("torch", "baselines").nn, self._config
        return nn.ModuleDict({"deep": dense_layers((sizes.wide, *config.widths), config.dropout)})

    def _represent(self, body: torch.nn.Module, seen: FeatureBatch) -> tuple[Any, ...]:
        torch, result = require("torch", "baselines"), all_fields(seen)
        fields, weights = result[:, :, :-1], result[:, :, -1]
        deep = body["deep"][:-1](torch.cat([fields.flatten(1), seen.numbers], dim=1))
        return deep, weights, sum_pairwise_products(fields)[:, None]

    def _output(self, body: torch.nn.Module, parts: tuple[Any, ...]) -> Any:
        deep, weights, pairs = parts
        return weights.sum(dim=1) + pairs[:, 0] + body["deep"][-1](deep)[:, 0]


def sum_pairwise_products(fields: Any) -> Any:
    """Return the sum of the dot products of all pairs of fields: shape (b, f, d) -> (b,)."""
    return 0.5 * (fields.sum(dim=1) ** 2 - (fields**2).sum(dim=1)).sum(dim=1)


class DCNConfig(CtrNetworkConfig):
    """Parameters of `DCN`."""

    cross: Positive = Field(2, description="Number of cross layers.")


class DCN(CtrNetwork[DCNConfig]):
    """DCN-v2 with parallel cross and deep networks (Wang et al., WWW 2021, sections 3.2 and 3.3)."""

    name = "dcn"
    Config = DCNConfig

    def _build(self, sizes: InputSizes) -> Any:
        nn, config = require("torch", "baselines").nn, self._config
        deep = dense_layers((sizes.wide, *config.widths), config.dropout, last=None)
        return nn.ModuleDict(
            {
                "cross": nn.ModuleList([nn.Linear(sizes.wide, sizes.wide) for _ in range(config.cross)]),
                "deep": deep,
                "last": nn.Linear(sizes.wide + config.widths[-1], 1),
            }
        )

    def _represent(self, body: torch.nn.Module, seen: FeatureBatch) -> tuple[Any, ...]:
        torch = require("torch", "baselines")
        first = torch.cat([all_fields(seen).flatten(1), seen.numbers], dim=1)
        return (torch.cat([apply_cross_layers(body["cross"], first), body["deep"](first)], dim=1),)

    def _output(self, body: torch.nn.Module, parts: tuple[Any, ...]) -> Any:
        return body["last"](parts[0])[:, 0]


def apply_cross_layers(cross: Any, first: Any) -> Any:
    """Apply cross layers, ``x <- x0 * (W x + b) + x`` each, shape (b, n)."""
    values = first
    for layer in cross:
        values = first * layer(values) + values
    return values


class AutoIntConfig(CtrNetworkConfig):
    """Parameters of `AutoInt`."""

    attention: Positive = Field(2, description="Number of attention layers.")
    heads: Width = Field(2, description="Number of attention heads; must divide `dim`.")

    @model_validator(mode="after")
    def _check_heads(self) -> AutoIntConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, not {self.dim} and {self.heads}")
        return self


class AutoInt(CtrNetwork[AutoIntConfig]):
    """Self-attention over fields with a residual, and a parallel deep network (Song et al., CIKM 2019, AutoInt+)."""

    name = "autoint"
    Config = AutoIntConfig

    def _build(self, sizes: InputSizes) -> Any:
        nn, config, dim = require("torch", "baselines").nn, self._config, sizes.dim
        return nn.ModuleDict(
            {
                "blocks": nn.ModuleList(
                    [
                        nn.ModuleDict({name: nn.Linear(dim, dim, bias=False) for name in ("q", "k", "v", "keep")})
                        for _ in range(config.attention)
                    ]
                ),
                "deep": dense_layers((sizes.wide, *config.widths), config.dropout),
                "last": nn.Linear(sizes.fields * dim, 1),
            }
        )

    def _represent(self, body: torch.nn.Module, seen: FeatureBatch) -> tuple[Any, ...]:
        torch, fields = require("torch", "baselines"), all_fields(seen)
        deep = body["deep"][:-1](torch.cat([fields.flatten(1), seen.numbers], dim=1))
        for block in body["blocks"]:
            fields = apply_attention_layer(block, fields, self._config.heads)
        return deep, fields.flatten(1)

    def _output(self, body: torch.nn.Module, parts: tuple[Any, ...]) -> Any:
        deep, fields = parts
        return body["last"](fields)[:, 0] + body["deep"][-1](deep)[:, 0]


def apply_attention_layer(block: Any, fields: Any, heads: int) -> Any:
    """Apply an attention layer without scaling, ``relu(softmax(q k) v + W fields)``, shape (b, f, d)."""
    torch = require("torch", "baselines")

    def split(values: Any) -> Any:
        return values.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value = (split(block[name](fields)) for name in ("q", "k", "v"))
    mixed = torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value
    return torch.relu(mixed.transpose(1, 2).flatten(2) + block["keep"](fields))
