"""`TransitionsTuned`: item-to-item transitions with a text encoder that is fine-tuned on consecutive items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field
from scipy import sparse

from llmrec.baselines.base import AutoSetting, PositiveFloat, windowed_recency_weights
from llmrec.baselines.item_texts import check_pretrained_encoder, texts_of_items
from llmrec.baselines.neural import case_users, early_stopping_cases, info_nce, train_with_early_stopping
from llmrec.baselines.transitions import (
    NEIGHBOURS,
    TransitionCounts,
    TransitionsText,
    TransitionsTextConfig,
    count_transitions,
    nearest_neighbour_similarities,
)
from llmrec.baselines.validation import mean_ndcgs
from llmrec.errors import require
from llmrec.models.batching import group_by_length
from llmrec.models.text_encoder import BATCH_TOKENS, TunedEncoder, check_encoder_split, find_encoder
from llmrec.recipe.schema import Positive
from llmrec.types import Request

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

# Early stopping: number of validation cases, number of latest history items, and their decay.
_EARLY_STOPPING_CASES, _LATEST_ITEMS, _LATEST_DECAY = 5_000, 5, 0.5
# Share of the log frequency of a target that is subtracted from its similarity (logQ correction). With 1, the softmax
# over a batch models how often an item follows (Yi et al., RecSys 2019, section 4); with 0, how much more often than by
# chance.
LOG_FREQUENCY_SHARE = 0.5
# Warm-up steps of the learning rate.
WARM_UP_STEPS = 20
# Minimum time budget in seconds for `llmrec auto` to try it: a fit takes minutes on two cores.
_MIN_AUTO_SECONDS = 3600.0


class TransitionsTunedConfig(TransitionsTextConfig):
    """Parameters of `TransitionsTuned`."""

    encoder: str = Field("all-MiniLM-L6-v2", description="Text encoder to fine-tune: name or folder.")
    # Fine-tuning narrows the range of cosines, so texts need a larger exponent and weight than in `TransitionsText`.
    # Chosen on validation users of Beauty, Goodreads and MovieLens-100K, with one training seed.
    text: float = Field(8.0, ge=0, description="Weight of text similarity to the latest items.")
    sharpness: float = Field(16.0, gt=0, description="Exponent of text similarities before normalisation.")
    blocks: Positive = Field(2, description="Number of last layers of the encoder to fine-tune.")
    apart: Positive = Field(3, le=20, description="Maximum distance between the two items of a training pair.")
    nearby: float = Field(
        0.6,
        gt=0,
        le=1,
        description="Decay with distance: weight of a pair relative to a pair that is one position closer.",
    )
    temperature: PositiveFloat = Field(0.05, description="Temperature of the contrastive loss.")
    batch: Positive = Field(256, description="Pairs per optimiser step, with in-batch negatives.")
    steps: Positive = Field(80, description="Optimiser steps per epoch.")
    epochs: Positive = Field(3, description="Maximum number of epochs; the learning rate decays to 0.")
    patience: Positive | None = Field(
        2,
        description="Early stopping: epochs without a better validation NDCG@10. `null`: run all epochs.",
    )
    learning_rate: PositiveFloat = Field(1e-4, description="Learning rate of AdamW, after a warm-up of 20 steps.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay (AdamW).")
    quiet: bool = Field(False, description="Hide the progress bar.")


@dataclass(frozen=True)
class ItemPairs:
    """Pairs of items that follow each other in training sequences.

    Attributes:
        first: Indices of the earlier items, shape (pairs,).
        then: Indices of the later items, shape (pairs,).
        weights: Sampling probability of each pair, summing to 1, shape (pairs,).
        seen: Weight of each pair, sparse, shape (items, items).
    """

    first: NDArray[np.int64]
    then: NDArray[np.int64]
    weights: NDArray[np.float64]
    seen: Any

    @staticmethod
    def of(steps: TransitionCounts, apart: int, nearby: float) -> ItemPairs:
        """Return pairs up to a given distance; the weight is multiplied by ``nearby`` for each position."""
        total = steps.gaps[0].astype(np.float64)
        for gap in range(1, apart):
            total = total + nearby**gap * steps.gaps[gap]
        total = sparse.csr_array(total)
        # a repeated item carries no information about texts
        total.setdiag(0)
        total.eliminate_zeros()
        result = total.tocoo()
        first, then = (np.asarray(coord, dtype=np.int64) for coord in result.coords)
        return ItemPairs(first, then, result.data / max(result.data.sum(), 1e-300), total)

    def unknown(self, first: NDArray[np.int64], then: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return a mask of negatives, shape (n, n): items that never follow the first item in training.

        The diagonal, the positive pairs, is included, since the softmax needs it.
        """
        result: NDArray[np.bool_] = np.asarray(self.seen[first][:, then].toarray()) == 0
        np.fill_diagonal(result, True)
        return result


