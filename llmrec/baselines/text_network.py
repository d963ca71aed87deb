"""Sequence models whose item vectors combine a learned embedding with a frozen text vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from llmrec.baselines.item_texts import PrincipalAxes, WhitenedConfig, text_vectors
from llmrec.baselines.neural import SequenceConfig, SequenceNetwork
from llmrec.errors import require
from llmrec.recipe.schema import Width

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from llmrec.baselines.base import WarmItems
    from llmrec.data.split import SplitDataset

# Initial standard deviation of embeddings, and of the map of text vectors, which have length 1. With a smaller one the
# texts are learned too slowly.
_EMBEDDING, _PROJECTION = 0.02, 0.1


class TextNetworkConfig(SequenceConfig, WhitenedConfig):
    """Parameters of item vectors with texts."""

    whitening: float = Field(
        1.0, ge=0, le=1, description="Strength of the whitening of the embeddings. 0: none, 1: full."
    )
    dim: Width = Field(128, description="Dimension of item vectors.")


C = TypeVar("C", bound=TextNetworkConfig)


class TextNetwork(SequenceNetwork[C]):
    """Base class of sequence models with item vectors ``e_i + W x_i``.

    The whitened text vectors x_i are frozen; the embeddings e_i and the map W are trained. As in `SequenceNetwork` the
    item vectors are input and output.
    """

    _texts: NDArray[np.float32]

    def _open(self, data: SplitDataset, warm: WarmItems) -> None:
        """Read the texts."""
        super()._open(data, warm)
        axes = PrincipalAxes.of(text_vectors(data, warm.catalogue.ids, self._config))
        self._texts = axes.whitened(self._config.whitening)[warm.indices].astype("float32")

    def _built(self, items: int) -> Any:
        torch, network, dim = require("torch", "baselines"), super()._built(items), self._config.dim
        network["table"] = torch.nn.Embedding(items, dim)
        network["project"] = torch.nn.Linear(self._texts.shape[1], dim, bias=False)
        torch.nn.init.normal_(network["table"].weight, std=_EMBEDDING)
        torch.nn.init.normal_(network["project"].weight, std=_PROJECTION)
        # A buffer, so that it moves with the network; not persistent, since it is computed from the data.
        network.register_buffer("texts", torch.from_numpy(self._texts), persistent=False)
        return network

    def _embedded(self, network: torch.nn.Module, items: Any) -> Any:
        """Return the vectors of some items, shape (b, t, dim)."""
        return network["table"](items) + network["project"](network.texts[items])

    def _item_vectors(self, network: torch.nn.Module) -> Any:
        """Return the vectors of all items with training interactions, shape (items, dim)."""
        return network["table"].weight + network["project"](network.texts)
