"""DIN: events count by how they bear on the item that is judged."""

from __future__ import annotations

from typing import Any, ClassVar

from llmrec.baselines.ctr.host import Host, HostConfig, Seen, Sizes, layers
from llmrec.errors import require


class DINConfig(HostConfig):
    """Parameters of `DIN`."""


class DIN(Host[DINConfig]):
    """Deep interest network (Zhou et al., KDD 2018, section 4.3).

    The weight of an event h beside the item q is a network over ``[q, h, q - h, q * h]``. Weights are not normalised,
    so that many events that bear on the item weigh more than one; padding weighs nothing.
    """

    name = "din"
    Config = DINConfig
    POOLED: ClassVar[int] = 1

    def _build(self, sizes: Sizes) -> Any:
        nn, config = require("torch", "baselines").nn, self._config
        return nn.ModuleDict(
            {
                "weigh": nn.Sequential(nn.Linear(4 * sizes.dim, 36), nn.PReLU(), nn.Linear(36, 1)),
                "deep": layers((sizes.wide, *config.widths), config.dropout),
            }
        )

    def _represent(self, body: Any, seen: Seen) -> tuple[Any, ...]:
        torch = require("torch", "baselines")
        interest = attended(body["weigh"], seen.item, seen.events, seen.mask)
        wide = torch.cat([seen.fields.flatten(1), interest, seen.numbers], dim=1)
        return (body["deep"][:-1](wide),)

    def _output(self, body: Any, parts: tuple[Any, ...]) -> Any:
        return body["deep"][-1](parts[0])[:, 0]


def attended(weigh: Any, item: Any, events: Any, mask: Any) -> Any:
    """Return the weighted sum of events, shape (b, d).

    Args:
        weigh: From 4 d values to one.
        item: Shape (b, d).
        events: Shape (b, n, d).
        mask: 1 where there is an event, shape (b, n).
    """
    torch = require("torch", "baselines")
    beside = item[:, None, :].expand_as(events)
    weights = weigh(torch.cat([beside, events, beside - events, beside * events], dim=-1))[:, :, 0] * mask
    return (weights[:, :, None] * events).sum(dim=1)
