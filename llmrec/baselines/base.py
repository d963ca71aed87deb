"""Base classes of baselines: configuration, fitted state, item indices, and conversion of scores to rankings."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
from pydantic import Field, ValidationError
from pydantic_core import PydanticUndefined
from scipy import sparse

import llmrec
from llmrec.data.read.codes import map_ids_to_indices, values_and_codes
from llmrec.data.split import SplitDataset
from llmrec.durable import Json
from llmrec.errors import DataError, ErrorKind, RecipeError, did_you_mean
from llmrec.recipe.schema import Section
from llmrec.results import Reads
from llmrec.types import Answer, Ranking, Request, Unparsed

if TYPE_CHECKING:
    from numpy.typing import NDArray

LSA = "lsa"
"""Name of latent semantic analysis of the texts, used instead of a text encoder."""

MAX_RANKED_ITEMS = 100
"""Maximum number of items returned by full ranking."""

# Number of scores per block: 32 MB of float64.
_BLOCK_SCORES = 1 << 22
# Number of transitions per block, and the largest number that is summed in double precision.
_BLOCK_TRANSITIONS, _MAX_DOUBLE_TRANSITIONS = 1 << 24, 1 << 26
# Popularity changes a score by at most this share of the smallest score of the request.
_TIE_BREAK_SHARE = 2.0**-20

DECAYS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
"""Decay factors of a history that tuning tries: from almost only the last interaction to equal weights."""

Decay = Annotated[float, Field(gt=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


@runtime_checkable
class Trainable(Protocol):
    """A predictor that learns from training interactions."""

    def fit(self, data: SplitDataset) -> object:
        """Learn from the training interactions of ``data`` only."""
        ...


class NoParameters(Section):
    """The configuration of a baseline without parameters."""


class _HasCatalogue(Protocol):
    @property
    def catalogue(self) -> Catalogue: ...


C = TypeVar("C", bound=Section)
M = TypeVar("M")
S = TypeVar("S", bound=_HasCatalogue)


@dataclass(frozen=True)
class AutoSetting:
    """Hyperparameters of a baseline that `llmrec auto` tries.

    Attributes:
        cost: Position in the order of all settings, fastest first.
        label: Name of the setting, if the baseline has several.
        fixed: Parameters that are not tuned.
        items: Maximum number of items of the catalogue; None: unlimited.
        seconds: Minimum time budget.
    """

    cost: int
    label: str = ""
    fixed: Mapping[str, Json] = field(default_factory=dict)
    items: int | None = None
    seconds: float = 0.0


def validated_config(config_class: type[C], name: str, parameters: Mapping[str, Any], where: str) -> C:
    """Return the validated configuration of a baseline.

    Args:
        config_class: The class of the configuration.
        name: The name of the baseline.
        parameters: Parameters by name; missing ones have their defaults.
        where: The key or class that takes them, for the error message.

    Raises:
        RecipeError: If a parameter is unknown, or a value is out of bounds.
    """
    known = list(config_class.model_fields)
    try:
        return config_class.model_validate(parameters)
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            message = str(detail["msg"]).removeprefix("Value error, ")
            if detail["type"] == "extra_forbidden":
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                problems.append(f"{name!r} has no parameter {key!r}{did_you_mean(key, known)}; {takes}")
            elif key:
                problems.append(f"{key} of {name!r}: {message[:1].lower()}{message[1:]}, got {detail['input']!r}")
            else:
                problems.append(f"{name!r}: {message}")
        unknown = error.errors()[0]["type"] == "extra_forbidden"
        kind: ErrorKind = "unknown-key" if unknown else "bad-value"
        raise RecipeError(f"{where}: {'; '.join(problems)}", kind=kind, column=where.rpartition(": ")[2]) from None


def _signature_parameters(config: type[Section]) -> list[Parameter]:
    """Return the parameters of a configuration, and the seed, for a function signature."""
    known: dict[str, tuple[Any, Any]] = {
        name: (entry.annotation, entry.get_default(call_default_factory=True))
        for name, entry in config.model_fields.items()
    }
    known["seed"] = (int, 0)
    return [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if default is PydanticUndefined else default,
            annotation=kind,
        )
        for name, (kind, default) in known.items()
    ]


class Baseline(Generic[C, M]):
    """Base class of baselines; subclasses implement ``learn`` and ``answer``.

    A baseline is used like an estimator of scikit-learn: parameters are keywords of the constructor, ``fit`` takes a
    frame, and `sklearn.base.clone` copies it without its fitted state::

        model = ItemKNN(history=5).fit(interactions)
        model.recommend(["u1", "u2"], k=10)

    Attributes:
        name: Name in recipes and tables.
        stochastic: Whether results depend on the seed.
        GRID: Values by parameter that `llmrec.baselines.tune.tune` tries: numbers ascending, including the default.
        READS: How items are represented: by interactions alone; also by texts, through an encoder that is not trained
            on these data or through word counts; or by a language model whose pretrained weights it fine-tunes.
        SCORES: The scale of a ranker's scores in an ensemble: ``counts``, at least 0, compared by ratio; or ``logits``,
            compared by difference.
        FITS: The maximum number of settings that tuning fits; None: unlimited.
        AT_ANSWER: Parameters that ``answer`` reads and ``learn`` does not; see `with_config`.
        AUTO: Hyperparameter settings that `llmrec auto` tries, by cost.
        FITS_ON: The part of a split that ``learn`` reads: training only, or also validation, for early stopping.
        looked_at: Users whose validation interactions were used to choose an epoch or a parameter; they are not used
            for its ensemble weight.
        recalled: The original duration of the fit in seconds if a stored fit was restored; else 0.
        Config: The parameters with their defaults and bounds.
    """

    name: str
    stochastic: ClassVar[bool] = False
    GRID: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    READS: ClassVar[Reads] = "events"
    SCORES: ClassVar[Literal["counts", "logits"]] = "counts"
    AUTO: ClassVar[tuple[AutoSetting, ...]] = ()
    FITS: ClassVar[int | None] = None
    AT_ANSWER: ClassVar[frozenset[str]] = frozenset()
    FITS_ON: ClassVar[Literal["train", "train and valid"]] = "train and valid"
    Config: type[C]
    looked_at: frozenset[str] = frozenset()
    recalled: float = 0.0

    _recommender: Any = None

    def __init__(self, config: C | None = None, *, seed: int = 0, **parameters: Any) -> None:
        """Create an unfitted baseline.

        Args:
            config: All parameters, validated; None: those given by name.
            seed: The random seed.
            parameters: Parameters of `Config` by name; the others have their defaults.

        Raises:
            RecipeError: If a parameter is unknown, or a value is out of bounds.
        """
        self._config: C = config or validated_config(self.Config, self.name, parameters, type(self).__name__)
        self._seed = seed
        self._model: M | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Give the constructor a signature with the fields of `Config`, for completion and `help`."""
        super().__init_subclass__(**keywords)
        if isinstance(config := vars(cls).get("Config"), type):
            cls.__signature__ = Signature(_signature_parameters(config))  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        defaults = {parameter.name: parameter.default for parameter in _signature_parameters(type(self._config))}
        changed = [f"{name}={value!r}" for name, value in self.get_params().items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(changed)})"

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters and the seed by name; ``deep`` has no effect."""
        return {**dict(self._config), "seed": self._seed}

    def set_params(self, **parameters: Any) -> Self:
        """Set parameters for the next ``fit``.

        Raises:
            RecipeError: If a parameter is unknown, or a value is out of bounds.
        """
        known = {**self.get_params(), **parameters}
        self._seed = known.pop("seed")
        self._config = validated_config(self.Config, self.name, known, type(self).__name__)
        return self

    def fit(self, interactions: Any, items: Any = None, **columns: Any) -> Self:
        """Fit the baseline to interactions, and return it.

        Args:
            interactions: A frame or the path of a table, as `llmrec.fit` takes it; or a `SplitDataset`, of which only
                the training interactions are learned.
            items: A frame or the path of a table with one row per item.
            columns: Names of columns, such as ``user="customer"``; see `llmrec.fit`.
        """
        if isinstance(interactions, SplitDataset):
            self.learn(interactions)
        else:
            self._recommender = llmrec.fit(interactions, items, model=self, **columns)
        return self

    def learn(self, data: SplitDataset) -> None:
        """Fit the baseline to the training interactions of a split."""
        raise NotImplementedError

    @property
    def recommender(self) -> Any:
        """A recommender on the interactions of ``fit``, which ranks, rates, explains and evaluates.

        Raises:
            DataError: If ``fit`` was not called with a frame or a table.
        """
        if self._recommender is None:
            raise DataError(
                f"{self!r} is not fitted; call fit(interactions) with a frame or a table", kind="missing-value"
            )
        return self._recommender

    def recommend(self, users: Any = None, k: int = 10, **options: Any) -> Any:
        """Return the best items for users or histories, like the method of `recommender`."""
        return self.recommender.recommend(users, k, **options)

    @property
    def config(self) -> C:
        """The configuration of the baseline."""
        return self._config

    @classmethod
    def reads(cls, config: C) -> Reads:
        """Return which item data the baseline reads (interactions, texts, or a language model)."""
        return cls.READS

    @classmethod
    def text_encoder(cls, parameters: Mapping[str, Any]) -> str | None:
        """Return the text encoder or feature store in the parameters; None without one."""
        name = parameters.get("encoder")
        return None if name is None or name == LSA else str(name)

    def with_config(self, config: C) -> Self:
        """Return a copy that has another configuration and the same fitted state.

        Raises:
            RecipeError: If a parameter outside `AT_ANSWER` differs, which requires another fit.
        """
        before, after = self._config.model_dump(), config.model_dump()
        fixed = [key for key in after if after[key] != before[key] and key not in self.AT_ANSWER]
        if fixed:
            known = ", ".join(sorted(self.AT_ANSWER)) or "none"
            raise RecipeError(
                f"the baseline {self.name!r} was fitted with {', '.join(f'{key}={before[key]!r}' for key in fixed)}; "
                f"after fitting only these parameters can change: {known}. Fit it again with the new values",
                kind="contradiction",
                column=fixed[0],
            )
        other = copy.copy(self)
        other._config = config
        return other

    @property
    def _fitted(self) -> M:
        """The fitted state; raises an error before ``fit``.

        Raises:
            RuntimeError: If ``fit`` was not called.
        """
        if self._model is None:
            raise RuntimeError(f"the baseline {self.name!r} is not fitted; call fit() first")
        return self._model


class ScoredBaseline(Baseline[C, S]):
    """A baseline that scores all items; subclasses implement ``learn`` and ``scores``."""

    @property
    def items(self) -> tuple[str, ...]:
        """Ids of all items, in column order."""
        return self._fitted.catalogue.ids

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return a score for every request and item, shape (n, items)."""
        raise NotImplementedError

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates, or the catalogue without the history; unknown items come last."""
        catalogue, answers = self._fitted.catalogue, list[Answer]()
        # In blocks of requests, whose scores fit in memory.
        block = max(1, _BLOCK_SCORES // max(1, len(catalogue.ids)))
        for start in range(0, len(requests), block):
            part = requests[start : start + block]
            answers += [
                _rank_request(one, catalogue, scores) for one, scores in zip(part, self.scores(part), strict=True)
            ]
        return answers


@dataclass(frozen=True)
class Catalogue:
    """All items of the data set, sorted by id, so that their indices do not depend on the order of the data."""

    ids: tuple[str, ...]
    index: Mapping[str, int]

    @staticmethod
    def of(data: SplitDataset) -> Catalogue:
        """Return the catalogue of a data set."""
        ids = tuple(sorted(data.dataset.items))
        return Catalogue(ids=ids, index={item: index for index, item in enumerate(ids)})

    def indices(self, items: Iterable[str]) -> NDArray[np.int64]:
        """Return the index of each item, -1 for an unknown one."""
        return np.array([self.index.get(item, -1) for item in items], dtype=np.int64)

    def history(self, request: Request) -> NDArray[np.int64]:
        """Return the item indices of a request's history, oldest first; unknown items are left out."""
        result = self.indices(event.item_id for event in request.history)
        return result[result >= 0]


