"""A two-tower model over texts: it learns which texts follow which, and knows no item by its id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from llmrec.baselines.base import AboveZero, Catalogue, Decay, Log, ScoredBaseline, counts, fading
from llmrec.baselines.content import WHITENINGS
from llmrec.baselines.item_texts import Turned, text_vectors
from llmrec.baselines.neural import NeuralConfig, over_all, until_best
from llmrec.baselines.tuning.validation import ranking_cases
from llmrec.errors import require
from llmrec.recipe.schema import Positive
from llmrec.results import Reads
from llmrec.types import Case, Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

# Validation cases that decide when to stop.
_STOP_CASES = 5_000
# Logarithm of the factor of cosines before training: a softmax over thousands of items needs more than 1.
_SCALE = 2.5


class TowerConfig(NeuralConfig):
    """Parameters of `Tower`."""

    encoder: str = Field("lsa", description="lsa, or a text encoder such as all-MiniLM-L6-v2: a name or a folder")
    whitening: float = Field(
        0.5, ge=0, le=1, description="exponent that evens out the directions of the vectors; 1: all vary alike"
    )
    dim: Positive = Field(128, description="length of the vectors that users and items are compared by")
    decay: Decay = Field(0.7, description="factor from one event to the one before")
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


@dataclass
class Towers:
    """Vectors of all items, of length 1, shape (items, d), and the maps that are learned over them."""

    catalogue: Catalogue
    vectors: Any
    warm: NDArray[np.int64]
    popular: NDArray[np.float64]
    network: Any
    config: TowerConfig
    looked_at: frozenset[str] = frozenset()
    name: str = "tower"

    @property
    def items(self) -> tuple[str, ...]:
        """The catalogue in column order."""
        return self.catalogue.ids

    def histories(self, requests: Sequence[Request]) -> list[NDArray[np.int64]]:
        """Return the latest items of each history, oldest first; unknown ones are left out."""
        index, most = self.catalogue.index, self.config.max_len
        known = [[index[event.item_id] for event in request.history if event.item_id in index] for request in requests]
        return [np.array(places[-most:], dtype=np.int64) for places in known]

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
        nn, network = require("torch", "baselines").nn.functional, self.network
        return nn.normalize(network["item"](nn.dropout(vectors, self.config.dropout, network.training)), dim=1)

    def query(self, histories: Sequence[NDArray[np.int64]]) -> Any:
        """Return what users are compared by, as long as the factor of cosines, shape (n, dim)."""
        torch, network = require("torch", "baselines"), self.network
        nn, config = torch.nn.functional, self.config
        weights = fading(histories, len(self.catalogue.ids), config.decay, np.float32)
        shares = weights.data / np.repeat(np.maximum(weights.sum(axis=1), 1e-9), np.diff(weights.indptr))
        mean = nn.embedding_bag(
            torch.from_numpy(weights.indices.astype(np.int64)),
            self.vectors,
            torch.from_numpy(weights.indptr.astype(np.int64)),
            mode="sum",
            per_sample_weights=torch.from_numpy(shares.astype(np.float32)),
            include_last_offset=True,
        )
        last = torch.from_numpy(np.array([history[-1] if len(history) else 0 for history in histories], dtype=np.int64))
        drop = partial(nn.dropout, p=config.dropout, training=network.training)
        both = network["mean"](drop(mean)) + network["last"](drop(self.vectors[last]))
        return nn.normalize(both, dim=1) * network["scale"][0].exp()


class Tower(ScoredBaseline[TowerConfig, Towers]):
    """Predicts the text of the next item from the texts of the latest ones: two linear maps and a softmax.

    With whitened text vectors x_i of length 1 (see `Content`) and fading weights w_i that sum to 1, a history is
    ``q = norm(M sum_i w_i x_i + L x_last)``, an item ``p_j = norm(P x_j)``, and ``score(j) = exp(s) q . p_j``. M, L, P
    and s are learned: the loss is the cross-entropy over all items with training interactions, less those of the
    history. The text encoder is fixed and no item has a parameter of its own, so that items that nobody has chosen are
    ranked like all others. The form is that of two-tower retrieval (Yi et al., RecSys 2019), both towers linear.

    Training ends when validation NDCG@10 has not risen for ``patience`` epochs, and the best epoch's weights are kept.
    """

    name = "tower"
    stochastic = True
    Config = TowerConfig
    READS: ClassVar[Reads] = "texts"
    SCORES = "logits"
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "whitening": WHITENINGS,
        "decay": (0.3, 0.5, 0.6, 0.7, 0.8, 0.9),
        "dropout": (0.0, 0.1, 0.2, 0.35, 0.5),
    }
    FITS: ClassVar[int] = 12

    def fit(self, data: SplitDataset) -> None:
        """Learn the maps.

        Raises:
            DataError: If no item has a text.
            ModelError: If there is no such encoder.
            MissingExtra: If torch is not installed.
        """
        torch, config = require("torch", "baselines"), self._config
        catalogue = Catalogue.of(data)
        texts = Turned.of(text_vectors([data.dataset.items[item] for item in catalogue.ids], config.encoder))
        vectors = torch.from_numpy(texts.whitened(config.whitening).astype(np.float32))
        events = Log.of(data, catalogue)
        popular = counts(events, catalogue)
        cases = [] if config.patience is None else ranking_cases(data, _STOP_CASES)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            network = _network(vectors.shape[1], config.dim)
            model = Towers(
                catalogue, vectors, np.flatnonzero(popular), popular / popular.max(initial=1.0), network, config
            )
            rows, rng = _rows(events, config.max_len), np.random.default_rng(self._seed)
            until_best(model, cases, config, lambda optimiser: epoch_of(model, rows, optimiser, rng))
            self._tune(model, data, texts, rows, cases)
        self.looked_at = frozenset(case.request.user_id for case in cases)
        self._model = replace(model, looked_at=self.looked_at)

    def _tune(
        self, model: Towers, data: SplitDataset, texts: Turned, rows: Sequence[NDArray[np.int64]], cases: Sequence[Case]
    ) -> None:
        """Tune what makes the vectors; here they are fixed."""

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the logits after each history, shape (n, items)."""
        return self._fitted.scores(requests)


def _network(width: int, dim: int) -> Any:
    """Return the maps, all three the same to begin with: parts of a rotation, so that likenesses are kept."""
    torch = require("torch", "baselines")
    names = ("mean", "last", "item")
    network = torch.nn.ModuleDict({name: torch.nn.Linear(width, dim, bias=False) for name in names})
    turned = torch.nn.init.orthogonal_(torch.empty(dim, width))
    with torch.no_grad():
        for name in names:
            network[name].weight.copy_(turned)
    network["scale"] = torch.nn.ParameterList([torch.tensor(_SCALE)])
    return network


def _rows(events: Log, most: int) -> list[NDArray[np.int64]]:
    """Return the items before each training target and the target itself, at most ``most + 1``."""
    ends = np.cumsum(np.bincount(events.users, minlength=events.user_count))
    return [
        items[max(0, end - most) : end + 1]
        for items in np.split(events.items, ends[:-1])
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
