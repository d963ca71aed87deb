"""`LLMSequence`: the first layers of a pretrained language model as the sequence model, with one token per item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from llmrec.baselines.base import AboveZero, Catalogue, Log, Warm
from llmrec.baselines.item_texts import PrincipalAxes, WhitenedConfig, text_vectors
from llmrec.baselines.neural import SequenceConfig, SequenceNetwork
from llmrec.errors import require
from llmrec.models.first_layers import first_layers
from llmrec.recipe.schema import Positive
from llmrec.results import Reads

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

# Standard deviation of the noise that is added to item vectors of length 1.
_NOISE = 0.01


class LLMSequenceConfig(SequenceConfig, WhitenedConfig):
    """Parameters of `LLMSequence`."""

    model: str = Field("SmolLM2-135M-Instruct", description="Decoder whose layers are used: name or folder.")
    layers: Positive = Field(4, description="Number of first layers to use.")
    pretrained: bool = Field(True, description="Start from the pretrained weights. Ablation: `false`, random weights.")
    encoder: str = Field(
        "all-MiniLM-L6-v2", description="Text encoder of the initial item vectors: name, folder, or `lsa`."
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout rate of item vectors and of the output.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of the layers, and of the matrix products with the item embeddings in the loss. `auto`: "
        "bfloat16 where the processor supports it.",
    )
    layer_learning_rate: AboveZero = Field(1e-4, description="Learning rate of the layers of the language model.")
    epochs: Positive = Field(20, description="Maximum number of epochs.")
    patience: Positive | None = Field(
        3,
        description="Early stopping: epochs without a better validation NDCG@10. `null`: run all epochs.",
    )


class LLMSequence(SequenceNetwork[LLMSequenceConfig]):
    """Predicts the next item with layers of a pretrained decoder, which read one vector per item.

    After E4SRec (Li et al., arXiv 2312.02443) and LLM2Rec (He et al., KDD 2025): the token embeddings of the language
    model are replaced by item vectors, which start from whitened text vectors x_i and are trained. A linear map gives
    the input ``W_in x_i`` of the layers, and another one maps the last hidden state h to the score
    ``x_j . W_out h``. The loss is the cross-entropy over all items at every position, all weights are trained, and
    early stopping is that of `SASRec`. Unlike in the papers there is no prompt and no low-rank adapter. With
    ``pretrained=False`` the same network starts from random weights, which measures what pretraining adds. A model that
    llmrec fine-tuned is rejected, since held-out interactions may have been among its training data.
    """

    name = "llm-sequence"
    Config = LLMSequenceConfig
    READS: ClassVar[Reads] = "language model"
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "layer_learning_rate": (3e-5, 1e-4, 3e-4),
        "dropout": (0.1, 0.2, 0.35, 0.5),
    }
    FITS: ClassVar[int] = 5
    _vectors: NDArray[np.float32]

    def _open(self, data: SplitDataset) -> None:
        super()._open(data)
        catalogue = Catalogue.of(data)
        texts = PrincipalAxes.of(text_vectors(data, catalogue.ids, self._config)).whitened(self._config.whitening)
        self._vectors = texts[Warm.of(Log.of(data, catalogue), catalogue).indices].astype(np.float32)

    def _build(self, items: int) -> Any:
        torch, config = require("torch", "baselines"), self._config
        nn, width = torch.nn, self._vectors.shape[1]
        layers, _ = first_layers(config.model, config.layers, column="model")
        length = float(layers.get_input_embeddings().weight.detach().norm(dim=1).mean())
        if not config.pretrained:
            layers = type(layers)(layers.config)
        layers.requires_grad_(True)
        # The network embeds items itself.
        layers.set_input_embeddings(nn.Identity())
        hidden = int(layers.config.hidden_size)
        # The noise tells apart items with equal texts, or none.
        vectors = torch.from_numpy(self._vectors) + torch.randn(items, width) * _NOISE
        network = nn.ModuleDict(
            {
                "table": nn.Embedding.from_pretrained(vectors, freeze=False),
                "into": nn.Linear(width, hidden, bias=False),
                "layers": layers,
                "out": nn.Linear(hidden, width),
            }
        )
        # Inputs get the length of token embeddings, which is what the layers were trained on.
        nn.init.orthogonal_(network["into"].weight, gain=length)
        nn.init.normal_(network["out"].weight, std=hidden**-0.5)
        nn.init.zeros_(network["out"].bias)
        return network

    def _encode(self, network: torch.nn.Module, items: Any) -> Any:
        torch, share = require("torch", "baselines"), self._config.dropout
        drop = torch.nn.functional.dropout
        inputs = network["into"](drop(network["table"](items), share, network.training))
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._config.half):
            state = network["layers"](inputs_embeds=inputs, use_cache=False).last_hidden_state
        return network["out"](drop(state.float(), share, network.training))

    def _rates(self, network: torch.nn.Module) -> Sequence[Mapping[str, Any]]:
        layers = list(network["layers"].parameters())
        others = [part for name in ("table", "into", "out") for part in network[name].parameters()]
        return [{"params": others}, {"params": layers, "lr": self._config.layer_learning_rate}]
