"""U-BERT as a baseline: fitting, stored state, transfer to another data set, and export of features."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from llmrec import __version__
from llmrec.baselines.base import Baseline
from llmrec.baselines.neural import case_users, load_network_state, network_state, train_with_early_stopping
from llmrec.baselines.rated import Ratings, rate_requests, training_ratings
from llmrec.baselines.validation import rating_cases
from llmrec.data.features import Features, Pair, Provenance
from llmrec.data.split import split_validation_users
from llmrec.errors import require
from llmrec.metrics.rating import rmse
from llmrec.models.text_encoder import find_encoder
from llmrec.recipe.schema import FusionSection
from llmrec.results import Reads
from llmrec.systems.carried import TransferableNetwork
from llmrec.systems.ubert.network import ReviewModel, UBertConfig, create_network, project_states, shuffled_batches
from llmrec.systems.ubert.pretrain import pretrain_encoders
from llmrec.systems.ubert.reviews import FrozenEncoder, Reviews, Side, Tokens
from llmrec.types import Answer, Case, Request

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.optim import Optimizer

    from llmrec.data.split import SplitDataset

# Number of validation ratings for early stopping.
_EARLY_STOPPING_CASES = 5_000
# Decimal places of answers, since further digits depend on the batch size.
_ANSWER_DIGITS = 6
_RESERVED: float = FusionSection.model_fields["reserved"].default
# Tokens per batch of projections.
_TOKEN_BATCH = 1 << 16
# Part of the names of user and item embeddings, which are specific to a data set.
_DOMAIN_WEIGHTS = ".own."


class UBert(Baseline[UBertConfig, ReviewModel]):
    """Predicts a rating from the training reviews of user and item (Qiu et al., AAAI 2021).

    A frozen text encoder computes the token states of all training reviews. The user encoder combines the embeddings of
    user and domain with attention over the user's reviews; the item encoder does the same for items. Tokens of both
    sides are matched by attention in both directions. The rating is linear in both vectors and the match, with the
    squared error as loss. In training, the review of the predicted pair is excluded on both sides. A user or an item
    without training ratings has the mean vector of all others, and no tokens.

    ``pretrain`` and `pretrained` first train on masked opinion words and on the ratings of single reviews.
    ``start`` loads weights from another domain, without user and item embeddings.
    """

    name = "ubert"
    stochastic = True
    Config = UBertConfig
    READS: ClassVar[Reads] = "texts"
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "learning_rate": (3e-4, 1e-3, 3e-3),
        "weight_decay": (0.01, 0.1, 1.0),
        "dropout": (0.0, 0.2, 0.5),
    }
    FITS: ClassVar[int] = 5
    # The weights after pretraining alone, which cannot predict ratings.
    _pretrained: ReviewModel | None = None

    def learn(self, data: SplitDataset) -> None:
        """Train on training ratings and reviews.

        Raises:
            DataError: If ratings or reviews are missing, or ``start`` was trained on held-out interactions.
            ModelError: If the encoder or the weights are missing.
            RecipeError: If opinion words cannot be read.
            MissingExtra: If torch is not installed.
        """
        torch, config = require("torch", "baselines"), self._config
        cases = self._cases(data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            model = self._initial(data)
            rng = np.random.default_rng(self._seed)
            truth = [float(case.truth) for case in cases]

            def judge() -> float:
                model.update_means()
                result = _predict_ratings(model, [case.request for case in cases])
                return rmse(np.clip(result, *model.known.scale), truth)

            def learn(optimiser: Optimizer) -> float:
                return _train_epoch(model, optimiser, rng)

            train_with_early_stopping(
                model.network, judge if cases else None, config, learn, name=self.name, measure="RMSE"
            )
        self.looked_at = case_users(cases)
        self._pretrained, self._model = None, _finalise_model(model)

    def pretrained(self, data: SplitDataset) -> None:
        """Only pretrain, on masked opinion words and ratings of single reviews; errors as in `learn`."""
        torch = require("torch", "baselines")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self._pretrained, self._model = self._initial(data, pairs=False), None

    def save(self, folder: Path, data: SplitDataset) -> None:
        """Save weights without user and item embeddings, for ``start`` on another data set.

        Args:
            folder: The folder, which is replaced.
            data: The training data.
        """
        self._carried(self._pretrained or self._fitted).save(Path(folder), data)

    def features(self, data: SplitDataset, *, reserved: float = _RESERVED) -> tuple[Features, Features]:
        """Fit, and return user and item vectors for a feature store.

        Args:
            data: The split with which they will be used. With ``kind: prefix``, training uses the interactions that
                occur only in histories, so that models with these features can use all training interactions;
                otherwise it uses the training interactions.
            reserved: Share of validation users for ensemble weights in the recipe that uses the features
                (``eval.fusion.reserved``). They are not used for early stopping, since a model with these features may
                be a member of an ensemble.
        """
        early, data = data.kind == "prefix", split_validation_users(data, reserved)[0]
        self.learn(replace(data, train=data.known, known=data.known.clear()) if early else data)
        model, config = self._fitted, self._config
        source = Provenance(
            system=self.name,
            split=data.readable,
            generator={"parameters": config.model_dump(mode="json"), "seed": self._seed},
            encoder={"name": config.encoder, "stamp": find_encoder(config.encoder)[1]},
            version=__version__,
        )
        users, items = list(model.known.user_index), list(model.known.item_index)
        pairs = zip(model.known.users.tolist(), model.known.items.tolist(), strict=True)
        of_users, of_items = defaultdict[str, set[Pair]](set), defaultdict[str, set[Pair]](set)
        for user, item in ((users[user], items[item]) for user, item in pairs):
            of_users[user].add((user, item))
            of_items[item].add((user, item))

        def features(side: Side, ids: list[str], of_ids: dict[str, set[Pair]]) -> Features:
            seen = {owner: frozenset(owned) for owner, owned in of_ids.items()}
            return Features(side, ids, model.vectors(side).numpy(), source, seen=seen)

        return features("user", users, of_users), features("item", items, of_items)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the weights and the projected tokens as arrays."""
        model = self._fitted
        return {"read": model.tokens.values.numpy(), "starts": model.tokens.starts, **network_state(model.network)}

    def restore(self, data: SplitDataset, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the fitted network from `state`."""
        torch = require("torch", "baselines")
        known, width = training_ratings(data, self.name), state["network.down.weight"].shape[1]
        reviews = Reviews.read(data, known, self._config.order)
        with torch.random.fork_rng(devices=[]):
            model = self._untrained(known, reviews, Tokens(torch.from_numpy(state["read"]), state["starts"]), width)
        load_network_state(model.network.double(), state)
        model.update_means()
        self._model = model
        self.looked_at = case_users(self._cases(data))

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the rating of the item in each request."""
        model = self._fitted
        values = iter(
            np.round(
                _predict_ratings(model, [entry for entry in requests if entry.item is not None]), _ANSWER_DIGITS
            ).tolist()
        )
        return rate_requests(requests, model.known.scale, lambda user, item, request: float(next(values)))

    def _cases(self, data: SplitDataset) -> list[Case]:
        return [] if self._config.patience is None else rating_cases(data, _EARLY_STOPPING_CASES)

    def _carried(self, model: ReviewModel) -> TransferableNetwork:
        """Return the transferable network."""
        shape = {"dim": self._config.dim, "width": model.network["down"].in_features}
        return TransferableNetwork(self.name, model.network, shape, _DOMAIN_WEIGHTS, self._config)

    def _untrained(self, known: Ratings, reviews: Reviews, tokens: Tokens, width: int) -> ReviewModel:
        """Return the network with random weights."""
        network = create_network(width, len(known.user_index), len(known.item_index), self._config)
        return ReviewModel(known, reviews, tokens, network, self._config, {})

    def _initial(self, data: SplitDataset, *, pairs: bool = True) -> ReviewModel:
        """Return the network before training on ratings, with transferred or pretrained weights."""
        config, known = self._config, training_ratings(data, self.name)
        reviews = Reviews.read(data, known, config.order)
        frozen = FrozenEncoder(config.encoder, data, config.tokens)
        tokens = frozen.states(*frozen.tokens(reviews.texts if pairs else ()))
        model = self._untrained(known, reviews, tokens, tokens.values.shape[1])
        if config.start is not None:
            self._carried(model).load(config.start, data)
        if config.pretrain:
            pretrain_encoders(model, frozen, self._seed)
        return model


def _train_epoch(model: ReviewModel, optimiser: Optimizer, rng: np.random.Generator) -> float:
    """Train for one epoch on the training ratings, and return the mean loss."""
    torch, known, total = require("torch", "baselines"), model.known, 0.0
    model.network.train()
    for part in shuffled_batches(len(known.values), model.config.batch, rng):
        targets = torch.from_numpy(((known.values[part] - known.mean) / model.spread).astype(np.float32))
        loss = torch.nn.functional.mse_loss(model.forward(known.users[part], known.items[part]), targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        total += float(loss.detach()) * len(part)
    return total / len(known.values)


def _predict_ratings(model: ReviewModel, requests: Sequence[Request]) -> NDArray[np.float64]:
    """Return the predicted ratings of requests before clipping, shape (n,)."""
    known = model.known
    users = np.array([known.user_index.get(request.user_id, -1) for request in requests], dtype=np.int64)
    items = np.array([known.item_index.get(str(request.item), -1) for request in requests], dtype=np.int64)
    return model.rate(users, items)


def _finalise_model(model: ReviewModel) -> ReviewModel:
    """Return the network in double precision, with projected tokens instead of frozen hidden states."""
    torch, states = require("torch", "baselines"), model.tokens.values
    model.network.eval()
    with torch.no_grad():
        parts = [project_states(model.network, part, 0.0) for part in states.split(_TOKEN_BATCH)]
    model.tokens = Tokens(torch.cat(parts), model.tokens.starts)
    model.network.double()
    model.update_means()
    return model
