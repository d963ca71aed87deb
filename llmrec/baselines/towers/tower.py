"""Two-tower models over texts: they learn which texts follow which, and know no item by its id."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from pydantic import Field

from llmrec.baselines.base import AboveZero, Catalogue, Decay, Log, ScoredBaseline, counts, fading
from llmrec.baselines.item_texts import WHITENINGS, Turned, WhitenedConfig, refuse_unpretrained, text_vectors, texts_of
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
from llmrec.models.text_encoder import TunedEncoder, find_encoder
from llmrec.recipe.schema import Positive, Width
from llmrec.results import Reads
from llmrec.types import Case, Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

    #: Network, vectors of all items, histories as catalogue numbers -> what users are compared by, shape (n, dim).
    Query = Callable[[Any, Any, Sequence[NDArray[np.int64]]], Any]

# Validation cases that decide when to stop.
_STOP_CASES = 5_000
# Logarithm of the factor of cosines before training: a softmax over thousands of items needs more than 1.
_SCALE = 2.5
# Texts that are read for one step of the encoder.
_TEXTS = 64
# Steps of the mean length that a vector takes at most.
_FURTHEST = 5.0


class TowersConfig(WhitenedConfig, NeuralConfig):
    """How texts are read, and how towers over them are trained."""

    dim: Width = Field(128, description="length of the vectors that users and items are compared by")
    dropout: float = Field(0.2, ge=0, lt=1, description="share of values left out in training")
    max_len: Positive = Field(10, description="the network sees the last so many items")
    batch: Positive = Field(1024, description="targets of one optimiser step")
    negatives: None = Field(None, description="the softmax is over all items")
    learning_rate: AboveZero = Field(2e-3, description="of Adam")
    weight_decay: float = Field(0.01, ge=0, description="decoupled, as in AdamW")
    epochs: Positive = Field(30, description="passes over the training sequences, at most")
    patience: Positive | None = Field(
        3,
        description="epochs without a better validation NDCG@10 after which training ends; None: all epochs, without "
        "a look at the validation split",
    )


T = TypeVar("T", bound=TowersConfig)


@dataclass
class Towers:
    """Vectors of all items, of length 1, shape (items, d), and the maps that are learned over them."""

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
        """The catalogue in column order."""
        return self.catalogue.ids

    def histories(self, requests: Sequence[Request]) -> list[NDArray[np.int64]]:
        """Return the latest items of each history, oldest first; unknown ones are left out."""
        return [self.catalogue.history(request)[-self.config.max_len :] for request in requests]

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Score every item after each history, shape (n, items); popularity decides for an empty one."""
        torch = require("torch", "baselines")
        histories = self.histories(requests)
        self.network.eval()
        with torch.no_grad():
            found = (self.query(histories) @ self.item_vectors(self.vectors).T).numpy()
        found[[place for place, history in enumerate(histories) if not len(history)]] = self.popular
        return np.asarray(found)

    def item_vectors(self, vectors: Any) -> Any:
        """Return what items are compared by, of length 1, shape (n, dim)."""
        return item_vectors(self.network, vectors, self.config.dropout)

    def query(self, histories: Sequence[NDArray[np.int64]]) -> Any:
        """Return what users are compared by, as long as the factor of cosines, shape (n, dim)."""
        normalize = require("torch", "baselines").nn.functional.normalize
        found = self.of_users(self.network, self.vectors, histories)
        return normalize(found, dim=1) * self.network["scale"][0].exp()


