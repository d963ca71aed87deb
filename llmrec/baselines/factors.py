"""Matrix factorisation of implicit feedback, through the package ``implicit``.

Training makes one vector an item. A user's vector comes from the history of the request, never from the user's id, so
that unknown users and events after training are served like any others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scipy import sparse

from llmrec.baselines.base import Catalogue, Log, Warm, fitted, pairs, rank_all, recent
from llmrec.errors import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Answer, Request

_WINDOW = 50


@dataclass(frozen=True)
class _Vectors:
    """Vectors of the warm items, shape (warm, factors), and the package's own model."""

    warm: Warm
    vectors: NDArray[np.float32]
    library: Any


class ALS:
    """Factorises the binary training matrix by weighted least squares (Hu et al., ICDM 2008).

    A training interaction has confidence ``alpha``, everything else 1. A user's vector is the least squares solution
    for the history under the trained item vectors (their equation 4), the same step that training makes.
    """

    name = "als"
    stochastic = True
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {"factors": (64, 128, 256), "alpha": (5.0, 20.0)}

    def __init__(
        self,
        *,
        factors: int = 128,
        regularization: float = 1.0,
        alpha: float = 10.0,
        iterations: int = 15,
        threads: int = 1,
        seed: int = 0,
    ) -> None:
        """Set up.

        Args:
            factors: Length of a vector.
            regularization: Ridge penalty of the vectors.
            alpha: Confidence of an interaction, above 1 for more than that of none.
            iterations: Rounds over users and items.
            threads: Threads of the solver; they do not change the result.
            seed: Seeds the first vectors.
        """
        self._factors, self._regularization, self._alpha = factors, regularization, alpha
        self._iterations, self._threads, self._seed = iterations, threads, seed
        self._model: _Vectors | None = None

    def fit(self, data: SplitDataset) -> None:
        """Alternate between users' and items' vectors.

        Raises:
            MissingExtra: If ``implicit`` is not installed.
        """
        warm, binary = _training(data)
        with _pinned():
            library = require("implicit.cpu.als", "baselines").AlternatingLeastSquares(
                factors=self._factors,
                regularization=self._regularization,
                alpha=self._alpha,
                iterations=self._iterations,
                num_threads=self._threads,
                random_state=self._seed,
            )
            library.fit(binary, show_progress=False)
        self._model = _Vectors(warm, np.asarray(library.item_factors), library)

    @property
    def items(self) -> tuple[str, ...]:
        """The catalogue in column order."""
        return fitted(self._model, self.name).warm.catalogue.ids

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the products of user and item vectors for every request, shape (n, items)."""
        model = fitted(self._model, self.name)
        histories = model.warm.histories(requests)
        have = sparse.csr_matrix(pairs(histories, len(model.vectors), np.float32))
        with _pinned():
            users = model.library.recalculate_user(np.arange(len(requests)), have)
        return model.warm.spread(users @ model.vectors.T, histories)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates, or the catalogue less the history; unknown items come last."""
        return rank_all(requests, fitted(self._model, self.name).warm.catalogue, self.scores)


class BPR:
    """Factorises by pairs: an item that a user had above one that the user had not (Rendle et al., UAI 2009).

    The method has no step that makes a vector from a history. Here it is the mean of the history's item vectors, the
    latest event weighing 1 and the one before ``decay``, and the item's bias, its popularity, is left out. On
    validation this ranks above the vectors that training learns for the same users.
    """

    name = "bpr"
    stochastic = True
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {"regularization": (0.0003, 0.001, 0.003), "decay": (0.8, 1.0)}

    def __init__(
        self,
        *,
        factors: int = 64,
        learning_rate: float = 0.05,
        regularization: float = 0.001,
        iterations: int = 100,
        decay: float = 0.8,
        threads: int = 1,
        seed: int = 0,
    ) -> None:
        """Set up.

        Args:
            factors: Length of a vector.
            learning_rate: Of stochastic gradient descent.
            regularization: Penalty of the vectors.
            iterations: Passes over the training interactions.
            decay: Factor from one event of the history to the one before.
            threads: Threads of training. With more than one the seed no longer fixes the result, since they write
                to the same vectors in any order.
            seed: Seeds the first vectors and the draws.
        """
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], not {decay}")
        self._factors, self._learning_rate, self._regularization = factors, learning_rate, regularization
        self._iterations, self._decay, self._threads, self._seed = iterations, decay, threads, seed
        self._model: _Vectors | None = None

    def fit(self, data: SplitDataset) -> None:
        """Draw pairs and follow the gradient.

        Raises:
            MissingExtra: If ``implicit`` is not installed.
        """
        warm, binary = _training(data)
        with _pinned():
            library = require("implicit.cpu.bpr", "baselines").BayesianPersonalizedRanking(
                factors=self._factors,
                learning_rate=self._learning_rate,
                regularization=self._regularization,
                iterations=self._iterations,
                num_threads=self._threads,
                random_state=self._seed,
            )
            library.fit(binary, show_progress=False)
        # The package keeps the bias in a last column.
        self._model = _Vectors(warm, np.ascontiguousarray(library.item_factors[:, :-1]), None)

    @property
    def items(self) -> tuple[str, ...]:
        """The catalogue in column order."""
        return fitted(self._model, self.name).warm.catalogue.ids

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the products of the histories' mean vectors and item vectors, shape (n, items)."""
        model = fitted(self._model, self.name)
        weights = recent(requests, model.warm.catalogue, _WINDOW, self._decay)[:, model.warm.places]
        whole = np.maximum(np.asarray(weights.sum(axis=1)).ravel(), 1e-12)
        users = (sparse.diags_array(1 / whole) @ weights) @ model.vectors
        return model.warm.spread(users @ model.vectors.T, model.warm.histories(requests))

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates, or the catalogue less the history; unknown items come last."""
        return rank_all(requests, fitted(self._model, self.name).warm.catalogue, self.scores)


def _training(data: SplitDataset) -> tuple[Warm, Any]:
    catalogue = Catalogue.of(data)
    log = Log.of(data, catalogue)
    warm = Warm.of(log, catalogue)
    return warm, sparse.csr_matrix(warm.log(log).binary(len(warm.places)).astype(np.float32))


@contextmanager
def _pinned() -> Iterator[None]:
    """Keep the linear algebra below the package on one thread: with several, sums depend on their number."""
    limits = require("threadpoolctl", "baselines").threadpool_limits
    with warnings.catch_warnings(), limits(1):
        # The package warns of a threaded BLAS, which is limited here.
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