@dataclass(frozen=True)
class InteractionLog:
    """Training interactions as indices, grouped by user, oldest first.

    Attributes:
        users: User index of each row; users are indexed in sorted order.
        items: Item index of each row.
        times: Timestamp of each row; NaN if it has none.
        user_count: Number of users.
    """

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    times: NDArray[np.float64]
    user_count: int

    @staticmethod
    def of(data: SplitDataset, catalogue: Catalogue) -> InteractionLog:
        """Return the training interactions of a split as indices."""
        _, user_codes = values_and_codes(data.train["user_id"])
        present = np.bincount(user_codes) > 0
        users = (np.cumsum(present) - 1).astype(np.int32)[user_codes]
        items = map_ids_to_indices(data.train["item_id"], catalogue.indices)
        times = data.train["timestamp"].to_numpy().astype(np.float64, copy=False)
        if (users[1:] < users[:-1]).any():
            order = np.argsort(users, kind="stable")
            users, items, times = users[order], items[order], times[order]
        return InteractionLog(users=users, items=items, times=times, user_count=int(present.sum()))

    def matrix(self, columns: int) -> Any:
        """Return how often each user interacted with each item, sparse, shape (users, columns)."""
        ends = np.concatenate([[0], np.cumsum(np.bincount(self.users, minlength=self.user_count))])
        shape = (self.user_count, columns)
        # The indices are copied, since the matrix sorts them in place.
        result = sparse.csr_array((np.ones(len(self.items)), self.items.copy(), ends.astype(np.int32)), shape=shape)
        result.sum_duplicates()
        return result

    def steps(self, gap: int, size: int, weight: float = 1.0) -> Any:
        """Return weighted counts of item j following item i at a given distance, sparse, shape (items, items)."""
        pairs = max(0, len(self.items) - gap)
        # Single precision suffices for a hundred million transitions, and reduces memory by a third.
        kind = np.float64 if pairs <= _MAX_DOUBLE_TRANSITIONS else np.float32
        total = sparse.csr_array((size, size), dtype=kind)
        # In blocks, because index pairs of all transitions would take several times the memory of their sums.
        for start in range(0, max(1, pairs), _BLOCK_TRANSITIONS):
            part, after = (
                slice(start + offset, min(start + _BLOCK_TRANSITIONS, pairs) + offset) for offset in (0, gap)
            )
            same = self.users[after] == self.users[part]
            coords = self.items[part][same], self.items[after][same]
            result = sparse.csr_array((np.full(len(coords[0]), weight, dtype=kind), coords), shape=(size, size))
            result.sum_duplicates()
            total = total + result if start else result
        return total

    def binary(self, columns: int) -> Any:
        """Return a binary matrix of the items that each user interacted with, sparse, shape (users, columns)."""
        result = self.matrix(columns)
        result.data[:] = 1.0
        return result


