"""`LLMSequence`: the first layers of a pretrained language model as the sequence model, with one token per item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from llmrec.baselines.base import PositiveFloat
from llmrec.baselines.text_network import TextNetwork, TextNetworkConfig
from llmrec.errors import require
from llmrec.models.first_layers import load_first_layers
from llmrec.recipe.schema import Positive
from llmrec.results import Reads

if TYPE_CHECKING:
    import torch


class LLMSequenceConfig(TextNetworkConfig):
    """Parameters of `LLMSequence`."""

    model: str = Field("SmolLM2-135M-Instruct", description="Decoder whose layers are used: name or folder.")
    layers: Positive = Field(4, description="Number of first layers to use.")
    pretrained: bool = Field(True, description="Start from the pretrained weights. Ablation: `false`, random weights.")
    encoder: str = Field(
        "all-MiniLM-L6-v2",
        description="Source of text embeddings: name or folder of a text encoder, `lsa`, or `store:FOLDER`.",
    )
    dropout: float = Field(0.5, ge=0, lt=1, description="Dropout rate of item vectors and of the output.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of the layers, and of the matrix products with the item vectors in the loss. `auto`: "
        "bfloat16 where the processor supports it.",
    )
    layer_learning_rate: PositiveFloat = Field(1e-5, description="Learning rate of the layers of the language model.")
    epochs: Positive = Field(30, description="Maximum number of epochs.")
    patience: Positive | None = Field(
        3,
        description="Early stopping: epochs without a better validation NDCG@10. `null`: run all epochs.",
    )


class LLMSequence(TextNetwork[LLMSequenceConfig]):
    """Predicts the next item with layers of a pretrained decoder, which read one vector per item.

    After E4SRec (Li et al., arXiv 2312.02443) and LLM2Rec (He et al., KDD 2025): the token embeddings of the language
    model are replaced by item vectors, which are those of `SASRecText`. A linear map gives the input of the layers, and
    another one maps the last hidden state h to the score ``v_j . W_out h`` of an item with vector v_j. The sequence
    begins with the begin-of-sequence token, to which decoders attend by default (Xiao et al., ICLR 2024); otherwise the
    first item takes its role. The loss is the cross-entropy over all items at every position, all weights are trained,
    and early stopping is that of `SASRec`. Unlike in the papers there is no prompt and no low-rank adapter. With
    ``pretrained=False`` the same network starts from random weights, which measures what pretraining adds. A model that
    llmrec fine-tuned is rejected, since held-out interactions may have been among its training data.
    """

    name = "llm-sequence"
    Config = LLMSequenceConfig
    READS: ClassVar[Reads] = "language model"
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "dropout": (0.2, 0.35, 0.5, 0.65),
        "layer_learning_rate": (3e-6, 1e-5, 3e-5, 1e-4, 3e-4),
    }
    FITS: ClassVar[int] = 5

    def _build(self, items: int) -> Any:
        torch, config = require("torch", "baselines"), self._config
        nn = torch.nn
        layers, _ = load_first_layers(config.model, config.layers, column="model")
        tokens, start = layers.get_input_embeddings().weight.detach(), layers.config.bos_token_id
        lead = tokens.mean(dim=0, keepdim=True) if start is None else tokens[start : start + 1].clone()
        length = float(tokens.norm(dim=1).mean())
        if not config.pretrained:
            layers = type(layers)(layers.config)
            lead = nn.functional.normalize(torch.randn_like(lead)) * length
        layers.requires_grad_(True)
        # The network embeds items itself.
        layers.set_input_embeddings(nn.Identity())
        hidden = int(layers.config.hidden_size)
        network = nn.ModuleDict(
            {
                "into": nn.Linear(config.dim, hidden, bias=False),
                "lead": nn.Embedding.from_pretrained(lead, freeze=False),
                "layers": layers,
                "out": nn.Linear(hidden, config.dim),
            }
        )
        nn.init.orthogonal_(network["into"].weight)
        nn.init.zeros_(network["out"].bias)
        with torch.no_grad():
            # The output starts as the inverse map, because residual connections carry the input to the last state.
            network["out"].weight.copy_(network["into"].weight.T * hidden**-0.5)
            # Inputs have the length of token embeddings, which is what the layers were trained on.
            network["into"].weight.mul_(length)
        return network

    def _encode(self, network: torch.nn.Module, items: Any) -> Any:
        torch, share = require("torch", "baselines"), self._config.dropout
        functional = torch.nn.functional
        vectors = functional.normalize(self._embedded(network, items), dim=-1)
        inputs = network["into"](functional.dropout(vectors, share, network.training))
        inputs = torch.cat([network["lead"].weight.expand(len(items), 1, -1), inputs], dim=1)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._config.half):
            state = network["layers"](inputs_embeds=inputs, use_cache=False).last_hidden_state[:, 1:]
        return network["out"](functional.dropout(state.float(), share, network.training))

    def _param_groups(self, network: torch.nn.Module) -> Sequence[Mapping[str, Any]]:
        layers = network["layers"]
        others = [weight for part in network.children() if part is not layers for weight in part.parameters()]
        return [{"params": others}, {"params": list(layers.parameters()), "lr": self._config.layer_learning_rate}]
