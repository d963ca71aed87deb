"""The network of U-BERT: attention over review tokens of user and item, co-matching, and a linear output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from llmrec.baselines.base import LSA, PositiveFloat
from llmrec.baselines.item_texts import STORE_PREFIX, TextsConfig
from llmrec.baselines.rated import Ratings
from llmrec.errors import require
from llmrec.recipe.schema import Positive, Width
from llmrec.systems.ubert.reviews import SIDES, Reviews, Side, Tokens

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

# (user, item) pairs per batch of answers.
_PAIR_BATCH = 64


class UBertConfig(TextsConfig):
    """Parameters of `UBert`."""

    encoder: str = Field("all-MiniLM-L6-v2", description="Frozen text encoder that provides token embeddings.")
    shuffled: bool = Field(False, description="Ablation: assign the texts to random training reviews.")
    reviews: Positive = Field(8, description="Maximum number of latest training reviews per user and per item.")
    tokens: Positive = Field(64, description="Maximum review length, in tokens.")
    dim: Width = Field(32, description="Dimension of user, item and token vectors.")
    start: str | None = Field(None, description="Folder of weights pretrained on another domain.")
    pretrain: int = Field(
        0, ge=0, description="Pretraining epochs, on masked opinion words and ratings of single reviews."
    )
    lexicon: str | None = Field(
        None,
        description="Pretraining: file of opinion words, one per line. `null`: words of the training reviews with "
        "the most extreme ratings.",
    )
    opinions: Positive = Field(200, description="Pretraining: number of opinion words if no file is given.")
    masked: float = Field(0.5, gt=0, le=1, description="Pretraining: share of opinion words to mask.")
    beta: float = Field(1.0, ge=0, description="Pretraining: weight of the rating loss.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout rate.")
    batch: Positive = Field(64, description="Ratings per optimiser step.")
    learning_rate: PositiveFloat = Field(1e-3, description="Learning rate of Adam.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay (AdamW).")
    epochs: Positive = Field(30, description="Maximum number of epochs.")
    patience: Positive | None = Field(
        3,
        description="Early stopping: epochs without a lower validation RMSE. `null`: run all epochs.",
    )
    quiet: bool = Field(False, description="Hide the progress bar.")

    @model_validator(mode="after")
    def _check_tokens(self) -> UBertConfig:
        if self.encoder == LSA or self.encoder.startswith(STORE_PREFIX):
            raise ValueError(f"encoder: {self.encoder} has no token embeddings; name a text encoder")
        return self


@dataclass
class ReviewModel:
    """A network with the reviews that it reads.

    Attributes:
        known: The training ratings with indices.
        reviews: The training reviews.
        tokens: The tokens of the reviews: frozen states, and after training the result of `project_states`.
        network: The result of `create_network`.
        config: The parameters.
        mean_vectors: By side, the mean vector of all users, or items, with training ratings, used for unknown ones.
    """

    known: Ratings
    reviews: Reviews
    tokens: Tokens
    network: Any
    config: UBertConfig
    mean_vectors: dict[Side, Any]

    @property
    def spread(self) -> float:
        """Standard deviation of the training ratings; 1 if all are equal."""
        return float(self.known.values.std()) or 1.0

    def read(self, positions: NDArray[np.int64]) -> Any:
        """Return token vectors by index, shape (b, t, dim)."""
        torch = require("torch", "baselines")
        if self.tokens.values.dtype != torch.float16:
            return self.tokens.values[torch.from_numpy(positions)].to(self.network["down"].weight.dtype)
        # A token that several pairs share is projected once.
        unique, where = np.unique(positions, return_inverse=True)
        result = project_states(self.network, self.tokens.values[torch.from_numpy(unique)], self.config.dropout)
        return result[torch.from_numpy(where.reshape(positions.shape))]

    def side(self, side: Side, users: NDArray[np.int64], items: NDArray[np.int64]) -> tuple[Any, Any, Any]:
        """Return the vectors of users (or items) and of their tokens, and a mask: (b, dim), (b, t, dim), (b, t)."""
        torch, most = require("torch", "baselines"), self.config.reviews
        rows = [self.reviews.for_pair(side, u, i, most) for u, i in zip(users.tolist(), items.tolist(), strict=True)]
        positions, mask = self.tokens.positions(rows)
        tokens, token_mask = self.read(positions), torch.from_numpy(mask)
        indices = torch.from_numpy(users if side == "user" else items)
        vectors = encode_entities(self.network[side], indices.clamp(min=0), tokens, token_mask)
        if side in self.mean_vectors:
            vectors = torch.where((indices >= 0)[:, None], vectors, self.mean_vectors[side])
        return vectors, tokens, token_mask

    def forward(self, users: NDArray[np.int64], items: NDArray[np.int64]) -> Any:
        """Return the predicted ratings of pairs, in standard deviations from the mean, shape (b,)."""
        torch = require("torch", "baselines")
        user, of_user, user_mask = self.side("user", users, items)
        item, of_item, item_mask = self.side("item", users, items)
        match = match_tokens(self.network["match"], of_user, user_mask, of_item, item_mask)
        drop = torch.nn.functional.dropout(
            torch.cat([user, item, match], dim=1), self.config.dropout, self.network.training
        )
        return self.network["rating"](drop)[:, 0]

    def rate(self, users: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the predicted ratings of pairs before clipping, shape (n,); -1 is an unknown user or item."""
        torch = require("torch", "baselines")
        result = np.zeros(len(users))
        self.network.eval()
        with torch.no_grad():
            for start in range(0, len(users), _PAIR_BATCH):
                part = slice(start, start + _PAIR_BATCH)
                result[part] = self.forward(users[part], items[part]).double().numpy()
        return self.known.mean + self.spread * result

    def vectors(self, side: Side) -> Any:
        """Return the vectors of all users (or items) with training ratings, from all their reviews, (n, dim)."""
        torch = require("torch", "baselines")
        count = len(self.known.user_index if side == "user" else self.known.item_index)
        parts = []
        self.network.eval()
        with torch.no_grad():
            for start in range(0, count, _PAIR_BATCH):
                indices = np.arange(start, min(count, start + _PAIR_BATCH))
                unknown = np.full(len(indices), -1)
                parts.append(self.side(side, *((indices, unknown) if side == "user" else (unknown, indices)))[0])
        return torch.cat(parts)

    def update_means(self) -> None:
        """Compute the mean vectors that represent unknown users and items."""
        self.mean_vectors = {}
        self.mean_vectors = {side: self.vectors(side).mean(dim=0) for side in SIDES}