def item_counts(log: InteractionLog, catalogue: Catalogue) -> NDArray[np.float64]:
    """Return the number of training interactions of each item, shape (items,)."""
    return np.bincount(log.items, minlength=len(catalogue.ids)).astype(np.float64)


def break_ties_by_popularity(scores: NDArray[np.float64], popular: NDArray[np.float64]) -> NDArray[np.float64]:
    """Break ties by popularity, both among items without a score and among items with equal scores.

    The amount added to an item is below a millionth of the smallest score of the request, so that an item without a
    score ranks below every item with one, regardless of its popularity.

    Args:
        scores: Non-negative scores, shape (b, items).
        popular: Number of training interactions of each item, shape (items,).
    """
    least = np.min(scores, axis=1, keepdims=True, where=scores > 0, initial=np.inf)
    least[np.isinf(least)] = 1.0
    total: NDArray[np.float64] = scores + _TIE_BREAK_SHARE * least * (popular / popular.max(initial=1.0))
    return total


@dataclass(frozen=True)
class WarmItems:
    """The items with training interactions; embeddings and weights can be learned only for these.

    Attributes:
        catalogue: The full catalogue.
        indices: Catalogue index of each warm item, ascending, shape (warm,).
        column: Warm index of each catalogue item, -1 for a cold-start item, shape (items,).
        popular: Training interactions of each warm item, divided by the maximum, shape (warm,).
    """

    catalogue: Catalogue
    indices: NDArray[np.int64]
    column: NDArray[np.int64]
    popular: NDArray[np.float64]

    @staticmethod
    def of(log: InteractionLog, catalogue: Catalogue) -> WarmItems:
        """Return the items that have training interactions."""
        freq = item_counts(log, catalogue)
        indices = np.flatnonzero(freq)
        column = np.full(len(catalogue.ids), -1, dtype=np.int64)
        column[indices] = np.arange(len(indices))
        return WarmItems(
            catalogue=catalogue, indices=indices, column=column, popular=freq[indices] / freq.max(initial=1.0)
        )

    @staticmethod
    def in_training(data: SplitDataset) -> WarmItems:
        """Return the items of a split that have training interactions."""
        catalogue = Catalogue.of(data)
        return WarmItems.of(InteractionLog.of(data, catalogue), catalogue)

    def log(self, log: InteractionLog) -> InteractionLog:
        """Return the same interactions with indices of warm items."""
        return InteractionLog(
            users=log.users, items=self.column[log.items].astype(np.int32), times=log.times, user_count=log.user_count
        )

    def histories(self, requests: Sequence[Request]) -> list[NDArray[np.int64]]:
        """Return the warm items of each history, oldest first."""
        rows = [self.column[self.catalogue.history(request)] for request in requests]
        return [row[row >= 0] for row in rows]

    def spread(
        self, scores: NDArray[np.floating[Any]], histories: Sequence[NDArray[np.int64]]
    ) -> NDArray[np.floating[Any]]:
        """Return scores of all items, with cold-start items lowest.

        Args:
            scores: Scores of the warm items, shape (b, warm).
            histories: The result of `histories`.
        """
        scores[[index for index, history in enumerate(histories) if not len(history)]] = self.popular
        lowest = scores.min(axis=1, keepdims=True) if len(self.indices) else np.zeros((len(scores), 1), scores.dtype)
        result = np.repeat(lowest - 1, len(self.catalogue.ids), axis=1)
        result[:, self.indices] = scores
        return result