class TextTowers(ScoredBaseline[T, Towers]):
    """Towers over text vectors that are whitened and fixed: it needs ``_build`` and ``_query``.

    Training ends when validation NDCG@10 has not risen for ``patience`` epochs, and the best epoch's weights are kept.
    """

    stochastic = True
    READS: ClassVar[Reads] = "texts"
    SCORES = "logits"

    def fit(self, data: SplitDataset) -> None:
        """Learn the maps.

        Raises:
            DataError: If no item has a text.
            ModelError: If there is no such encoder.
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
            self._tune(model, data, texts, rows, cases)
        self.looked_at = stopped_by(cases)
        self._model = model

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the maps and the vectors of the items, as arrays."""
        return {"vectors": self._fitted.vectors.detach().numpy(), **weights_of(self._fitted.network)}

    def restore(self, data: SplitDataset, state: Mapping[str, NDArray[Any]]) -> None:
        """Put back what `state` returned."""
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
        """Return what is said of items as vectors, before they are whitened, shape (n, d)."""
        return text_vectors(data, ids, self._config)

    def _rows(self, events: Log) -> list[NDArray[np.int64]]:
        """Return the items before each training target and the target itself, at most ``max_len + 1``."""
        return _rows(events, self._config.max_len)

    def _epoch(
        self, model: Towers, rows: Sequence[NDArray[np.int64]], optimiser: Any, rng: np.random.Generator
    ) -> float:
        """Learn from all rows once, and return the mean loss; see `epoch_of`."""
        return epoch_of(model, rows, optimiser, rng)

    def _build(self, width: int) -> Any:
        """Return a ``torch.nn.ModuleDict`` with the map ``item``, for vectors of this length."""
        raise NotImplementedError

    def _query(self, network: Any, vectors: Any, histories: Sequence[NDArray[np.int64]]) -> Any:
        """Return what users are compared by, of any length; see `Query`."""
        raise NotImplementedError

    def _tune(
        self, model: Towers, data: SplitDataset, texts: Turned, rows: Sequence[NDArray[np.int64]], cases: Sequence[Case]
    ) -> None:
        """Tune what makes the vectors; here they are fixed."""

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the logits after each history, shape (n, items)."""
        return self._fitted.scores(requests)


def item_vectors(network: Any, vectors: Any, dropout: float) -> Any:
    """Return what items of text vectors are compared by, of length 1, shape (n, dim)."""
    nn = require("torch", "baselines").nn.functional
    return nn.normalize(network["item"](nn.dropout(vectors, dropout, network.training)), dim=-1)


class TowerConfig(TowersConfig):
    """Parameters of `Tower`."""

    decay: Decay = Field(0.7, description="factor from one event to the one before")


class Tower(TextTowers[TowerConfig]):
    """Predicts the text of the next item from the texts of the latest ones: two linear maps and a softmax.

    With whitened text vectors x_i of length 1 (see `Content`) and fading weights w_i that sum to 1, a history is
    ``q = norm(M sum_i w_i x_i + L x_last)``, an item ``p_j = norm(P x_j)``, and ``score(j) = exp(s) q . p_j``. M, L, P
    and s are learned: the loss is the cross-entropy over all items with training interactions, less those of the
    history. The text encoder is fixed and no item has a parameter of its own, so that items that nobody has chosen are
    ranked like all others. The form is that of two-tower retrieval (Yi et al., RecSys 2019), both towers linear.
    """

    name = "tower"
    Config = TowerConfig
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "whitening": WHITENINGS,
        "decay": (0.3, 0.5, 0.6, 0.7, 0.8, 0.9),
        "dropout": (0.0, 0.1, 0.2, 0.35, 0.5),
    }
    FITS: ClassVar[int] = 12

    def _build(self, width: int) -> Any:
        """Return the maps, all three the same to begin with: parts of a rotation, so that likenesses are kept."""
        nn, names = require("torch", "baselines").nn, ("mean", "last", "item")
        network = nn.ModuleDict({name: nn.Linear(width, self._config.dim, bias=False) for name in names})
        turn(network, names)
        return network

    def _query(self, network: Any, vectors: Any, histories: Sequence[NDArray[np.int64]]) -> Any:
        torch, config = require("torch", "baselines"), self._config
        nn = torch.nn.functional
        weights = fading(histories, len(vectors), config.decay, np.float32)
        shares = weights.data / np.repeat(np.maximum(weights.sum(axis=1), 1e-9), np.diff(weights.indptr))
        mean = nn.embedding_bag(
            torch.from_numpy(weights.indices.astype(np.int64)),
            vectors,
            torch.from_numpy(weights.indptr.astype(np.int64)),
            mode="sum",
            per_sample_weights=torch.from_numpy(shares.astype(np.float32)),
            include_last_offset=True,
        )
        last = torch.from_numpy(np.array([history[-1] if len(history) else 0 for history in histories], dtype=np.int64))
        drop = partial(nn.dropout, p=config.dropout, training=network.training)
        return network["mean"](drop(mean)) + network["last"](drop(vectors[last]))


class TunedTowerConfig(TowerConfig):
    """Parameters of `TunedTower`."""

    encoder: str = Field("all-MiniLM-L6-v2", description="the text encoder that is tuned: a name or a folder")
    blocks: Positive = Field(1, description="how many of the encoder's last blocks are tuned")
    step: AboveZero = Field(0.1, description="how far the vectors of texts, of length 1, are to move in an epoch")
    encoder_rate: AboveZero = Field(2e-5, description="learning rate of the encoder")
    map_rate: AboveZero = Field(5e-4, description="learning rate of the maps while the encoder is tuned")


class TunedTower(Tower):
    """`Tower`, and then its text encoder is tuned too: its last blocks learn which texts follow which.

    It begins with the maps that `Tower` finds over the encoder as it is. Then maps and blocks learn in turns under the
    same loss: an epoch over the training rows moves the maps and sums, for every item, the gradient with respect to its
    vector, on both sides of the product (gradient caching: Gao et al., RepL4NLP 2021). Each vector is to move a
    ``step`` down that gradient, and the blocks go once over the texts, in small batches, towards these vectors by least
    squares (target propagation: Lee et al., ECML 2015). So a text is read once an epoch, however often its item occurs,
    all items are negatives, and no vector runs away. Centre and whitening stay those of the encoder as it was. The best
    epoch by validation NDCG@10 is kept, which may be none. Items that nobody has chosen get their vectors from the
    tuned encoder too.
    """

    name = "tuned-tower"
    Config = TunedTowerConfig
    READS = "language model"
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {"step": (0.03, 0.1, 0.3), "blocks": (1, 2)}
    FITS: ClassVar[int] = 4
    _config: TunedTowerConfig

    def fit(self, data: SplitDataset) -> None:
        """Learn the maps, then maps and encoder.

        Raises:
            RecipeError: If the encoder is no pretrained one.
            DataError: If no item has a text.
            ModelError: If there is no such encoder, or it has fewer blocks.
            MissingExtra: If torch or transformers is not installed.
        """
        refuse_unpretrained(self.name, self._config.encoder, "tower")
        super().fit(data)

    def _tune(
        self, model: Towers, data: SplitDataset, texts: Turned, rows: Sequence[NDArray[np.int64]], cases: Sequence[Case]
    ) -> None:
        torch, config = require("torch", "baselines"), self._config
        own = texts_of([data.dataset.items[item] for item in model.catalogue.ids])
        said = [own[place] for place in config.order(len(own))]
        encoder = TunedEncoder(find_encoder(config.encoder)[0], said, blocks=config.blocks)
        centre = torch.from_numpy(texts.centre.astype(np.float32))
        turn = torch.from_numpy(texts.whitening(config.whitening).astype(np.float32))

        def whitened(vectors: Any) -> Any:
            return torch.nn.functional.normalize((vectors - centre) @ turn, dim=1)

        rates = [
            {"params": list(model.network.parameters()), "lr": config.map_rate},
            {"params": list(encoder.blocks.parameters()), "lr": config.encoder_rate},
        ]
        # From here on the blocks are kept and put back with the maps.
        model.network["encoder"] = encoder.blocks
        model.vectors = whitened(encoder.every())
        rng = np.random.default_rng([self._seed, 1])

        def learn(optimiser: Any) -> float:
            model.vectors.requires_grad_(True)
            loss = epoch_of(model, rows, optimiser, rng)
            wanted = _moved(model.vectors, config.step)
            # Without dropout, which would move vectors by more than a step.
            encoder.blocks.eval()
            for places in np.array_split(rng.permutation(len(said)), -(-len(said) // _TEXTS)):
                optimiser.zero_grad(set_to_none=True)
                (whitened(encoder(places.tolist())) - wanted[places]).square().sum(dim=1).mean().backward()
                optimiser.step()
            model.vectors = whitened(encoder.every())
            return loss

        until_best(model, cases, config, learn, rates=rates, learned=True)
        model.vectors = whitened(encoder.every())
        # Scores need the vectors alone.
        del model.network["encoder"]


def turn(network: Any, names: Sequence[str]) -> None:
    """Make linear maps of a network parts of one random rotation."""
    torch = require("torch", "baselines")
    turned = torch.nn.init.orthogonal_(torch.empty_like(network[names[0]].weight))
    with torch.no_grad():
        for name in names:
            network[name].weight.copy_(turned)


def _rows(events: Log, most: int) -> list[NDArray[np.int64]]:
    """Return the items before each training target and the target itself, at most ``most + 1``."""
    ends = np.cumsum(np.bincount(events.users, minlength=events.user_count))
    return [
        items[max(0, end - most) : end + 1]
        for items in np.split(events.items.astype(np.int64), ends[:-1])
        for end in range(1, len(items))
    ]


def epoch_of(model: Towers, rows: Sequence[NDArray[np.int64]], optimiser: Any, rng: np.random.Generator) -> float:
    """Learn from all rows once, and return the mean loss.

    Args:
        model: The towers. Where its vectors ask for gradients, those of all steps are summed in them.
        rows: The items before a training target and the target itself, as catalogue numbers.
        optimiser: Takes the steps of the maps.
        rng: Mixes the rows.
    """
    torch, config = require("torch", "baselines"), model.config
    model.network.train()
    column = np.full(len(model.catalogue.ids), -1, dtype=np.int64)
    column[model.warm] = np.arange(len(model.warm))
    warm, order, total = torch.from_numpy(model.warm), rng.permutation(len(rows)), 0.0
    for start in range(0, len(order), config.batch):
        part = [rows[place] for place in order[start : start + config.batch].tolist()]
        optimiser.zero_grad(set_to_none=True)
        query, table = model.query([row[:-1] for row in part]), model.item_vectors(model.vectors[warm])
        targets = torch.from_numpy(column[[row[-1] for row in part]])
        # The last item of a history fills the others up.
        seen = np.stack([np.pad(column[row[:-1]], (0, config.max_len + 1 - len(row)), mode="edge") for row in part])
        with torch.no_grad():
            value, of_query, of_table = over_all(
                query.detach(), table.detach(), targets, half=config.half, hidden=torch.from_numpy(seen)
            )
        torch.autograd.backward([query, table], [of_query, of_table])
        optimiser.step()
        total += value * len(part)
    return total / max(1, len(rows))


def _moved(vectors: Any, step: float) -> Any:
    """Return where vectors are to go: down their gradients, by ``step`` in the root mean square, shape (n, d)."""
    gradient = vectors.grad
    lengths = gradient.norm(dim=1, keepdim=True)
    scale = step / lengths.square().mean().sqrt().clamp(min=1e-12)
    bound = (_FURTHEST * step / (lengths * scale).clamp(min=1e-12)).clamp(max=1)
    return vectors.detach() - scale * bound * gradient
