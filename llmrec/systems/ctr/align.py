"""The first stage of CTRL (Li et al., arXiv 2306.02841): contrastive alignment of a CTR network with texts.

Every training example is described by the user's profile, the titles of the latest interactions, and title and fields
of the item, without the label. A frozen text encoder encodes each of these parts once; the text vector of an example is
their concatenation, with the mean over titles. Two linear projections map it and the network's output to vectors of
equal length, which are trained to match within the batch, in both directions. Then projections and texts are
discarded, and the network is trained on the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from llmrec.baselines.base import LSA, PositiveFloat
from llmrec.baselines.item_texts import STORE_PREFIX, TextsConfig, lsa_vectors, texts_of_items
from llmrec.baselines.neural import symmetric_info_nce
from llmrec.errors import require
from llmrec.guard import TEXT_LIMIT, clean
from llmrec.models.text_encoder import text_embedder_for_split
from llmrec.recipe.schema import Positive
from llmrec.systems.ctr.fields import EncodedRows, FieldEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.index.table import Embed

    #: Maps indices of training rows to a tensor with one row each.
    Forward = Callable[[NDArray[np.int64]], Any]

# Share of the steps for learning-rate warm-up.
_WARM_UP_SHARE = 0.1


class Align(TextsConfig):
    """Parameters of the alignment with texts."""

    encoder: str = Field(
        "all-MiniLM-L6-v2",
        description="Text encoder: name or folder. `lsa`: no language model; `chance`: random vectors, an ablation.",
    )
    sides: Literal["both", "user", "item"] = Field(
        "both", description="Content of the texts: the user's latest interactions, the item, or both."
    )
    longer: bool = Field(False, description="Ablation: replace the epochs on texts by epochs on the labels.")
    epochs: Positive = Field(3, description="Number of epochs.")
    batch: Positive = Field(512, description="Examples per optimiser step, with in-batch negatives.")
    width: Positive = Field(128, description="Dimension of the aligned vectors.")
    parts: Positive = Field(
        4, description="Number of sub-vectors per vector; each is matched with the most similar sub-vector of the text."
    )
    temperature: PositiveFloat = Field(0.7, description="Temperature of the similarities.")
    learning_rate: PositiveFloat = Field(
        5e-4, description="Learning rate of AdamW, with warm-up over the first tenth of the steps."
    )
    weight_decay: float = Field(1e-5, ge=0, description="Decoupled weight decay.")

    @model_validator(mode="after")
    def _possible(self) -> Align:
        if self.width % self.parts:
            raise ValueError(f"width must be a multiple of parts, not {self.width} and {self.parts}")
        if self.encoder.startswith(STORE_PREFIX):
            raise ValueError(
                "encoder: a feature store cannot encode titles; name a text encoder, such as all-MiniLM-L6-v2"
            )
        return self


@dataclass(frozen=True)
class SentenceVectors:
    """Text vectors of users and items; row 0 is zeros, for unknown users and items.

    Attributes:
        users: Vectors of user profiles, shape (users + 1, d).
        titles: Vectors of item titles, shape (items + 1, d).
        items: Vectors of titles and fields, shape (items + 1, d); d differs with ``lsa``.
    """

    users: NDArray[np.float32]
    titles: NDArray[np.float32]
    items: NDArray[np.float32]

    @staticmethod
    def of(data: SplitDataset, fields: FieldEncoder, config: Align) -> SentenceVectors:
        """Encode the texts of users and items; with ``shuffled``, assign the texts at random.

        Raises:
            DataError: If no item has a title or a field, or the encoder was fine-tuned on another split.
            ModelError: If the encoder is missing.
        """
        embed: Embed = embed_with_lsa if config.encoder == LSA else text_embedder_for_split(config.encoder, data)

        def vectors(sentences: Sequence[str], side: str) -> NDArray[np.float32]:
            indices = [index for index, text in enumerate(sentences) if text and config.sides in ("both", side)]
            encoded = embed([sentences[index] for index in indices]) if indices else np.zeros((0, 1))
            result = np.zeros((len(sentences), encoded.shape[1]), dtype=np.float32)
            result[indices] = encoded
            return np.concatenate([np.zeros_like(result[:1]), result[config.order(len(sentences))]])

        users, titles, items = user_and_item_texts(data, fields)
        return SentenceVectors(vectors(users, "user"), vectors(titles, "user"), vectors(items, "item"))

    @property
    def width(self) -> int:
        """Dimension of the text vector of a training row."""
        return sum(item.shape[1] for item in (self.users, self.titles, self.items))

    def of_rows(self, rows: EncodedRows) -> NDArray[np.float32]:
        """Return the concatenated vectors of user, mean history title and item, shape (n, width)."""
        known = (rows.events > 0)[..., None]
        past = self.titles[rows.events].sum(axis=1) / np.maximum(known.sum(axis=1), 1)
        return np.concatenate([self.users[rows.users], past.astype(np.float32), self.items[rows.items]], axis=1)


def embed_with_lsa(sentences: Sequence[str]) -> NDArray[np.float32]:
    """Return LSA vectors of texts, shape (n, d)."""
    return lsa_vectors(sentences, sentences).astype(np.float32)


def user_and_item_texts(data: SplitDataset, fields: FieldEncoder) -> tuple[list[str], list[str], list[str]]:
    """Return user profiles, item titles, and titles with fields, in index order."""
    profiles = [fields.profiles.get(user, {}) for user in fields.users]
    users = [
        ", ".join(f"{name}: {clean(text, TEXT_LIMIT)}" for name, text in profile.items() if text)
        for profile in profiles
    ]
    items = [data.dataset.items[item] for item in fields.items]
    return users, [clean(item.title) for item in items], texts_of_items(items)


@dataclass(frozen=True)
class EpochResult:
    """The result of an epoch: mean loss, and share of rows most similar to their own text (0 without texts)."""

    loss: float
    right: float


def iterate_alignment_epochs(
    config: Align,
    network: torch.nn.Module,
    rows: EncodedRows,
    *,
    represent: Forward,
    judge: Forward,
    sentences: SentenceVectors | None,
    seed: int,
) -> Iterator[EpochResult]:
    """Align a network with texts, and yield after each epoch; without texts, train it on labels.

    Args:
        config: The parameters.
        network: The network to train.
        rows: The training examples.
        represent: Returns the network's representation of examples, shape (b, k).
        judge: Returns the log-odds of examples, shape (b,).
        sentences: The text vectors.
        seed: The seed of the order of examples.
    """
    torch = require("torch", "baselines")
    projections = torch.nn.ModuleDict()
    if sentences is not None:
        with torch.no_grad():
            width = represent(np.arange(min(2, len(rows)))).shape[1]
        projections["rows"] = torch.nn.Linear(width, config.width)
        projections["texts"] = torch.nn.Linear(sentences.width, config.width)
    learned = [*network.parameters(), *projections.parameters()]
    optimiser = torch.optim.AdamW(learned, lr=config.learning_rate, weight_decay=config.weight_decay)
    warmup = max(1.0, _WARM_UP_SHARE * config.epochs * math.ceil(len(rows) / config.batch))
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / warmup))
    rng = np.random.default_rng([seed, 3])
    for _ in range(config.epochs):
        network.train()
        order, total, right = rng.permutation(len(rows)), 0.0, 0.0
        for start in range(0, len(order), config.batch):
            part = order[start : start + config.batch]
            optimiser.zero_grad(set_to_none=True)
            if sentences is None:
                truth = torch.from_numpy(rows.truth[part])
                loss = torch.nn.functional.binary_cross_entropy_with_logits(judge(part), truth)
            else:
                batch = rows.of(part)
                text = projections["texts"](torch.from_numpy(sentences.of_rows(batch)))
                similarities = (
                    ctrl_similarities(projections["rows"](represent(part)), text, config.parts) / config.temperature
                )
                excluded = torch.from_numpy(same_entity_mask(batch))
                loss = symmetric_info_nce(similarities, excluded)
                nearest = similarities.masked_fill(excluded, -math.inf).argmax(dim=1)
                right += float((nearest == torch.arange(len(nearest))).sum())
            loss.backward()
            optimiser.step()
            rate.step()
            total += float(loss.detach()) * len(part)
        yield EpochResult(total / len(rows), right / len(rows))


def ctrl_similarities(rows: Any, sentences: Any, parts: int) -> Any:
    """Return the CTRL similarity of rows and texts, which sums the best match of each part.

    Args:
        rows: Vectors of rows, shape (n, d).
        sentences: Vectors of sentences, shape (k, d).
        parts: Number of sub-vectors of each; with 1 it is the inner product.

    Returns:
        Shape (n, k).
    """
    row_parts, text_parts = (item.unflatten(1, (parts, -1)).unbind(1) for item in (rows, sentences))
    larger = require("torch", "baselines").maximum
    return sum(reduce(larger, [part @ other.T for other in text_parts]) for part in row_parts)


def same_entity_mask(rows: EncodedRows) -> NDArray[np.bool_]:
    """Return a mask of rows with the same user or item, which are not negatives, shape (n, n)."""
    result: NDArray[np.bool_] = (rows.users[:, None] == rows.users) | (rows.items[:, None] == rows.items)
    np.fill_diagonal(result, val=False)
    return result
