"""AutoInt: fields attend to each other."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from llmrec.baselines.ctr.host import Host, HostConfig, Seen, Sizes, all_fields, layers
from llmrec.errors import require
from llmrec.recipe.schema import Positive, Width


class AutoIntConfig(HostConfig):
    """Parameters of `AutoInt`."""

    attention: Positive = Field(2, description="layers of attention")
    heads: Width = Field(2, description="attention heads; dim is a multiple of them")

    @model_validator(mode="after")
    def _heads_divide(self) -> AutoIntConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, not {self.dim} and {self.heads}")
        return self


class AutoInt(Host[AutoIntConfig]):
    """Self-attention over fields with a residual, beside a network (Song et al., CIKM 2019, AutoInt+)."""

    name = "autoint"
    Config = AutoIntConfig

    def _build(self, sizes: Sizes) -> Any:
        nn, config, dim = require("torch", "baselines").nn, self._config, sizes.dim
        return nn.ModuleDict(
            {
                "blocks": nn.ModuleList(
                    [
                        nn.ModuleDict({name: nn.Linear(dim, dim, bias=False) for name in ("q", "k", "v", "keep")})
                        for _ in range(config.attention)
                    ]
                ),
                "deep": layers((sizes.wide, *config.widths), config.dropout),
                "last": nn.Linear(sizes.fields * dim, 1),
            }
        )

    def _represent(self, body: Any, seen: Seen) -> tuple[Any, ...]:
        torch, fields = require("torch", "baselines"), all_fields(seen)
        deep = body["deep"][:-1](torch.cat([fields.flatten(1), seen.numbers], dim=1))
        for block in body["blocks"]:
            fields = attend(block, fields, self._config.heads)
        return deep, fields.flatten(1)

    def _output(self, body: Any, parts: tuple[Any, ...]) -> Any:
        deep, fields = parts
        return body["last"](fields)[:, 0] + body["deep"][-1](deep)[:, 0]


def attend(block: Any, fields: Any, heads: int) -> Any:
    """Return fields after a layer of attention, shape (b, f, d): ``relu(softmax(q k) v + W fields)``, not scaled."""
    torch = require("torch", "baselines")

    def split(values: Any) -> Any:
        return values.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value = (split(block[name](fields)) for name in ("q", "k", "v"))
    mixed = torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value
    return torch.relu(mixed.transpose(1, 2).flatten(2) + block["keep"](fields))
