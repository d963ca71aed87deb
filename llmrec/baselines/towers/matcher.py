"""Text matcher: attention over the texts of a history says who the user is, and likeness what suits (NAML, NRMS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from llmrec.baselines.item_texts import WHITENINGS
from llmrec.baselines.towers.tower import TextTowers, TowersConfig, item_vectors, turn
from llmrec.errors import require
from llmrec.recipe.schema import Positive

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TextMatcherConfig(TowersConfig):
    """Parameters of `TextMatcher`."""

    heads: int = Field(
        4, ge=0, description="attention heads between the items of a history, as in NRMS; 0: none, as in NAML"
    )
    attention: Positive = Field(64, description="width of the layer that says how much an item of the history counts")

    @model_validator(mode="after")
    def _heads_divide(self) -> TextMatcherConfig:
        if self.heads and self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, not {self.dim} and {self.heads}")
        return self


class TextMatcher(TextTowers[TextMatcherConfig]):
    """Matches items to a user by texts: the user encoders of NRMS (Wu et al., EMNLP 2019) and NAML (IJCAI 2019).

    With whitened text vectors x_i of length 1 (see `Content`), an item is ``r_j = norm(P x_j)``. With ``heads``, items
    of the history attend to each other (NRMS, section 2.2): ``h_i = [sum_k softmax_k(q_i . k_k / sqrt(d)) v_k]``, the
    heads side by side. Without, ``h_i = r_i`` (NAML, section 3.2). Additive attention then says how much each counts:
    ``a_i = softmax_i(w . tanh(V h_i + b))``. The user is ``u = norm(sum_i a_i h_i)``; ``score(j) = exp(s) u . r_j``:
    the probability of a click among some items is the softmax of their scores. Nothing knows the order of the
    history, as in the papers.

    Other than in the papers, texts are read by a fixed encoder, lengths are those of cosines, and the loss is over all
    items with training interactions, less those of the history, in place of four drawn ones. Before training all items
    count alike, and likeness is that of `Content` without fading.
    """

    name = "text-matcher"
    Config = TextMatcherConfig
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "whitening": WHITENINGS,
        "heads": (0, 4),
        "dropout": (0.0, 0.1, 0.2, 0.35, 0.5),
    }
    FITS: ClassVar[int] = 12

    def _build(self, width: int) -> Any:
        torch, config = require("torch", "baselines"), self._config
        nn, dim = torch.nn, config.dim
        network = nn.ModuleDict({"item": nn.Linear(width, dim, bias=False)})
        if config.heads:
            network.update({name: nn.Linear(dim, dim, bias=False) for name in ("query", "key", "value")})
            nn.init.eye_(network["value"].weight)
        network["weigh"] = nn.Sequential(
            nn.Linear(dim, config.attention), nn.Tanh(), nn.Linear(config.attention, 1, bias=False)
        )
        nn.init.zeros_(network["weigh"][-1].weight)
        turn(network, ["item"])
        return network

    def _query(self, network: Any, vectors: Any, histories: Sequence[NDArray[np.int64]]) -> Any:
        torch, longest = require("torch", "baselines"), max((len(each) for each in histories), default=1) or 1
        places = np.zeros((len(histories), longest), dtype=np.int64)
        for row, each in enumerate(histories):
            places[row, : len(each)] = each
        lengths = np.array([len(each) for each in histories], dtype=np.int64)
        mask = torch.from_numpy(np.arange(longest)[None, :] < lengths[:, None])
        items = item_vectors(network, vectors[torch.from_numpy(places)], self._config.dropout)
        if self._config.heads:
            items = attended(network, items, mask, self._config.heads)
        return (weights(network["weigh"], items, mask)[:, :, None] * items).sum(dim=1)


def attended(network: Any, items: Any, mask: Any, heads: int) -> Any:
    """Return the items of each history after they attended to each other (NRMS, section 2.2), shape (b, n, d).

    Args:
        network: Has the maps ``query``, ``key`` and ``value``.
        items: Shape (b, n, d).
        mask: Where there is an item, shape (b, n).
        heads: Between which the d values are divided.
    """
    query, key, value = (
        network[name](items).unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
    )
    likeness = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (shares(likeness, mask[:, None, None, :]) @ value).transpose(1, 2).flatten(2)


def weights(weigh: Any, items: Any, mask: Any) -> Any:
    """Return how much each item counts, shape (b, n): together 1, of padding 0: additive attention.

    Args:
        weigh: From d values to one.
        items: Shape (b, n, d).
        mask: Where there is an item, shape (b, n); all are 0 where there is none.
    """
    return shares(weigh(items)[:, :, 0], mask)


def shares(scores: Any, mask: Any) -> Any:
    """Return the softmax of those scores of the last axis that are under the mask; 0 for others, and where none is."""
    torch = require("torch", "baselines")
    # Of a row without any, a softmax of minus infinities would be no number.
    hidden = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(hidden, dim=-1) * mask
