"""The network of UniSRec: gated whitenings of text vectors, followed by the sequence encoder of SASRec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from llmrec.baselines.base import LSA, Catalogue, PositiveFloat
from llmrec.baselines.item_texts import STORE_PREFIX, TextsConfig
from llmrec.baselines.neural import SequenceBatch, equal_length_batches, info_nce, training_batches
from llmrec.baselines.sasrec import AttentionConfig, apply_attention_blocks, attention_network
from llmrec.errors import require
from llmrec.recipe.schema import Positive
from llmrec.types import Request

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


# Sequences per batch of scores.
_SCORING_BATCH = 512
# Minimum standard deviation of the noise of gates.
_MIN_GATE_NOISE = 1e-2


class UniSRecConfig(TextsConfig, AttentionConfig):
    """Parameters of `UniSRec`."""

    experts: Positive = Field(8, description="Number of mixed whitening transformations.")
    temperature: PositiveFloat = Field(0.07, description="Temperature of the cosine similarities.")
    ids: bool = Field(False, description="Transductive setting: add a learned embedding to each training item.")
    start: str | None = Field(
        None, description="Folder of weights pretrained on another domain; only the adaptor is trained further."
    )
    pretrain: int = Field(0, ge=0, description="Number of contrastive pretraining epochs.")
    contrast: float = Field(1e-3, ge=0, description="Pretraining: weight of the sequence-sequence loss.")
    item_drop: float = Field(
        0.2, ge=0, lt=1, description="Pretraining: share of items to drop from an augmented sequence."
    )
    word_drop: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Pretraining: share of words to drop from item texts, in half of the augmented sequences.",
    )
    device: Literal["cpu"] = Field("cpu", description="Device.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout rate.")
    negatives: None = Field(None, description="No effect: the softmax always includes all items.")
    batch: Positive = Field(2048, description="Approximate number of targets per optimiser step.")
    epochs: Positive = Field(50, description="Maximum number of epochs.")
    patience: Positive | None = Field(
        5,
        description="Early stopping: epochs without a better validation NDCG@10. `null`: run all epochs.",
    )

    @model_validator(mode="after")
    def _check_encoder(self) -> UniSRecConfig:
        if self.start is not None and not self.named:
            raise ValueError(
                f"start needs the encoder of its pretrained weights, and vectors of {self.encoder} are specific to a "
                "data set; name a text encoder"
            )
        return self

    @property
    def named(self) -> bool:
        """Whether text vectors come from a pretrained encoder, which does not depend on the data set."""
        return self.encoder != LSA and not self.encoder.startswith(STORE_PREFIX)


@dataclass
class UniSRecModel:
    """A network on item texts, with the text vectors of all items.

    Attributes:
        catalogue: The catalogue.
        vectors: Text vectors, shape (items, d).
        embedding_rows: Index of each item's learned embedding, -1 for none, shape (items,).
        popular: Training interactions of each item, divided by the maximum, shape (items,).
        network: Adaptor and sequence encoder.
        config: The parameters.
        table: The output vectors of items after training, shape (items, dim).
    """

    catalogue: Catalogue
    vectors: Any
    embedding_rows: NDArray[np.int64]
    popular: NDArray[np.float64]
    network: Any
    config: UniSRecConfig
    table: Any = None
    name: str = "unisrec"

    @property
    def items(self) -> tuple[str, ...]:
        """Ids of all items, in column order."""
        return self.catalogue.ids

    @property
    def warm(self) -> NDArray[np.int64]:
        """Catalogue indices of the items with training interactions, in the order of their embeddings."""
        known = np.flatnonzero(self.embedding_rows >= 0)
        return known[np.argsort(self.embedding_rows[known])]

    def represented(self, rows: NDArray[np.int64], vectors: Any = None) -> Any:
        """Return the input vectors of items, shape (n, dim).

        Args:
            rows: Indices in the catalogue.
            vectors: Text vectors to use instead of those of the items, shape (n, d).
        """
        torch, network = require("torch", "baselines"), self.network
        result = mix_whitenings(network, self.vectors[rows] if vectors is None else vectors, self.config.dropout)
        if "table" in network:
            embedding_rows = torch.from_numpy(self.embedding_rows[rows])
            # Items without training interactions have only a text vector.
            result = result + network["table"](embedding_rows.clamp(min=0)) * (embedding_rows >= 0)[:, None]
        return result

    def encoded(self, items: Any) -> Any:
        """Return one normalised vector per position, shape (b, t, dim)."""
        states = apply_attention_blocks(self.network, items, self.config.heads, self.config.dropout)
        return require("torch", "baselines").nn.functional.normalize(states, dim=-1)

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the scores of all items after each history, shape (n, items); popularity for an empty history."""
        torch = require("torch", "baselines")
        histories = [self.catalogue.history(request)[-self.config.max_len :] for request in requests]
        result = np.tile(self.popular.astype(np.float32), (len(requests), 1))
        self.network.eval()
        with torch.no_grad():
            raw = self.represented(np.arange(len(self.items))) if self.table is None else self.table
            compared = torch.nn.functional.normalize(raw, dim=1).T / self.config.temperature
            for rows in equal_length_batches(histories, _SCORING_BATCH):
                items = torch.from_numpy(np.stack([histories[row] for row in rows]))
                result[rows] = (self.encoded(raw[items])[:, -1] @ compared).numpy()
        return result

    def finished(self) -> UniSRecModel:
        """Return the model with the output vectors of all items precomputed."""
        torch = require("torch", "baselines")
        self.network.eval()
        with torch.no_grad():
            return replace(self, table=self.represented(np.arange(len(self.items))))


