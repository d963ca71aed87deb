"""Retrieval heads: a two-tower model on the hidden states of a causal language model (M6-Rec)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from llmrec.baselines.base import Catalogue, InteractionLog, PositiveFloat, ScoredBaseline, item_counts
from llmrec.baselines.item_texts import (
    WHITENINGS,
    PrincipalAxes,
    WhitenedConfig,
    check_pretrained_encoder,
    normalise_vectors,
    texts_of_items,
)
from llmrec.baselines.neural import (
    NeuralConfig,
    case_users,
    early_stopping_cases,
    info_nce,
    load_network_state,
    network_state,
    train_ranker_with_early_stopping,
    training_segments,
)
from llmrec.errors import require
from llmrec.recipe.schema import Depth, Positive, Width
from llmrec.results import Reads
from llmrec.systems.m6.end_states import EndStates, load_end_states
from llmrec.types import Request

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

# Maximum number of tokens of a title, and of an item text.
_MAX_TITLE_TOKENS, _MAX_TEXT_TOKENS = 32, 128
# Number of validation cases for early stopping.
_EARLY_STOPPING_CASES = 5_000


class StateTowerConfig(WhitenedConfig, NeuralConfig):
    """Parameters of `StateTower`."""

    dim: Width = Field(128, description="Dimension of user and item vectors.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout rate.")
    learning_rate: PositiveFloat = Field(2e-3, description="Learning rate of Adam.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay (AdamW).")
    epochs: Positive = Field(30, description="Maximum number of epochs.")
    patience: Positive | None = Field(
        3,
        description="Early stopping: epochs without a better validation NDCG@10. `null`: run all epochs.",
    )
    encoder: str = Field("SmolLM2-135M-Instruct", description="Causal language model: name or folder.")
    layers: Depth | None = Field(
        None,
        description="Number of first model layers to run. `null`: all.",
    )
    max_len: Positive = Field(20, description="Maximum number of latest items to use.")
    windows: Positive | None = Field(
        2, description="Number of latest training windows of `max_len` items per user. `null`: all."
    )
    batch: Positive = Field(512, description="Targets per optimiser step, with in-batch negatives.")
    negatives: None = Field(None, description="No effect: the softmax includes only the targets in a batch.")
    temperature: PositiveFloat = Field(0.07, description="Temperature of the cosine similarities.")
    corrected: bool = Field(
        False, description="Apply logQ correction: subtract the log frequency of an item from its logit in training."
    )


@dataclass
class TwoTowerModel:
    """Normalised states of all items, shape (items, d), and the trained network."""

    catalogue: Catalogue
    vectors: Any
    popular: NDArray[np.float64]
    network: Any
    #: Computes user vectors, shape (n, dim), from histories.
    of_users: Callable[[Sequence[NDArray[np.int64]]], Any]
    config: StateTowerConfig
    name: str = "state-tower"

    @property
    def items(self) -> tuple[str, ...]:
        """Ids of all items, in column order."""
        return self.catalogue.ids

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the scores of all items after each history, shape (n, items); popularity for an empty history."""
        torch = require("torch", "baselines")
        histories = [self.catalogue.history(request)[-self.config.max_len :] for request in requests]
        self.network.eval()
        with torch.no_grad():
            result = (self.query(histories) @ self.item_vectors(self.vectors).T).numpy()
        result[[index for index, history in enumerate(histories) if not len(history)]] = self.popular
        return np.asarray(result)

    def item_vectors(self, vectors: Any) -> Any:
        """Return the normalised output vectors of items, shape (n, dim)."""
        nn = require("torch", "baselines").nn.functional
        dropped = nn.dropout(vectors, self.config.dropout, self.network.training)
        return nn.normalize(self.network["item"](dropped), dim=-1)

    def query(self, histories: Sequence[NDArray[np.int64]]) -> Any:
        """Return the user vectors, of length 1 / temperature, shape (n, dim)."""
        normalize = require("torch", "baselines").nn.functional.normalize
        return normalize(self.of_users(histories), dim=1) / self.config.temperature


