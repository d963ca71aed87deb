"""UniSRec as a baseline: fitting, stored state, transfer to another data set, and addition of new items."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from llmrec.baselines.base import Catalogue, InteractionLog, ScoredBaseline, item_counts
from llmrec.baselines.item_texts import STORE_PREFIX, text_vectors
from llmrec.baselines.neural import (
    case_users,
    early_stopping_cases,
    full_softmax_loss,
    load_network_state,
    network_state,
    train_ranker_with_early_stopping,
    train_softmax_epoch,
    training_batches,
    training_segments,
)
from llmrec.errors import RecipeError, require
from llmrec.progress import Progress
from llmrec.results import Reads
from llmrec.systems.carried import TransferableNetwork
from llmrec.systems.unisrec.network import (
    DropWords,
    UniSRecConfig,
    UniSRecModel,
    create_network,
    train_contrastive_epoch,
)
from llmrec.types import Request

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.optim import Optimizer

    from llmrec.data.split import SplitDataset

# Number of validation cases for early stopping.
_EARLY_STOPPING_CASES = 5_000
# Properties that must match those of transferred weights, and the name of item embeddings, which are not transferred.
_SHAPE_PARAMETERS, _DOMAIN_WEIGHTS = ("dim", "layers", "heads", "experts", "max_len"), "network.table."


class UniSRec(ScoredBaseline[UniSRecConfig, UniSRecModel]):
    """Predicts the next item from the texts of a sequence, with weights that can be used on other data sets.

    After Hou et al. (KDD 2022). A text vector x becomes ``v = sum_k g_k (x - b_k) W_k``: parametric whitenings, mixed
    by ``g = softmax(x W_g + e * softplus(x W_n))``, with noise e in training only. The blocks of `SASRec`
    process the v of a sequence, and an item's score is the cosine of the last state and its v, divided by the
    temperature; the softmax is over all items with training interactions. With ``ids`` (transductive) a learned
    embedding is added to the vectors of training items; without (inductive) there are no item embeddings, and new items
    are ranked like all others.

    ``pretrain`` and `pretrained` first train with two contrastive losses with in-batch negatives: a sequence with its
    next item, and, weighted by ``contrast``, with itself after dropping items or words. Rows with the same target are
    not negatives of each other. The first loss uses all positions of a sequence, the second one the last position. With
    ``start`` the sequence encoder of another domain is frozen, as in the paper. Dropout in the whitenings drops the
    same values for all of them, which allows a single product.
    """

    name = "unisrec"
    stochastic = True
    Config = UniSRecConfig
    READS: ClassVar[Reads] = "texts"
    SCORES = "logits"
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "dropout": (0.05, 0.1, 0.2, 0.35, 0.5),
        "learning_rate": (3e-4, 1e-3, 3e-3),
    }
    FITS: ClassVar[int] = 5

    def learn(self, data: SplitDataset) -> None:
        """Train the adaptor, and the sequence encoder unless it is transferred from another data set.

        Raises:
            DataError: If no item has a text, or ``start`` was trained on held-out interactions.
            ModelError: If the encoder or the weights are missing.
            MissingExtra: If torch is not installed.
        """
        torch, config = require("torch", "baselines"), self._config
        cases = early_stopping_cases(data, config, _EARLY_STOPPING_CASES)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            model, pieces = self._initial(data)
            rng = np.random.default_rng(self._seed)
            if config.start is not None:
                for name in ("places", "blocks", "last_norm"):
                    model.network[name].requires_grad_(False)
            param_groups = [
                {"params": [parameter for parameter in model.network.parameters() if parameter.requires_grad]}
            ]
            pretrained = config.start is not None or config.pretrain > 0

            def learn(optimiser: Optimizer) -> float:
                return _train_epoch(model, pieces, optimiser, rng)

            train_ranker_with_early_stopping(model, cases, config, learn, param_groups=param_groups, learned=pretrained)
        self.looked_at = case_users(cases)
        self._model = model.finished()

    def pretrained(self, data: SplitDataset) -> None:
        """Only train with contrastive losses; errors as in `learn`."""
        torch = require("torch", "baselines")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            model, _ = self._initial(data)
        self._model = model.finished()

    def save(self, folder: Path, data: SplitDataset) -> None:
        """Save weights without item embeddings, for ``start`` on another data set.

        Args:
            folder: The folder, which is replaced.
            data: The training data.

        Raises:
            RecipeError: If the text vectors are specific to this data set.
        """
        config = self._config
        if not config.named:
            raise RecipeError(
                f"unisrec: vectors of {config.encoder} are specific to a data set, so weights trained on them do not "
                "transfer; name a text encoder",
                kind="unsupported",
                column="encoder",
            )
        self._carried(self._fitted).save(Path(folder), data)

    def extended(self, data: SplitDataset) -> UniSRec:
        """Return a model with the same weights for another catalogue.

        Raises:
            RecipeError: If the text vectors depend on the catalogue.
        """
        if not self._config.named:
            raise RecipeError(
                f"unisrec: vectors of {self._config.encoder} depend on the catalogue; name a text encoder to add items",
                kind="unsupported",
                column="encoder",
            )
        model, catalogue = self._fitted, Catalogue.of(data)
        old_rows = model.catalogue.indices(catalogue.ids)
        known = old_rows >= 0
        other = copy.copy(self)
        other._model = replace(
            model,
            catalogue=catalogue,
            vectors=_text_tensor(data, catalogue, self._config),
            embedding_rows=np.where(known, model.embedding_rows[old_rows], -1),
            popular=np.where(known, model.popular[old_rows], 0.0),
        ).finished()
        return other

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the weights and the text vectors as arrays."""
        return {"vectors": self._fitted.vectors.numpy(), **network_state(self._fitted.network)}

    def restore(self, data: SplitDataset, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the fitted network from `state`."""
        torch = require("torch", "baselines")
        catalogue = Catalogue.of(data)
        with torch.random.fork_rng(devices=[]):
            model = self._untrained(catalogue, torch.from_numpy(state["vectors"]), InteractionLog.of(data, catalogue))
        load_network_state(model.network, state)
        self._model = model.finished()
        self.looked_at = case_users(early_stopping_cases(data, self._config, _EARLY_STOPPING_CASES))

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the logits of all items after each history, shape (n, items)."""
        return self._fitted.scores(requests)

    def _carried(self, model: UniSRecModel) -> TransferableNetwork:
        """Return the transferable network."""
        shape = {key: getattr(self._config, key) for key in _SHAPE_PARAMETERS} | {"width": model.vectors.shape[1]}
        return TransferableNetwork(self.name, model.network, shape, _DOMAIN_WEIGHTS, self._config)

    def _untrained(self, catalogue: Catalogue, vectors: Any, events: InteractionLog) -> UniSRecModel:
        """Return a network with random weights."""
        popular = item_counts(events, catalogue)
        embedding_rows = np.full(len(popular), -1, dtype=np.int64)
        embedding_rows[popular > 0] = np.arange(int((popular > 0).sum()))
        network = create_network(vectors.shape[1], int((popular > 0).sum()) if self._config.ids else 0, self._config)
        return UniSRecModel(
            catalogue, vectors, embedding_rows, popular / popular.max(initial=1.0), network, self._config
        )

    def _initial(self, data: SplitDataset) -> tuple[UniSRecModel, list[NDArray[np.int64]]]:
        """Return the network before training on items, with transferred or pretrained weights, and the sequences."""
        torch, config = require("torch", "baselines"), self._config
        catalogue = Catalogue.of(data)
        events = InteractionLog.of(data, catalogue)
        model = self._untrained(catalogue, _text_tensor(data, catalogue, config), events)
        if config.start is not None:
            self._carried(model).load(config.start, data)
        numbers = model.embedding_rows[events.items].astype(np.int32)
        pieces = training_segments(replace(events, items=numbers), config.max_len)
        if config.pretrain:
            rng, text = np.random.default_rng([self._seed, 1]), None
            if config.word_drop and not config.encoder.startswith(STORE_PREFIX):
                shortened = text_vectors(data, catalogue.ids, config, DropWords(config.word_drop, self._seed))
                text = torch.from_numpy(shortened.astype(np.float32))[model.warm]
            optimiser = torch.optim.AdamW(
                model.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
            )
            with Progress(
                f"{self.name}: contrast", config.pretrain, unit="epochs", quiet=config.quiet, passing=True
            ) as bar:
                for epoch in range(config.pretrain):
                    train_contrastive_epoch(model, pieces, text, optimiser, rng)
                    bar.reach(epoch + 1)
        return model, pieces


def _text_tensor(data: SplitDataset, catalogue: Catalogue, config: UniSRecConfig) -> Any:
    return require("torch", "baselines").from_numpy(text_vectors(data, catalogue.ids, config).astype(np.float32))


def _train_epoch(
    model: UniSRecModel, pieces: Sequence[NDArray[np.int64]], optimiser: Optimizer, rng: np.random.Generator
) -> float:
    """Train for one epoch with a softmax over all training items, and return the mean loss."""
    torch, config, warm = require("torch", "baselines"), model.config, model.warm

    def forward(items: Any, rows: Any) -> tuple[Any, Any]:
        raw = model.represented(warm)
        query = model.encoded(raw[items])[rows] / config.temperature
        return query, torch.nn.functional.normalize(raw, dim=1)

    loss = partial(full_softmax_loss, half=config.half)
    return train_softmax_epoch(model.network, training_batches(pieces, config.batch, rng), optimiser, forward, loss)
