"""Matrix factorisation of ratings with biases, by alternating least squares or gradient descent.

The bias of an unknown item is 0, that of an unknown user is computed from the ratings in the request's history. The
model's errors on the latest ratings of the history are added with decaying weights (`rated.rate_with_recency`), and
every prediction is clipped to the rating scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field
from scipy import sparse

from llmrec.baselines.base import DECAYS, Baseline, PositiveFloat
from llmrec.baselines.rated import (
    RECENCIES,
    Ratings,
    RecencyConfig,
    fold_in_user_bias,
    rate_with_recency,
    ridge_biases,
    training_ratings,
)
from llmrec.recipe.schema import Positive

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.baselines.rated import OfItems
    from llmrec.data.split import SplitDataset
    from llmrec.types import Answer, Request


@dataclass(frozen=True)
class _Factors:
    """Biases and vectors: shapes (users,), (items,), (users, k) and (items, k)."""

    known: Ratings
    user_bias: NDArray[np.float64]
    item_bias: NDArray[np.float64]
    users: NDArray[np.float64]
    items: NDArray[np.float64]

    def answer(self, requests: Sequence[Request], user_penalty: float, config: RecencyConfig) -> list[Answer]:
        known = self.known

        def of_item(item: str) -> float:
            index = known.item_index.get(item)
            return 0.0 if index is None else float(self.item_bias[index])

        def of_user(request: Request) -> OfItems:
            row = known.user_index.get(request.user_id)
            if row is None:
                bias = fold_in_user_bias(request, known.mean, of_item, user_penalty)
                level, vector = known.mean + bias, np.zeros(self.items.shape[1])
            else:
                level, vector = known.mean + float(self.user_bias[row]), self.users[row]

            def of_items(items: Sequence[str]) -> NDArray[np.float64]:
                indices = np.array([known.item_index.get(item, -1) for item in items])
                result = self.item_bias[indices] + self.items[indices] @ vector
                return np.asarray(level + np.where(indices >= 0, result, 0.0), dtype=np.float64)

            return of_items

        return rate_with_recency(requests, known.scale, of_user, config)


class MFConfig(RecencyConfig):
    """Parameters of `MF`."""

    factors: Positive = Field(10, description="Number of dimensions.")
    penalty: PositiveFloat = Field(0.1, description="L2 penalty of user and item vectors, per rating.")
    user_penalty: PositiveFloat = Field(5.0, description="L2 penalty of user biases.")
    item_penalty: PositiveFloat = Field(3.0, description="L2 penalty of item biases.")
    rounds: Positive = Field(20, description="Number of alternating iterations.")


class MF(Baseline[MFConfig, _Factors]):
    """Predicts ``mean + b_user + b_item + p_user . q_item`` (Koren et al., IEEE Computer 2009, equation 4).

    Alternating least squares: with the items fixed, each user's bias and vector solve a ridge problem together, and
    vice versa (Zhou et al., AAIM 2008; the penalty of a vector grows with the number of its ratings).
    """

    name = "mf"
    stochastic = True
    Config = MFConfig
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "factors": (1, 2, 3, 5, 10, 20, 50),
        "penalty": (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
        "recency": RECENCIES,
        "decay": DECAYS,
    }
    AT_ANSWER: ClassVar[frozenset[str]] = frozenset({"recency", "decay"})

    def learn(self, data: SplitDataset) -> None:
        """Fit biases and vectors by alternating least squares.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        known, config = training_ratings(data, self.name), self._config
        user_bias, item_bias = ridge_biases(known, config.user_penalty, config.item_penalty)
        items = np.random.default_rng(self._seed).normal(0, 0.1, (len(known.item_index), config.factors))
        users = np.zeros((len(known.user_index), config.factors))
        by_user, by_item = np.argsort(known.users, kind="stable"), np.argsort(known.items, kind="stable")
        residual = known.values - known.mean
        penalty = config.penalty
        for _ in range(config.rounds):
            target = residual - item_bias[known.items]
            user_bias, users = _solve_ridge(
                known.users, items[known.items], target, by_user, config.user_penalty, penalty
            )
            target = residual - user_bias[known.users]
            item_bias, items = _solve_ridge(
                known.items, users[known.users], target, by_item, config.item_penalty, penalty
            )
        self._model = _Factors(known, user_bias, item_bias, users, items)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the rating of the item in each request."""
        return self._fitted.answer(requests, self._config.user_penalty, self._config)


class SVDConfig(RecencyConfig):
    """Parameters of `SVD`."""

    factors: Positive = Field(50, description="Number of dimensions.")
    penalty: PositiveFloat = Field(0.1, description="L2 penalty of biases and vectors.")
    learning_rate: PositiveFloat = Field(0.01, description="Learning rate.")
    epochs: Positive = Field(40, description="Number of epochs.")
    batch: Positive = Field(500, description="Ratings per step.")
    user_penalty: PositiveFloat = Field(5.0, description="L2 penalty of the bias of users without training ratings.")


class SVD(Baseline[SVDConfig, _Factors]):
    """The model of `MF`, trained by mini-batch stochastic gradient descent (Funk, 2006).

    Gradients are summed over a batch for each user and item.
    """

    name = "svd"
    stochastic = True
    Config = SVDConfig
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "factors": (5, 10, 20, 50, 100, 200),
        "penalty": (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3),
        "epochs": (10, 20, 30, 40, 60, 80, 120),
        "recency": RECENCIES,
        "decay": DECAYS,
    }
    AT_ANSWER: ClassVar[frozenset[str]] = frozenset({"recency", "decay"})

    def learn(self, data: SplitDataset) -> None:
        """Train biases and vectors by stochastic gradient descent.

        Raises:
            DataError: If the training interactions carry no ratings.
        """
        known, config = training_ratings(data, self.name), self._config
        rng = np.random.default_rng(self._seed)
        # A column of ones for each bias makes one dot product include biases and vectors.
        size, sides = config.factors, []
        for count, bias, one in ((len(known.user_index), 0, 1), (len(known.item_index), 1, 0)):
            side = rng.normal(0, 0.1, (count, size + 2))
            side[:, bias], side[:, one] = 0.0, 1.0
            sides.append(side)
        users, items = sides
        residual = known.values - known.mean
        for _ in range(config.epochs):
            order = rng.permutation(len(residual))
            for start in range(0, len(order), config.batch):
                rows = order[start : start + config.batch]
                user_rows, item_rows = known.users[rows], known.items[rows]
                user_vectors, item_vectors = users[user_rows], items[item_rows]
                error = (residual[rows] - np.einsum("nk,nk->n", user_vectors, item_vectors))[:, None]
                _apply_gradients(
                    users, user_rows, error * item_vectors - config.penalty * user_vectors, 1, config.learning_rate
                )
                _apply_gradients(
                    items, item_rows, error * user_vectors - config.penalty * item_vectors, 0, config.learning_rate
                )
        self._model = _Factors(known, users[:, 0], items[:, 1], users[:, 2:], items[:, 2:])

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the rating of the item in each request."""
        return self._fitted.answer(requests, self._config.user_penalty, self._config)


