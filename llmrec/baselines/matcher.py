"""Two-tower networks on item texts, without item embeddings, such as `TextMatcher` (NAML, NRMS)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from pydantic import Field, model_validator

from llmrec.baselines.base import AboveZero, Catalogue, Log, ScoredBaseline, counts
from llmrec.baselines.item_texts import WHITENINGS, Turned, WhitenedConfig, text_vectors
from llmrec.baselines.neural import (
    NeuralConfig,
    over_all,
    put_back,
    stop_cases,
    stopped_by,
    until_best,
    weights_of,
)
from llmrec.errors import require
from llmrec.recipe.schema import Positive, Width
from llmrec.results import Reads
from llmrec.types import Request

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

    #: Computes user vectors, shape (n, dim), from the network, item vectors and histories.
    Query = Callable[[Any, Any, Sequence[NDArray[np.int64]]], Any]


# --------------------------------------------------------------------------- towers

# Number of validation cases for early stopping.
_STOP_CASES = 5_000
# Initial log scale (inverse temperature) of cosines: a softmax over thousands of items needs a scale above 1.
_SCALE = 2.5


class TowersConfig(WhitenedConfig, NeuralConfig):
    """Parameters of text vectors and training."""

    dim: Width = Field(128, description="Dimension of user and item vectors.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout rate.")
    max_len: Positive = Field(10, description="Maximum number of latest items to use.")
    batch: Positive = Field(1024, description="Targets per optimiser step.")
    negatives: None = Field(None, description="No effect: the softmax always includes all items.")
    learning_rate: AboveZero = Field(2e-3, description="Learning rate of Adam.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay (AdamW).")
    epochs: Positive = Field(30, description="Maximum number of epochs.")
    patience: Positive | None = Field(
        3,
        description="Early stopping: epochs without a better validation NDCG@10. `null`: run all epochs.",
    )


T = TypeVar("T", bound=TowersConfig)


@dataclass
class Towers:
    """Normalised text vectors of all items, shape (items, d), and the trained network."""

    catalogue: Catalogue
    vectors: Any
    warm: NDArray[np.int64]
    popular: NDArray[np.float64]
    network: Any
    of_users: Query
    config: TowersConfig
    name: str = "tower"

    @property
    def items(self) -> tuple[str, ...]:
        """Ids of all items, in column order."""
        return self.catalogue.ids

    def histories(self, requests: Sequence[Request]) -> list[NDArray[np.int64]]:
        """Return the latest items of each history, oldest first; unknown items are left out."""
        return [self.catalogue.history(request)[-self.config.max_len :] for request in requests]

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the scores of all items after each history, shape (n, items); popularity for an empty history."""
        torch = require("torch", "baselines")
        histories = self.histories(requests)
        self.network.eval()
        with torch.no_grad():
            result = (self.query(histories) @ self.item_vectors(self.vectors).T).numpy()
        result[[index for index, history in enumerate(histories) if not len(history)]] = self.popular
        return np.asarray(result)

    def item_vectors(self, vectors: Any) -> Any:
        """Return the normalised output vectors of items, shape (n, dim)."""
        return item_vectors(self.network, vectors, self.config.dropout)

    def query(self, histories: Sequence[NDArray[np.int64]]) -> Any:
        """Return the user vectors, whose length is the scale of the cosines, shape (n, dim)."""
        normalize = require("torch", "baselines").nn.functional.normalize
        result = self.of_users(self.network, self.vectors, histories)
        return normalize(result, dim=1) * self.network["scale"][0].exp()


