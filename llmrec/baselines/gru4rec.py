"""GRU4Rec: a recurrent network over the history, trained with a softmax over all items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from llmrec.baselines.neural import ProfiledConfig, SequenceNetwork
from llmrec.errors import require
from llmrec.recipe.schema import Depth, Width

if TYPE_CHECKING:
    import torch


class GRU4RecConfig(ProfiledConfig):
    """Parameters of `GRU4Rec`."""

    dim: Width = Field(128, description="Dimension of item embeddings and hidden states.")
    layers: Depth = Field(1, description="Number of recurrent layers.")


class GRU4Rec(SequenceNetwork[GRU4RecConfig]):
    """GRU4Rec: predicts the next item with a gated recurrent network (Hidasi et al., ICLR 2016).

    The loss is the cross-entropy over all items at every position instead of a loss over the other items of a batch,
    and the item embeddings are input and output, as in later versions of the method (Hidasi and Karatzoglou, CIKM
    2018). Training stops as in SASRec: by validation NDCG@10, or after ``epochs`` with ``patience=None``.
    """

    name = "gru4rec"
    Config = GRU4RecConfig
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "dim": (32, 64, 128, 256),
        "layers": (1, 2),
        "dropout": (0.1, 0.2, 0.35, 0.5, 0.6, 0.7),
        "learning_rate": (0.0003, 0.001, 0.003),
    }
    FITS: ClassVar[int] = 12

    def _build(self, items: int) -> Any:
        nn = require("torch", "baselines").nn
        network = nn.ModuleDict(
            {
                "table": nn.Embedding(items, self._config.dim),
                "recur": nn.GRU(self._config.dim, self._config.dim, num_layers=self._config.layers, batch_first=True),
                "out": nn.Linear(self._config.dim, self._config.dim),
                "last_norm": nn.LayerNorm(self._config.dim),
            }
        )
        nn.init.normal_(network["table"].weight, std=0.02)
        return network

    def _encode(self, network: torch.nn.Module, items: Any) -> Any:
        functional = require("torch", "baselines").nn.functional
        inputs = functional.dropout(self._embedded(network, items), self._config.dropout, network.training)
        state = functional.dropout(network["recur"](inputs)[0], self._config.dropout, network.training)
        return network["last_norm"](network["out"](state))