class StateTower(ScoredBaseline[StateTowerConfig, TwoTowerModel]):
    """Predicts the next item from a language model's hidden states after the history and after each item's text.

    As in M6-Rec (Cui et al., arXiv 2205.08084, on retrieval), the state after a textual history and the state after an
    item's text are each projected to ``dim`` dimensions and length 1, and ``score(j) = u . p_j / temperature``. The
    loss of a user is ``-log(exp(s_i) / sum_j exp(s_j))`` over the targets of the batch, without other training items of
    the user (false negatives). Targets occur as negatives in proportion to popularity, which lowers the scores of
    popular items; ``corrected`` compensates for it (Yi et al., RecSys 2019, equation 3).

    The language model is frozen: states are centred and whitened, and two linear projections are trained. One pass over
    a sequence of a user's items gives a training example at each of them, since attention is causal.
    """

    name = "state-tower"
    Config = StateTowerConfig
    stochastic = True
    READS: ClassVar[Reads] = "texts"
    SCORES = "logits"
    GRID: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "whitening": WHITENINGS,
        "corrected": (False, True),
        "temperature": (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3),
        "dropout": (0.0, 0.1, 0.2, 0.35, 0.5),
    }
    FITS: ClassVar[int] = 8
    #: Hidden states after training histories.
    _known: dict[bytes, NDArray[np.float32]]
    #: Mean and whitening matrix of states after histories, shapes (d,) and (d, k).
    _whitening: tuple[NDArray[np.float32], NDArray[np.float32]]

    def learn(self, data: SplitDataset) -> None:
        """Encode all texts, and train the projections.

        Raises:
            RecipeError: If the encoder is not a causal language model.
            DataError: If no item has a text.
            ModelError: If the model is missing, not causal, or was fine-tuned by llmrec.
            MissingExtra: If torch or transformers is not installed.
        """
        torch, config = require("torch", "baselines"), self._config
        check_pretrained_encoder(self.name, config.encoder, "transitions-text")
        self._open(data)
        catalogue = Catalogue.of(data)
        texts = PrincipalAxes.of(self._vectors(data, catalogue.ids))
        vectors = torch.from_numpy(texts.whitened(config.whitening).astype(np.float32))
        events = InteractionLog.of(data, catalogue)
        cases = early_stopping_cases(data, config, _EARLY_STOPPING_CASES)
        rows, rng = self._rows(events), np.random.default_rng(self._seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            model = self._create_towers(catalogue, vectors, item_counts(events, catalogue))
            train_ranker_with_early_stopping(
                model, cases, config, lambda optimiser: self._epoch(model, rows, optimiser, rng)
            )
        self.looked_at = case_users(cases)
        self._model = model
        self._known.clear()

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the fitted state as arrays."""
        centre, whitening = self._whitening
        lens = {"lens.centre": centre, "lens.whitening": whitening}
        return {"vectors": self._fitted.vectors.detach().numpy(), **network_state(self._fitted.network), **lens}

    def restore(self, data: SplitDataset, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the fitted projections from `state`."""
        torch = require("torch", "baselines")
        self._open(data)
        self._whitening = state["lens.centre"], state["lens.whitening"]
        catalogue = Catalogue.of(data)
        with torch.random.fork_rng(devices=[]):
            vectors = torch.from_numpy(state["vectors"])
            self._model = self._create_towers(
                catalogue, vectors, item_counts(InteractionLog.of(data, catalogue), catalogue)
            )
        load_network_state(self._model.network, state)
        self.looked_at = case_users(early_stopping_cases(data, self._config, _EARLY_STOPPING_CASES))

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the logits of all items after each history, shape (n, items)."""
        return self._fitted.scores(requests)

    def _open(self, data: SplitDataset) -> None:
        order, items = self._config.order(len(data.dataset.items)), data.dataset.items
        ids = Catalogue.of(data).ids
        self._titles = [items[ids[index]].title or ids[index] for index in order]
        self._noun, self._known = data.dataset.noun, {}
        self._lead = f"The {self._noun} of one user, in this order:"

    @property
    def reader(self) -> EndStates:
        """The language model, loaded on first use."""
        return load_end_states(self._config.encoder, half=self._config.half, layers=self._config.layers)

    def _vectors(self, data: SplitDataset, ids: Sequence[str]) -> NDArray[np.floating[Any]]:
        """Return the states after the texts of items, before whitening, shape (n, d)."""
        texts = texts_of_items([data.dataset.items[item] for item in ids])
        rows = [[texts[index]] for index in self._config.order(len(ids))]
        return normalise_vectors(
            np.concatenate(self.reader.after(f"One of the {self._noun}:", rows, most=_MAX_TEXT_TOKENS))
        )

    def _rows(self, events: InteractionLog) -> list[NDArray[np.int64]]:
        """Encode the item sequences of users, and return every training target with the items before it."""
        config, owners = self._config, list[int]()
        pieces: list[NDArray[np.int64]] = []
        ends = np.cumsum(np.bincount(events.users, minlength=events.user_count))
        for user, items in enumerate(np.split(events.items, ends[:-1])):
            user_log = InteractionLog(np.zeros(len(items), np.int32), items, np.zeros(len(items)), 1)
            windows = training_segments(user_log, config.max_len)[: config.windows]
            pieces.extend(windows)
            owners.extend([user] * len(windows))
        computed = self.reader.after(
            self._lead, self._titles_of([piece[:-1] for piece in pieces]), most=_MAX_TITLE_TOKENS
        )
        for piece, states in zip(pieces, computed, strict=True):
            self._known |= {piece[: at + 1].tobytes(): state for at, state in enumerate(states)}
        result = PrincipalAxes.of(np.stack(list(self._known.values()) or [np.zeros(self.reader.width, np.float32)]))
        self._whitening = result.centre.astype(np.float32), result.whitening(config.whitening).astype(np.float32)
        self._row_users = np.repeat(owners, [len(piece) - 1 for piece in pieces])
        self._user_items = events.binary(int(events.items.max(initial=0)) + 1)
        return [piece[: at + 1] for piece in pieces for at in range(1, len(piece))]

    def _titles_of(self, histories: Sequence[NDArray[np.int64]]) -> list[list[str]]:
        return [[self._titles[item] for item in history] for history in histories]

    def states(self, histories: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return the hidden states after histories, shape (n, d); 0 for an empty history."""
        keys = [history.tobytes() for history in histories]
        new = {key: item for key, item in zip(keys, histories, strict=True) if key and key not in self._known}
        computed = self.reader.last(self._lead, self._titles_of(list(new.values())), most=_MAX_TITLE_TOKENS)
        result = dict(zip(new, computed, strict=True)) | {b"": np.zeros(self.reader.width, dtype=np.float32)}
        return np.stack([result[key] if key in result else self._known[key] for key in keys])

    def _create_towers(self, catalogue: Catalogue, vectors: Any, popular: NDArray[np.float64]) -> TwoTowerModel:
        nn, (centre, whitening), dim = require("torch", "baselines").nn, self._whitening, self._config.dim
        network = nn.ModuleDict(
            {
                "user": nn.Linear(whitening.shape[1], dim, bias=False),
                "item": nn.Linear(vectors.shape[1], dim, bias=False),
            }
        )
        for layer in network.values():
            nn.init.orthogonal_(layer.weight)

        def query(histories: Sequence[NDArray[np.int64]]) -> Any:
            torch = require("torch", "baselines")
            states = torch.from_numpy(normalise_vectors((self.states(histories) - centre) @ whitening))
            return network["user"](torch.nn.functional.dropout(states, self._config.dropout, network.training))

        return TwoTowerModel(
            catalogue, vectors, popular / popular.max(initial=1.0), network, query, self._config, self.name
        )

    def _epoch(
        self,
        model: TwoTowerModel,
        rows: Sequence[NDArray[np.int64]],
        optimiser: torch.optim.Optimizer,
        rng: np.random.Generator,
    ) -> float:
        """Train for one epoch, and return the mean loss."""
        torch, config = require("torch", "baselines"), self._config
        targets = np.array([row[-1] for row in rows])
        share = np.bincount(targets, minlength=len(model.catalogue.ids)) / max(1, len(rows))
        order, total = rng.permutation(len(rows)), 0.0
        model.network.train()
        for start in range(0, len(order), config.batch):
            part = order[start : start + config.batch]
            batch_targets = targets[part]
            optimiser.zero_grad(set_to_none=True)
            users = model.query([rows[index][:-1] for index in part])
            items = model.item_vectors(model.vectors[torch.from_numpy(batch_targets)])
            has = torch.from_numpy(self._user_items[self._row_users[part]][:, batch_targets].toarray() > 0)
            logits = users @ items.T
            if config.corrected:
                logits = logits - torch.from_numpy(np.log(share[batch_targets]).astype(np.float32))
            loss = info_nce(logits, has)
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(part)
        return total / max(1, len(rows))
