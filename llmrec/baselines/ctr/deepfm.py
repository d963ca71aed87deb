"""DeepFM: products of pairs of fields beside a network over all of them."""

from __future__ import annotations

from typing import Any

from llmrec.baselines.ctr.host import Host, HostConfig, Seen, Sizes, all_fields, layers
from llmrec.errors import require


class DeepFMConfig(HostConfig):
    """Parameters of `DeepFM`."""


class DeepFM(Host[DeepFMConfig]):
    """Factorisation machine and deep network over the same vectors (Guo et al., IJCAI 2017, section 2.1).

    Each feature has a weight of its own in the first-order term, which is stored behind its vector. Counted numbers
    have theirs as all hosts have them.
    """

    name = "deepfm"
    Config = DeepFMConfig
    FIRST_ORDER = True

    def _build(self, sizes: Sizes) -> Any:
        nn, config = require("torch", "baselines").nn, self._config
        return nn.ModuleDict({"deep": layers((sizes.wide, *config.widths), config.dropout)})

    def _represent(self, body: Any, seen: Seen) -> tuple[Any, ...]:
        torch, found = require("torch", "baselines"), all_fields(seen)
        fields, weights = found[:, :, :-1], found[:, :, -1]
        deep = body["deep"][:-1](torch.cat([fields.flatten(1), seen.numbers], dim=1))
        return deep, weights, products(fields)[:, None]

    def _output(self, body: Any, parts: tuple[Any, ...]) -> Any:
        deep, weights, pairs = parts
        return weights.sum(dim=1) + pairs[:, 0] + body["deep"][-1](deep)[:, 0]


def products(fields: Any) -> Any:
    """Return the sum of the dot products of all pairs of fields, shape (b, f, d) -> (b,)."""
    return 0.5 * (fields.sum(dim=1) ** 2 - (fields**2).sum(dim=1)).sum(dim=1)