def recency_weights(
    histories: Sequence[NDArray[np.int64]], columns: int, decay: float, dtype: type = np.float64
) -> Any:
    """Weight the items of each history by ``decay**age``; a repeated item counts at its last position.

    Args:
        histories: The result of `WarmItems.histories`.
        columns: Number of items.
        decay: Factor from one item to the previous one; 1: equal weights.
        dtype: The type of the weights.

    Returns:
        Sparse matrix of shape (b, columns).
    """
    # Reversed, so that the first position of an item is its latest one.
    latest = [np.unique(history[::-1], return_index=True) for history in histories]
    items = np.concatenate([np.empty(0, dtype=np.int64), *(unique for unique, _ in latest)])
    ages = np.concatenate([np.empty(0, dtype=np.int64), *(ages for _, ages in latest)])
    ends = np.cumsum([0, *(len(unique) for unique, _ in latest)])
    return sparse.csr_array(
        ((decay ** ages.astype(np.float64)).astype(dtype), items, ends), shape=(len(latest), columns)
    )


def windowed_recency_weights(requests: Sequence[Request], catalogue: Catalogue, window: int, decay: float) -> Any:
    """Weight the last interactions of each history: the latest by 1, the previous one by ``decay``, and so on.

    Args:
        requests: Requests with histories, oldest first.
        catalogue: The item indices.
        window: Number of latest interactions; one with an unknown item has a position but no weight.
        decay: Factor from one interaction to the previous one.

    Returns:
        Sparse matrix of shape (requests, items); an item that occurs twice has the sum of its weights.
    """
    latest = [[event.item_id for event in reversed(request.history[-window:])] for request in requests]
    indices = catalogue.indices(item for items in latest for item in items)
    lengths = np.array([len(items) for items in latest], dtype=np.int64)
    ages = np.arange(len(indices)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows, known = np.repeat(np.arange(len(requests)), lengths), indices >= 0
    return sparse.csr_array(
        (decay ** ages[known].astype(np.float64), (rows[known], indices[known])),
        shape=(len(requests), len(catalogue.ids)),
    )


def rank_by_score(request: Request, items: Sequence[str], scores: NDArray[np.floating[Any]]) -> Ranking:
    """Return all items sorted by score, best first, ties by id."""
    values = scores.tolist()
    order = sorted(range(len(items)), key=lambda index: (-values[index], items[index]))
    return Ranking(
        request_id=request.id,
        items=tuple(items[index] for index in order),
        scores=tuple(values[index] for index in order),
    )


def invalid_candidates_answer(request: Request) -> Unparsed | None:
    """Return the reason why a request cannot be ranked, or None if it can."""
    if request.candidates is None:
        return None
    if not request.candidates:
        return Unparsed(request_id=request.id, reason="the request has no candidates")
    if len(set(request.candidates)) != len(request.candidates):
        return Unparsed(request_id=request.id, reason="the request has a duplicate candidate")
    return None


def unseen_items(request: Request, catalogue: Catalogue) -> NDArray[np.int64]:
    """Return the indices of all items that are not in the history of the request."""
    keep = np.ones(len(catalogue.ids), dtype=bool)
    keep[catalogue.history(request)] = False
    return np.flatnonzero(keep)


def top_ranking(
    request: Request, catalogue: Catalogue, indices: NDArray[np.int64], scores: NDArray[np.floating[Any]]
) -> Ranking:
    """Return the `MAX_RANKED_ITEMS` highest-scoring items, and further items with the same score as the last one.

    Truncating a tied block would decide at random, or by id, whether the target is in the list.
    """
    if len(indices) > MAX_RANKED_ITEMS:
        border = np.partition(scores, len(scores) - MAX_RANKED_ITEMS)[len(scores) - MAX_RANKED_ITEMS]
        kept = scores >= border
        indices, scores = indices[kept], scores[kept]
    # Indices follow ids, so a stable sort by score breaks ties by id.
    order = np.argsort(-scores, kind="stable")
    return Ranking(
        request_id=request.id,
        items=tuple(map(catalogue.ids.__getitem__, indices[order].tolist())),
        scores=tuple(scores[order].tolist()),
    )


def _rank_request(request: Request, catalogue: Catalogue, scores: NDArray[np.floating[Any]]) -> Answer:
    if (refused := invalid_candidates_answer(request)) is not None:
        return refused
    if request.candidates is None:
        indices = unseen_items(request, catalogue)
        return top_ranking(request, catalogue, indices, scores[indices])
    indices = catalogue.indices(request.candidates)
    # Unknown candidates get 0, the score of items without evidence, or rank last if known scores are below 0.
    lowest = scores.min(initial=0.0)
    return rank_by_score(request, request.candidates, np.where(indices >= 0, scores[indices], lowest - (lowest < 0)))