class TextTowers(ScoredBaseline[T, Towers]):
    """A two-tower baseline on frozen, whitened text vectors; subclasses define ``_build`` and ``_query``.

    Training ends when validation NDCG@10 has not risen for ``patience`` epochs, and the best epoch's weights are kept.
    """

    stochastic = True
    READS: ClassVar[Reads] = "texts"
    SCORES = "logits"

    def learn(self, data: SplitDataset) -> None:
        """Train the network.

        Raises:
            DataError: If no item has a text.
            ModelError: If the encoder is missing.
            MissingExtra: If torch is not installed.
        """
        torch, config = require("torch", "baselines"), self._config
        catalogue = Catalogue.of(data)
        texts = Turned.of(self._vectors(data, catalogue.ids))
        vectors = torch.from_numpy(texts.whitened(config.whitening).astype(np.float32))
        events = Log.of(data, catalogue)
        cases = stop_cases(data, config, _STOP_CASES)
        rows, rng = self._rows(events), np.random.default_rng(self._seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            model = self._towers(catalogue, vectors, counts(events, catalogue))
            until_best(model, cases, config, lambda optimiser: self._epoch(model, rows, optimiser, rng))
        self.looked_at = stopped_by(cases)
        self._model = model

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the network weights and the item vectors as arrays."""
        return {"vectors": self._fitted.vectors.detach().numpy(), **weights_of(self._fitted.network)}

    def restore(self, data: SplitDataset, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the fitted network from `state`."""
        torch = require("torch", "baselines")
        catalogue = Catalogue.of(data)
        with torch.random.fork_rng(devices=[]):
            model = self._towers(
                catalogue, torch.from_numpy(state["vectors"]), counts(Log.of(data, catalogue), catalogue)
            )
        put_back(model.network, state)
        self._model = model
        self.looked_at = stopped_by(stop_cases(data, self._config, _STOP_CASES))

    def _towers(self, catalogue: Catalogue, vectors: Any, popular: NDArray[np.float64]) -> Towers:
        torch = require("torch", "baselines")
        network = self._build(vectors.shape[1])
        network["scale"] = torch.nn.ParameterList([torch.tensor(_SCALE)])
        warm, shares = np.flatnonzero(popular), popular / popular.max(initial=1.0)
        return Towers(catalogue, vectors, warm, shares, network, self._query, self._config, self.name)

    def _vectors(self, data: SplitDataset, ids: Sequence[str]) -> NDArray[np.floating[Any]]:
        """Return the text vectors of items before whitening, shape (n, d)."""
        return text_vectors(data, ids, self._config)

    def _rows(self, events: Log) -> list[NDArray[np.int64]]:
        """Return each training target with the items before it, at most ``max_len + 1`` items in total."""
        ends = np.cumsum(np.bincount(events.users, minlength=events.user_count))
        return [
            items[max(0, end - self._config.max_len) : end + 1]
            for items in np.split(events.items.astype(np.int64), ends[:-1])
            for end in range(1, len(items))
        ]

    def _epoch(
        self,
        model: Towers,
        rows: Sequence[NDArray[np.int64]],
        optimiser: torch.optim.Optimizer,
        rng: np.random.Generator,
    ) -> float:
        """Train for one epoch, and return the mean loss of a softmax over all items outside the history."""
        torch, config = require("torch", "baselines"), self._config
        model.network.train()
        column = np.full(len(model.catalogue.ids), -1, dtype=np.int64)
        column[model.warm] = np.arange(len(model.warm))
        warm, order, total = torch.from_numpy(model.warm), rng.permutation(len(rows)), 0.0
        for start in range(0, len(order), config.batch):
            batch = [rows[row] for row in order[start : start + config.batch].tolist()]
            optimiser.zero_grad(set_to_none=True)
            query, table = model.query([row[:-1] for row in batch]), model.item_vectors(model.vectors[warm])
            targets = torch.from_numpy(column[[row[-1] for row in batch]])
            # shorter histories are padded with their last item
            seen = [np.pad(column[row[:-1]], (0, config.max_len + 1 - len(row)), mode="edge") for row in batch]
            with torch.no_grad():
                value, of_query, of_table = over_all(
                    query.detach(), table.detach(), targets, half=config.half, hidden=torch.from_numpy(np.stack(seen))
                )
            torch.autograd.backward([query, table], [of_query, of_table])
            optimiser.step()
            total += value * len(batch)
        return total / max(1, len(rows))

    def _build(self, width: int) -> Any:
        """Return a ``torch.nn.ModuleDict`` with the linear map ``item`` for text vectors of this length."""
        raise NotImplementedError

    def _query(self, network: torch.nn.Module, vectors: Any, histories: Sequence[NDArray[np.int64]]) -> Any:
        """Return user vectors before normalisation; see `Query`."""
        raise NotImplementedError

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the logits of all items after each history, shape (n, items)."""
        return self._fitted.scores(requests)


def item_vectors(network: torch.nn.Module, vectors: Any, dropout: float) -> Any:
    """Map text vectors to normalised output vectors of items, shape (n, dim)."""
    nn = require("torch", "baselines").nn.functional
    return nn.normalize(network["item"](nn.dropout(vectors, dropout, network.training)), dim=-1)


def turn(network: torch.nn.Module, names: Sequence[str]) -> None:
    """Initialise linear maps of a network with the same random orthogonal matrix."""
    torch = require("torch", "baselines")
    turned = torch.nn.init.orthogonal_(torch.empty_like(network[names[0]].weight))
    with torch.no_grad():
        for name in names:
            network[name].weight.copy_(turned)


class TextMatcherConfig(TowersConfig):
    """Parameters of `TextMatcher`."""

    heads: int = Field(4, ge=0, description="Number of attention heads between history items (NRMS). 0: none (NAML).")
    attention: Positive = Field(64, description="Width of the attention layer that weights history items.")

    @model_validator(mode="after")
    def _heads_divide(self) -> TextMatcherConfig:
        if self.heads and self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, not {self.dim} and {self.heads}")
        return self


class TextMatcher(TextTowers[TextMatcherConfig]):
    """Matches items to users by text, with the user encoders of NRMS (Wu et al., EMNLP 2019) and NAML (IJCAI 2019).

    With whitened text vectors x_i of length 1 (see `Content`), an item is ``r_j = norm(P x_j)``. With ``heads``, items
    of the history attend to each other (NRMS, section 2.2): ``h_i = [sum_k softmax_k(q_i . k_k / sqrt(d)) v_k]``, the
    heads concatenated. Otherwise ``h_i = r_i`` (NAML, section 3.2). Additive attention then gives the weight of each:
    ``a_i = softmax_i(w . tanh(V h_i + b))``. The user is ``u = norm(sum_i a_i h_i)``; ``score(j) = exp(s) u . r_j``:
    the probability of a click among some items is the softmax of their scores. As in the papers, the order of the
    history is ignored.

    Unlike in the papers, the text encoder is frozen, vectors have length 1, and the loss is over all items with
    training interactions outside the history, instead of four sampled ones. Before training, all items have equal
    weights, and the similarity is that of `Content` without decay.
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

    def _query(self, network: torch.nn.Module, vectors: Any, histories: Sequence[NDArray[np.int64]]) -> Any:
        torch, longest = require("torch", "baselines"), max((len(history) for history in histories), default=1) or 1
        places = np.zeros((len(histories), longest), dtype=np.int64)
        for row, item in enumerate(histories):
            places[row, : len(item)] = item
        lengths = np.array([len(history) for history in histories], dtype=np.int64)
        mask = torch.from_numpy(np.arange(longest)[None, :] < lengths[:, None])
        items = item_vectors(network, vectors[torch.from_numpy(places)], self._config.dropout)
        if self._config.heads:
            items = attended(network, items, mask, self._config.heads)
        return (weights(network["weigh"], items, mask)[:, :, None] * items).sum(dim=1)


def attended(network: torch.nn.Module, items: Any, mask: torch.Tensor, heads: int) -> Any:
    """Apply self-attention to the items of each history (NRMS, section 2.2), shape (b, n, d).

    Args:
        network: With the linear layers ``query``, ``key`` and ``value``.
        items: Item vectors, shape (b, n, d).
        mask: True for items, false for padding, shape (b, n).
        heads: Number of heads that share the d dimensions.
    """
    query, key, value = (
        network[name](items).unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
    )
    likeness = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (shares(likeness, mask[:, None, None, :]) @ value).transpose(1, 2).flatten(2)


def weights(weigh: Any, items: Any, mask: torch.Tensor) -> Any:
    """Return additive-attention weights of items, which sum to 1 and are 0 for padding, shape (b, n).

    Args:
        weigh: Maps d dimensions to a score.
        items: Item vectors, shape (b, n, d).
        mask: True for items, false for padding, shape (b, n); a row without items has weights 0.
    """
    return shares(weigh(items)[:, :, 0], mask)


def shares(scores: torch.Tensor, mask: torch.Tensor) -> Any:
    """Return the masked softmax over the last axis; 0 for masked entries and fully masked rows."""
    torch = require("torch", "baselines")
    # In a fully masked row, softmax would give NaN.
    hidden = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(hidden, dim=-1) * mask