@dataclass
class SimilarToLatest:
    """Scores items by vector similarity to the latest history items."""

    steps: TransitionCounts
    vectors: NDArray[np.float32]
    name: str = "alike"

    @property
    def items(self) -> tuple[str, ...]:
        """Ids of all items, in column order."""
        return self.steps.catalogue.ids

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return similarities, shape (n, items)."""
        latest = windowed_recency_weights(requests, self.steps.catalogue, _LATEST_ITEMS, _LATEST_DECAY).astype(
            np.float32
        )
        return np.asarray((latest @ self.vectors) @ self.vectors.T)


class TransitionsTuned(TransitionsText):
    """`TransitionsText` with a text encoder that is fine-tuned to predict which items follow each other.

    The encoder's last layers are trained with a contrastive loss over a batch of pairs (InfoNCE: van den Oord et al.,
    arXiv 1807.03748, eq. 4). Later items that also follow the earlier item in training are not negatives, and a share
    of an item's log target frequency is subtracted from its similarity. The best epoch by validation NDCG@10 of
    similarity alone is kept; if it is epoch 0, the model equals `TransitionsText` with the same parameters. There are
    no item embeddings: cold-start items get their vectors from the fine-tuned encoder too.
    """

    name = "transitions-tuned"
    stochastic = True
    Config = TransitionsTunedConfig
    AUTO = (AutoSetting(18, seconds=_MIN_AUTO_SECONDS),)
    READS = "language model"
    _config: TransitionsTunedConfig

    def learn(self, data: SplitDataset) -> None:
        """Count transitions, fine-tune the text encoder, and find the most similar items of each item.

        Raises:
            RecipeError: If the encoder is not a pretrained one.
            DataError: If no item has a text, or the encoder was fine-tuned on another split.
            ModelError: If the encoder is missing or has fewer layers.
            MissingExtra: If torch or transformers is not installed.
        """
        steps = count_transitions(data)
        self._put(steps, self._tuned(data, steps).every().numpy())

    def tuned(self, data: SplitDataset) -> TunedEncoder:
        """Fine-tune the text encoder, and return it after its best epoch; raises the same errors as `learn`."""
        return self._tuned(data, count_transitions(data))

    def _tuned(self, data: SplitDataset, steps: TransitionCounts) -> TunedEncoder:
        torch, config = require("torch", "train"), self._config
        check_pretrained_encoder(self.name, config.encoder, "transitions-text")
        check_encoder_split(config.encoder, data)
        texts = texts_of_items([data.dataset.items[item] for item in steps.catalogue.ids])
        texts = [texts[index] for index in config.order(len(texts))]
        encoder = TunedEncoder(find_encoder(config.encoder)[0], texts, blocks=config.blocks)
        cases = early_stopping_cases(data, config, _EARLY_STOPPING_CASES)
        self.looked_at = case_users(cases)
        pairs = ItemPairs.of(steps, config.apart, config.nearby)
        if not len(pairs.first):
            return encoder

        def evaluate() -> float:
            return -mean_ndcgs(SimilarToLatest(steps, encoder.every().numpy()), cases)["excluded"]

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            learn = PairEpoch(encoder, pairs, config, np.random.default_rng(self._seed))
            train_with_early_stopping(
                torch.nn.ModuleDict({"encoder": encoder.blocks}),
                evaluate if cases else None,
                config,
                learn,
                name=self.name,
                measure="NDCG@10 of similarity",
                sign=-1,
                learned=True,
            )
        return encoder

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the vectors of all items."""
        assert self._fitted.vectors is not None
        return {"vectors": self._fitted.vectors}

    def restore(self, data: SplitDataset, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the fitted vectors from `state`."""
        self._put(count_transitions(data), state["vectors"])
        self.looked_at = case_users(early_stopping_cases(data, self._config, _EARLY_STOPPING_CASES))

    def _put(self, steps: TransitionCounts, vectors: NDArray[Any]) -> None:
        self._model = TransitionCounts(
            steps.catalogue, steps.gaps, steps.popular, nearest_neighbour_similarities(vectors, NEIGHBOURS), vectors
        )


class PairEpoch:
    """Trains a text encoder on sampled pairs for one epoch; the learning rate decays over ``config.epochs`` of them."""

    def __init__(
        self, encoder: TunedEncoder, pairs: ItemPairs, config: TransitionsTunedConfig, rng: np.random.Generator
    ) -> None:
        self.encoder, self.pairs, self.config, self.rng = encoder, pairs, config, rng
        frequency = np.bincount(pairs.then, weights=pairs.weights, minlength=pairs.seen.shape[0])
        self.log_frequency = np.log(np.maximum(frequency, 1e-12))
        # As in Generator.choice, which would compute the sum over all pairs in every step.
        self._cumulative = pairs.weights.cumsum()
        self._cumulative /= self._cumulative[-1]
        self._done = 0

    def __call__(self, optimiser: torch.optim.Optimizer) -> float:
        """Train for one epoch, and return the mean loss in nats."""
        config, total = self.config, 0.0
        for _ in range(config.steps):
            rate = min(1.0, (self._done + 1) / WARM_UP_STEPS) * (1 - self._done / (config.epochs * config.steps))
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * rate
            drawn = self._cumulative.searchsorted(self.rng.random(config.batch), side="right")
            optimiser.zero_grad(set_to_none=True)
            loss = self.loss(self.pairs.first[drawn], self.pairs.then[drawn])
            loss.backward()
            optimiser.step()
            total += float(loss.detach())
            self._done += 1
        return total / config.steps

    def loss(self, first: NDArray[np.int64], then: NDArray[np.int64]) -> Any:
        """Return the loss of the pairs of a batch in nats, a tensor with gradients."""
        torch = require("torch", "train")
        similarities = self.similarities(first, then)
        logits = similarities - LOG_FREQUENCY_SHARE * torch.from_numpy(self.log_frequency[then]).to(similarities)
        return info_nce(logits, ~torch.from_numpy(self.pairs.unknown(first, then)).to(logits.device))

    def similarities(self, first: NDArray[np.int64], others: NDArray[np.int64]) -> Any:
        """Return similarities divided by the temperature, with gradients, shape (len(first), len(others))."""
        torch = require("torch", "train")
        rows, positions = np.unique(np.concatenate([first, others]), return_inverse=True)
        vectors = _encode_texts(self.encoder, rows)[torch.from_numpy(positions)]
        return vectors[: len(first)] @ vectors[len(first) :].T / self.config.temperature


def _encode_texts(encoder: TunedEncoder, rows: NDArray[np.int64]) -> Any:
    """Encode texts in groups of similar length, with gradients; returns vectors of shape (n, d)."""
    torch = require("torch", "train")
    groups = group_by_length([encoder.length(int(row)) for row in rows], BATCH_TOKENS, longest_first=True)
    order = torch.tensor([position for group in groups for position in group])
    result = torch.cat([encoder([int(rows[position]) for position in group]) for group in groups])
    return result[torch.argsort(order)]