def mix_whitenings(network: torch.nn.Module, vectors: Any, dropout: float) -> Any:
    """Return a mixture of parametric whitenings of text vectors: shape (n, d) -> (n, dim)."""
    functional, adaptor = require("torch", "baselines").nn.functional, network["adaptor"]
    gates = gate_weights(network, vectors)
    left = functional.dropout(vectors, dropout, network.training)
    experts, width, dim = adaptor["maps"].shape
    spread = (left @ adaptor["maps"].transpose(0, 1).reshape(width, -1)).view(-1, experts, dim)
    centred = spread - (adaptor["shifts"][:, None, :] @ adaptor["maps"])[:, 0]
    return (gates[:, :, None] * centred).sum(dim=1)


def gate_weights(network: torch.nn.Module, vectors: Any) -> Any:
    """Return the mixture weights of the whitening experts, shape (n, experts), with noise during training."""
    torch, adaptor = require("torch", "baselines"), network["adaptor"]
    logits = vectors @ adaptor["gate"]
    if network.training:
        deviation = torch.nn.functional.softplus(vectors @ adaptor["noise"]) + _MIN_GATE_NOISE
        logits = logits + torch.randn_like(logits) * deviation
    return torch.softmax(logits, dim=-1)


def create_network(width: int, items: int, config: UniSRecConfig) -> Any:
    """Build the network of adaptor, sequence encoder and item embeddings, with equal gates."""
    torch = require("torch", "baselines")
    nn, dim, experts = torch.nn, config.dim, config.experts
    adaptor = {
        "maps": nn.Parameter(torch.empty(experts, width, dim)),
        "shifts": nn.Parameter(torch.empty(experts, width)),
        "gate": nn.Parameter(torch.empty(width, experts)),
        "noise": nn.Parameter(torch.empty(width, experts)),
    }
    table = {"table": nn.Embedding(items, dim)} if items else {}
    network = attention_network(config, config.max_len, adaptor=nn.ParameterDict(adaptor), **table)
    for name in ("shifts", "gate", "noise"):
        nn.init.zeros_(network["adaptor"][name])
    return network


# --------------------------------------------------------------------------- contrastive losses


def contrastive_loss(left: Any, right: Any, same: Any, temperature: float) -> Any:
    """Return the InfoNCE loss, the mean of ``-log(exp(l_i . r_i / t) / sum_j exp(l_i . r_j / t))`` over rows.

    Args:
        left: Vectors of length 1, shape (n, d).
        right: The positive of each, shape (n, d).
        same: Rows with equal values are not negatives of each other, shape (n,).
        temperature: The temperature t.
    """
    return info_nce(left @ right.T / temperature, same[:, None] == same[None, :])


def train_contrastive_epoch(
    model: UniSRecModel,
    pieces: Sequence[NDArray[np.int64]],
    dropped: Any,
    optimiser: torch.optim.Optimizer,
    rng: np.random.Generator,
) -> None:
    """Train for one epoch with the two contrastive losses.

    Args:
        model: The model to train.
        pieces: Sequences of item indices.
        dropped: Vectors of texts with words dropped, shape (warm, d); None: words are never dropped.
        optimiser: The optimiser of the network.
        rng: The random generator for batches and for dropping items and words.
    """
    torch, config, warm = require("torch", "baselines"), model.config, model.warm
    model.network.train()
    for batch in training_batches(pieces, config.batch, rng):
        optimiser.zero_grad(set_to_none=True)
        items, targets = torch.from_numpy(batch.items), torch.from_numpy(batch.targets)
        raw = model.represented(warm)
        states, rows = model.encoded(raw[items]), targets >= 0
        following = torch.nn.functional.normalize(raw[targets[rows]], dim=1)
        loss = contrastive_loss(states[rows], following, targets[rows], config.temperature)
        if config.contrast:
            both = raw if dropped is None else torch.cat([raw, model.represented(warm, dropped)])
            changed, ends = augment_sequences(batch, config.item_drop, len(raw) if dropped is not None else 0, rng)
            last, every = rows.sum(dim=1) - 1, torch.arange(len(items))
            other = model.encoded(both[torch.from_numpy(changed)])[every, torch.from_numpy(ends)]
            pair = contrastive_loss(states[every, last], other, targets[every, last], config.temperature)
            loss = loss + config.contrast * pair
        loss.backward()
        optimiser.step()


def augment_sequences(
    batch: SequenceBatch, share: float, offset: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Drop items from sequences; with ``offset``, a random half loses words of its texts instead.

    Returns:
        Item indices, padded on the right, shape (b, t), plus the offset for items with words dropped; and the position
        of the last item of each sequence, shape (b,).
    """
    items, ends = np.zeros_like(batch.items), np.zeros(len(batch.items), dtype=np.int64)
    for row, length in enumerate((batch.targets >= 0).sum(axis=1).tolist()):
        sequence = batch.items[row, :length]
        if offset and rng.random() < 0.5:
            sequence = sequence + offset
        else:
            kept = sequence[rng.random(length) >= share]
            sequence = kept if len(kept) else sequence[-1:]
        items[row, : len(sequence)], ends[row] = sequence, len(sequence) - 1
    return items, ends


class DropWords:
    """Drops random words from a text, but never all of them."""

    def __init__(self, share: float, seed: int) -> None:
        self._share, self._rng = share, np.random.default_rng([seed, 2])

    def __call__(self, text: str) -> str:
        """Return a text with words dropped; unchanged if none would be left."""
        words = np.array(text.split(), dtype=object)
        kept = words[self._rng.random(len(words)) >= self._share]
        return " ".join(kept) or text