def _apply_gradients(
    table: NDArray[np.float64], rows: NDArray[np.int64], slope: NDArray[np.float64], ones: int, learning_rate: float
) -> None:
    """Update the rows of a table by the gradients of a batch, except the column of ones."""
    slope[:, ones] = 0.0
    present, positions = np.unique(rows, return_inverse=True)
    sums = sparse.csr_array((np.ones(len(rows)), (positions, np.arange(len(rows)))), shape=(len(present), len(rows)))
    table[present] += learning_rate * (sums @ slope)


def _solve_ridge(
    owners: NDArray[np.int64],
    others: NDArray[np.float64],
    targets: NDArray[np.float64],
    order: NDArray[np.int64],
    bias_penalty: float,
    penalty: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ridge solution for the bias and vector of each user (or item).

    Args:
        owners: Owner of each rating, shape (n,); every owner has at least one.
        others: Vector of the other side of each rating, shape (n, k).
        targets: Target of the sum of bias and product, shape (n,).
        order: Sorts ratings by owner.
        bias_penalty: Ridge penalty of the bias.
        penalty: Ridge penalty of the vector, per rating.

    Returns:
        Biases, shape (owners,), and vectors, shape (owners, k).
    """
    features = np.column_stack([np.ones(len(targets)), others])[order]
    number = np.bincount(owners)
    ends = np.cumsum(number)
    width = features.shape[1]
    normal = np.empty((len(number), width, width))
    right = np.add.reduceat(features * targets[order][:, None], ends - number, axis=0)
    for owner, (start, end) in enumerate(zip((ends - number).tolist(), ends.tolist(), strict=True)):
        rows = features[start:end]
        normal[owner] = rows.T @ rows
    diagonal = np.repeat(penalty * number[:, None], width, axis=1)
    diagonal[:, 0] = bias_penalty
    normal[:, np.arange(width), np.arange(width)] += diagonal
    result = np.asarray(np.linalg.solve(normal, right[:, :, None])[:, :, 0], dtype=np.float64)
    return result[:, 0], result[:, 1:]
