"""SASRec whose item vectors also read the texts of items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from llmrec.baselines.sasrec import AttentionConfig, apply_attention_blocks, attention_network
from llmrec.baselines.text_network import TextNetwork, TextNetworkConfig
from llmrec.recipe.schema import Width
from llmrec.results import Reads

if TYPE_CHECKING:
    import torch


class SASRecTextConfig(TextNetworkConfig, AttentionConfig):
    """Parameters of `SASRecText`."""

    dim: Width = Field(128, description="Dimension of item vectors and hidden states; a multiple of `heads`.")


class SASRecText(TextNetwork[SASRecTextConfig]):
    """SASRec with item vectors ``e_i + W x_i``, a learned embedding plus a learned map of a frozen text vector.

    Blocks, loss and early stopping are those of `SASRec`. `UniSRec` with ``ids`` mixes several maps of texts instead
    and scores by cosine. Items without training interactions have no embedding and are ranked last.
    """

    name = "sasrec-text"
    Config = SASRecTextConfig
    READS: ClassVar[Reads] = "texts"
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "dropout": (0.2, 0.35, 0.5, 0.65),
        "dim": (64, 128, 256),
        "whitening": (0.5, 0.8, 1.0),
    }
    FITS: ClassVar[int] = 5

    def _build(self, items: int) -> Any:
        return attention_network(self._config, self._config.max_len)

    def _encode(self, network: torch.nn.Module, items: Any) -> Any:
        return apply_attention_blocks(network, self._embedded(network, items), self._config.heads, self._config.dropout)
