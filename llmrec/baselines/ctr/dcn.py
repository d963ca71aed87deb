"""DCN-v2: layers that multiply all values with all others, beside a network."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from llmrec.baselines.ctr.host import Host, HostConfig, Seen, Sizes, all_fields, layers
from llmrec.errors import require
from llmrec.recipe.schema import Positive


class DCNConfig(HostConfig):
    """Parameters of `DCN`."""

    cross: Positive = Field(2, description="cross layers")


class DCN(Host[DCNConfig]):
    """Deep and cross network, version 2, cross and deep side by side (Wang et al., WWW 2021, sections 3.2 and 3.3)."""

    name = "dcn"
    Config = DCNConfig

    def _build(self, sizes: Sizes) -> Any:
        nn, config = require("torch", "baselines").nn, self._config
        deep = layers((sizes.wide, *config.widths), config.dropout, last=None)
        return nn.ModuleDict(
            {
                "cross": nn.ModuleList([nn.Linear(sizes.wide, sizes.wide) for _ in range(config.cross)]),
                "deep": deep,
                "last": nn.Linear(sizes.wide + config.widths[-1], 1),
            }
        )

    def _represent(self, body: Any, seen: Seen) -> tuple[Any, ...]:
        torch = require("torch", "baselines")
        first = torch.cat([all_fields(seen).flatten(1), seen.numbers], dim=1)
        return (torch.cat([crossed(body["cross"], first), body["deep"](first)], dim=1),)

    def _output(self, body: Any, parts: tuple[Any, ...]) -> Any:
        return body["last"](parts[0])[:, 0]


def crossed(cross: Any, first: Any) -> Any:
    """Return values after cross layers, shape (b, n): ``x <- x0 * (W x + b) + x`` in each."""
    values = first
    for layer in cross:
        values = first * layer(values) + values
    return values
