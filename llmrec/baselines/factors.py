"""Matrix factorisation of implicit feedback, through the package ``implicit``.

Training learns one vector per item. A user's vector is computed from the history of the request, not from the user's
id, so that new users and interactions after training need no special treatment.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field
from scipy import sparse

from llmrec.baselines.base import (
    DECAYS,
    AutoSetting,
    Catalogue,
    Decay,
    InteractionLog,
    PositiveFloat,
    ScoredBaseline,
    WarmItems,
    recency_weights,
    windowed_recency_weights,
)
from llmrec.errors import require
from llmrec.recipe.schema import Positive, Section

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Request

_HISTORY_LENGTH = 50


@dataclass(frozen=True)
class _FactorModel:
    """Vectors of the warm items, shape (warm, factors), and the fitted model of ``implicit``."""

    catalogue: Catalogue
    warm: WarmItems
    vectors: NDArray[np.float32]
    library: Any


C = TypeVar("C", bound=Section)


class _Factorisation(ScoredBaseline[C, _FactorModel]):
    """Base class of matrix factorisations, whose fitted state is one vector per item."""

    stochastic = True
    SCORES = "logits"
    FITS_ON = "train"

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the vectors of the warm items, shape (warm, factors)."""
        return {"vectors": self._fitted.vectors}

    def restore(self, data: SplitDataset, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the fitted vectors from `state`."""
        warm = WarmItems.in_training(data)
        self._model = _FactorModel(warm.catalogue, warm, state["vectors"], self._solver(state["vectors"]))

    def item_vectors(self) -> dict[str, NDArray[np.float32]]:
        """Return the vector of each item with training interactions, by item id, shape (factors,)."""
        model = self._fitted
        return {model.catalogue.ids[index]: model.vectors[row] for row, index in enumerate(model.warm.indices.tolist())}

    def _solver(self, vectors: NDArray[np.float32]) -> Any:
        """Return the model of ``implicit`` that computes user vectors; None if it is not needed."""
        return None


class ALSConfig(Section):
    """Parameters of `ALS`."""

    factors: Positive = Field(128, description="Number of dimensions.")
    regularization: float = Field(1.0, ge=0, description="L2 penalty.")
    alpha: PositiveFloat = Field(
        10.0, description="Confidence of an observed interaction. Unobserved items have confidence 1."
    )
    iterations: Positive = Field(15, description="Number of iterations.")
    user: Literal["mean", "solve"] = Field(
        "mean",
        description="User vector: the `mean` of the item vectors in the history, or a least-squares solution "
        "(`solve`).",
    )
    decay: Decay = Field(0.8, description="Decay of older history items: weight relative to the next newer one.")
    threads: int = Field(1, ge=0, description="Number of threads. 0: all cores. Does not change the result.")


class ALS(_Factorisation[ALSConfig]):
    """ALS: factorises the binary user-item matrix by weighted least squares (Hu et al., ICDM 2008).

    A training interaction has confidence ``alpha``, everything else 1. With ``user=solve`` a user's vector is the least
    squares solution for the history with fixed item vectors (their equation 4), as in training, with confidence
    ``alpha * decay**a`` for an item of age a. With ``user=mean`` it is the mean of the history's item vectors with
    weights ``decay**a``.
    """

    name = "als"
    Config = ALSConfig
    AUTO = (AutoSetting(14), AutoSetting(15, "whole history", {"decay": 1.0}))
    GRID: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "factors": (4, 8, 16, 32, 64, 128, 256, 512),
        "alpha": (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0),
        "regularization": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        "user": ("mean", "solve"),
        "decay": DECAYS,
    }
    AT_ANSWER: ClassVar[frozenset[str]] = frozenset({"user", "decay"})

    def learn(self, data: SplitDataset) -> None:
        """Fit user and item vectors by alternating least squares.

        Raises:
            MissingExtra: If ``implicit`` is not installed.
        """
        warm, binary = _training_matrix(data)
        with _single_blas_thread():
            library = self._create_solver()
            library.fit(binary, show_progress=False)
        self._model = _FactorModel(warm.catalogue, warm, np.asarray(library.item_factors), library)

    def _create_solver(self) -> Any:
        return require("implicit.cpu.als", "baselines").AlternatingLeastSquares(
            factors=self._config.factors,
            regularization=self._config.regularization,
            alpha=self._config.alpha,
            iterations=self._config.iterations,
            num_threads=self._config.threads,
            random_state=self._seed,
        )

    def _solver(self, vectors: NDArray[np.float32]) -> Any:
        library = self._create_solver()
        library.item_factors = vectors
        return library

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the dot products of user and item vectors, shape (n, items)."""
        model = self._fitted
        histories = model.warm.histories(requests)
        weights = recency_weights(histories, len(model.vectors), self._config.decay, np.float32)
        if self._config.user == "mean":
            users = _weighted_means(weights, model.vectors)
        else:
            with _single_blas_thread():
                users = model.library.recalculate_user(np.arange(len(requests)), sparse.csr_matrix(weights))
        return model.warm.spread(users @ model.vectors.T, histories)


class BPRConfig(Section):
    """Parameters of `BPR`."""

    factors: Positive = Field(64, description="Number of dimensions.")
    learning_rate: PositiveFloat = Field(0.05, description="Learning rate of SGD.")
    regularization: float = Field(0.001, ge=0, description="L2 penalty.")
    iterations: Positive = Field(100, description="Number of epochs.")
    decay: Decay = Field(0.8, description="Decay of older interactions: weight relative to the next newer one.")
    threads: int = Field(
        1,
        ge=0,
        description="Number of threads. 0: all cores. With several threads, the result is not reproducible.",
    )


class BPR(_Factorisation[BPRConfig]):
    """BPR: matrix factorisation with a pairwise ranking loss (Rendle et al., UAI 2009).

    The paper does not define a user vector for a history. Here it is the weighted mean of the history's item vectors,
    with weight 1 for the latest interaction and ``decay`` for the previous one. The item bias is left out. On
    validation this is better than the user vectors learned in training.
    """

    name = "bpr"
    Config = BPRConfig
    AUTO = (AutoSetting(16),)
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "regularization": (0.0, 0.000001, 0.000003, 0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01),
        "decay": DECAYS,
    }
    AT_ANSWER: ClassVar[frozenset[str]] = frozenset({"decay"})

    def learn(self, data: SplitDataset) -> None:
        """Train on sampled pairs by stochastic gradient descent.

        Raises:
            MissingExtra: If ``implicit`` is not installed.
        """
        warm, binary = _training_matrix(data)
        with _single_blas_thread():
            library = require("implicit.cpu.bpr", "baselines").BayesianPersonalizedRanking(
                factors=self._config.factors,
                learning_rate=self._config.learning_rate,
                regularization=self._config.regularization,
                iterations=self._config.iterations,
                num_threads=self._config.threads,
                random_state=self._seed,
            )
            library.fit(binary, show_progress=False)
        # The package stores the bias in the last column.
        self._model = _FactorModel(warm.catalogue, warm, np.ascontiguousarray(library.item_factors[:, :-1]), None)

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the dot products of mean history vectors and item vectors, shape (n, items)."""
        model = self._fitted
        weights = windowed_recency_weights(requests, model.warm.catalogue, _HISTORY_LENGTH, self._config.decay)[
            :, model.warm.indices
        ]
        users = _weighted_means(weights, model.vectors)
        return model.warm.spread(users @ model.vectors.T, model.warm.histories(requests))


def _weighted_means(weights: Any, vectors: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
    """Return weighted means of vectors, shape (b, factors); 0 if all weights are 0."""
    totals = np.maximum(np.asarray(weights.sum(axis=1)).ravel(), 1e-12)
    means: NDArray[np.floating[Any]] = (sparse.diags_array(1 / totals) @ weights) @ vectors
    return means


def _training_matrix(data: SplitDataset) -> tuple[WarmItems, Any]:
    catalogue = Catalogue.of(data)
    log = InteractionLog.of(data, catalogue)
    warm = WarmItems.of(log, catalogue)
    return warm, sparse.csr_matrix(warm.log(log).binary(len(warm.indices)).astype(np.float32))


@contextmanager
def _single_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread, because sums depend on the number of threads."""
    limits = require("threadpoolctl", "baselines").threadpool_limits
    with warnings.catch_warnings(), limits(1):
        # The package warns about a multithreaded BLAS, which is limited here.
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
