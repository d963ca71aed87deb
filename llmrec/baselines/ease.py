"""EASE: a linear item-item model with a closed-form solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from scipy.linalg import lapack

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
)
from llmrec.recipe.schema import Section

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Request

_TILE_SIZE = 1024
# Maximum number of items for `llmrec auto`: inverting a larger item-item matrix takes minutes and gigabytes.
_MAX_AUTO_ITEMS = 20_000


@dataclass(frozen=True)
class _ItemWeights:
    """Weights of the warm items: entry (i, j) is the contribution of history item i to the score of item j."""

    catalogue: Catalogue
    warm: WarmItems
    weights: NDArray[np.floating[Any]]


class EASEConfig(Section):
    """Parameters of `EASE`."""

    penalty: PositiveFloat = Field(250.0, description="Ridge penalty.")
    decay: Decay = Field(
        0.9, description="Decay of older interactions: weight relative to the next newer one. 1: equal weights."
    )
    dtype: Literal["float32", "float64"] = Field(
        "float64", description="Data type of the matrix. float32 halves memory and time."
    )


class EASE(ScoredBaseline[EASEConfig, _ItemWeights]):
    """EASE: scores items by learned weights of the history items (Steck, WWW 2019, equation 8).

    With the binary training matrix X and ``P = (X'X + penalty * I)**-1``, the weights are ``B[i, j] = -P[i, j] /
    P[j, j]``, and 0 on the diagonal: the least squares solution of ``X = X B`` under a ridge penalty in which no item
    may predict itself. A score is the sum of the weights of the history's items, each times ``decay**age``; the paper
    uses ``decay=1``. Memory: a dense matrix over the items with training interactions, 8 bytes per cell (4 with
    ``float32``), such as 1.2 GB for 12,000 items.
    """

    name = "ease"
    Config = EASEConfig
    AUTO = (
        AutoSetting(12, items=_MAX_AUTO_ITEMS),
        AutoSetting(13, "whole history", {"decay": 1.0}, items=_MAX_AUTO_ITEMS),
    )
    SCORES = "logits"
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "penalty": (10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0),
        "decay": DECAYS,
    }
    AT_ANSWER: ClassVar[frozenset[str]] = frozenset({"decay"})
    FITS_ON = "train"

    def learn(self, data: SplitDataset) -> None:
        """Compute the weights by a Cholesky factorisation.

        Cost: n**3 multiplications for n items with training interactions; the matrix is factored and inverted
        in place.
        """
        catalogue = Catalogue.of(data)
        log = InteractionLog.of(data, catalogue)
        warm = WarmItems.of(log, catalogue)
        binary = warm.log(log).binary(len(warm.indices)).astype(self._config.dtype)
        gram: NDArray[np.floating[Any]] = (binary.T @ binary).toarray()
        gram[np.diag_indices_from(gram)] += self._config.penalty
        weights = _invert_in_place(gram)
        weights /= -weights.diagonal().copy()
        np.fill_diagonal(weights, 0.0)
        self._model = _ItemWeights(catalogue, warm, weights)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the weights, shape (warm, warm)."""
        return {"weights": self._fitted.weights}

    def restore(self, data: SplitDataset, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the fitted weights from `state`."""
        warm = WarmItems.in_training(data)
        self._model = _ItemWeights(warm.catalogue, warm, state["weights"])

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the scores for every request and item, shape (n, items)."""
        model = self._fitted
        histories = model.warm.histories(requests)
        weights = recency_weights(histories, len(model.warm.indices), self._config.decay, model.weights.dtype.type)
        return model.warm.spread(weights @ model.weights, histories)


def _invert_in_place(matrix: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Invert a symmetric positive definite matrix in place, shape (n, n)."""
    single = matrix.dtype == np.float32
    factor, invert = (lapack.spotrf, lapack.spotri) if single else (lapack.dpotrf, lapack.dpotri)
    # LAPACK is column-major: a symmetric matrix can be passed transposed, without a copy.
    factored, failed = factor(matrix.T, lower=1, overwrite_a=1)
    if not failed:
        inverse, failed = invert(factored, lower=1, overwrite_c=1)
    if failed:
        raise FloatingPointError(
            "the item-by-item matrix of the baseline 'ease' is not positive definite at this precision; "
            "use dtype='float64' or a larger penalty"
        )
    # LAPACK fills only one triangle; mirror it in tiles.
    for start in range(0, len(inverse), _TILE_SIZE):
        end = start + _TILE_SIZE
        inverse[start:end, end:] = inverse[end:, start:end].T
        tile = inverse[start:end, start:end]
        tile[:] = np.tril(tile) + np.tril(tile, -1).T
    result: NDArray[np.floating[Any]] = inverse.T
    return result