def project_states(network: torch.nn.Module, states: torch.Tensor, dropout: float) -> Any:
    """Project frozen token states: shape (n, d) -> (n, dim)."""
    functional = require("torch", "baselines").nn.functional
    result = functional.gelu(network["down"](states.to(network["down"].weight.dtype)))
    return functional.dropout(result, dropout, network.training)


def scaled_dot_attention(query: Any, keys: Any, values: Any, mask: torch.Tensor) -> Any:
    """Return scaled dot-product attention; 0 for rows without tokens.

    Args:
        query: Queries, shape (b, q, dim).
        keys: Keys, shape (b, t, dim).
        values: Values, shape (b, t, dim).
        mask: True for tokens, false for padding, shape (b, t).

    Returns:
        Shape (b, q, dim).
    """
    torch = require("torch", "baselines")
    logits = query @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
    # The minimum float instead of minus infinity, to avoid NaN in rows without tokens.
    weights = torch.softmax(logits.masked_fill(~mask[:, None, :], torch.finfo(logits.dtype).min), dim=-1)
    return (weights @ values) * mask.any(dim=1)[:, None, None]


def encode_entities(side: Any, indices: Any, tokens: Any, mask: torch.Tensor) -> Any:
    """Return vectors of users (or items) from embeddings and attention over review tokens, shape (b, dim).

    Args:
        side: The user encoder, or the item encoder.
        indices: Indices of users or items, shape (b,).
        tokens: Token vectors, shape (b, t, dim).
        mask: True for tokens, shape (b, t).
    """
    name = side["own"](indices) + side["domain"].weight
    return name + scaled_dot_attention(side["query"](name)[:, None, :], side["key"](tokens), tokens, mask)[:, 0]


def match_tokens(match: Any, of_user: Any, user_mask: Any, of_item: Any, item_mask: Any) -> Any:
    """Match the tokens of user and item by attention in both directions, averaged over tokens, shape (b, 2 dim)."""
    torch = require("torch", "baselines")
    means = []
    pairs = (("user", of_user, user_mask, of_item, item_mask), ("item", of_item, item_mask, of_user, user_mask))
    for name, tokens, mask, others, there in pairs:
        # One affinity matrix for both directions, transposed for the second.
        keys = match["affinity"](others) if name == "user" else others
        query = tokens if name == "user" else match["affinity"](tokens)
        aligned = scaled_dot_attention(query, keys, others, there)
        joint = match[name](torch.cat([tokens, aligned, tokens * aligned], dim=-1)).relu()
        weights = (mask & there.any(dim=1, keepdim=True)).to(joint.dtype)
        means.append((joint * weights[:, :, None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1))
    return torch.cat(means, dim=1)


def create_network(width: int, users: int, items: int, config: UBertConfig) -> Any:
    """Build the network, with user and item embeddings of 0; ``width`` is the size of token states."""
    nn, dim = require("torch", "baselines").nn, config.dim

    def side(count: int) -> Any:
        parts = {"own": nn.Embedding(count, dim), "domain": nn.Embedding(1, dim)}
        nn.init.zeros_(parts["own"].weight)
        return nn.ModuleDict({**parts, "query": nn.Linear(dim, dim), "key": nn.Linear(dim, dim)})

    match = {
        "affinity": nn.Linear(dim, dim, bias=False),
        "user": nn.Linear(3 * dim, dim),
        "item": nn.Linear(3 * dim, dim),
    }
    return nn.ModuleDict(
        {
            "down": nn.Linear(width, dim),
            "user": side(users),
            "item": side(items),
            "match": nn.ModuleDict(match),
            "rating": nn.Linear(4 * dim, 1),
        }
    )


def shuffled_batches(count: int, size: int, rng: np.random.Generator) -> Sequence[NDArray[np.int64]]:
    """Return the row indices of each training step, in random order."""
    order = rng.permutation(count)
    return [order[start : start + size] for start in range(0, count, size)]
