"""Item neighbourhood models: asymmetric cosine similarity (ItemKNN), and three-step random walks (RP3beta)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from scipy import sparse

from llmrec.baselines.base import (
    DECAYS,
    AutoSetting,
    Catalogue,
    Decay,
    InteractionLog,
    ScoredBaseline,
    break_ties_by_popularity,
    item_counts,
    windowed_recency_weights,
)
from llmrec.recipe.schema import Positive, Section

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Request

    #: Computes similarities from dot products and item indices; shapes broadcast.
    Similar = Callable[[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]], Any]

# Items per block of co-occurrence counts; fixed, so that sums do not depend on other requests.
_BLOCK_ITEMS = 256
# Maximum number of items for which two dense matrices of all pairs (8 bytes each) are kept in memory.
_MAX_DENSE_ITEMS = 4096


class MatrixCache:
    """Caches the last matrix of each kind, because most are unchanged between tuning steps."""

    def __init__(self) -> None:
        """Create an empty cache."""
        self._cache: dict[str, tuple[Any, Any]] = {}

    def __call__(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """Return a matrix, computed again only if its parameters have changed."""
        if name not in self._cache or self._cache[name][0] != key:
            self._cache[name] = key, make()
        return self._cache[name][1]


@dataclass(frozen=True)
class _UserItems:
    """The binary user-item matrix, shape (users, items), and item popularity.

    Attributes:
        catalogue: The item indices.
        binary: The matrix.
        popular: Training interactions of each item, shape (items,).
        cache: Cached matrices of the last parameters.
    """

    catalogue: Catalogue
    binary: Any
    popular: NDArray[np.float64]
    cache: MatrixCache = field(default_factory=MatrixCache, compare=False)

    @staticmethod
    def of(data: SplitDataset) -> _UserItems:
        catalogue = Catalogue.of(data)
        log = InteractionLog.of(data, catalogue)
        return _UserItems(catalogue, log.binary(len(catalogue.ids)), item_counts(log, catalogue))


def _sum_similarities(
    weights: Any, model: _UserItems, matrix: Any, similar: Similar, *, matrix_key: Any, key: Any
) -> NDArray[np.float64]:
    """Return, for every item, the sum of its similarities to the history items.

    Args:
        weights: Weights of the items of each history, sparse, shape (b, items).
        model: Caches the pairs of a small catalogue.
        matrix: Training users and items, sparse, shape (users, items).
        similar: Products of two columns, and the indices of the history's item and of the other one -> similarities.
        matrix_key: The cache key of the matrix.
        key: The other parameters of the similarities, part of their cache key.

    Returns:
        Sums, shape (b, items); an item is not a neighbour of itself.
    """
    if weights.shape[1] > _MAX_DENSE_ITEMS:
        return _sum_similarities_by_block(
            weights, matrix, model.cache("transposed", matrix_key, matrix.T.tocsr), similar
        )
    both = model.cache("products", matrix_key, lambda: (matrix.T @ matrix).toarray())

    def near() -> NDArray[np.float64]:
        indices = np.arange(len(both))
        result = np.zeros(both.shape)
        # Items without a common user have similarity 0, whatever the divisor.
        with np.errstate(divide="ignore", invalid="ignore"):
            np.copyto(result, similar(both, indices[:, None], indices[None]), where=both > 0)
        np.fill_diagonal(result, 0.0)
        return result

    return np.asarray(weights.tocsr() @ model.cache("near", (matrix_key, key), near))


def _sum_similarities_by_block(weights: Any, matrix: Any, transposed: Any, similar: Similar) -> NDArray[np.float64]:
    """Sum similarities for catalogues whose item pairs do not fit in memory.

    Sums of each `_BLOCK_ITEMS` of items are added up. Blocks with few items of the histories are computed together: a
    single request has about twenty items, most of them alone in their block.

    Args:
        weights: Weights of the items of each history, sparse, shape (b, items).
        matrix: Training users and items, sparse, shape (users, items).
        transposed: The transposed ``matrix``.
        similar: See `_sum_similarities`.
    """
    total = np.zeros(weights.shape)
    weights = weights.tocoo()
    order = np.lexsort((weights.row, weights.col))
    rows, items, values = weights.row[order], weights.col[order], weights.data[order]
    blocks = items // _BLOCK_ITEMS
    # Each run consists of complete blocks with at most `_BLOCK_ITEMS` different items in total.
    start = 0
    while start < len(items):
        end = int(np.searchsorted(blocks, blocks[start], side="right"))
        while end < len(items):
            further = int(np.searchsorted(blocks, blocks[end], side="right"))
            if further - start > _BLOCK_ITEMS:
                break
            end = further
        part = slice(start, end)
        unique, positions = np.unique(items[part], return_inverse=True)
        both = (transposed[unique] @ matrix).tocoo()
        other = both.col != unique[both.row]
        past, columns = both.row[other], both.col[other]
        near = sparse.csr_array((similar(both.data[other], unique[past], columns), (past, columns)), shape=both.shape)
        # One row per request and block, so that the sums of a request do not depend on other requests.
        groups, group_of = np.unique(blocks[part] * len(total) + rows[part], return_inverse=True)
        votes = sparse.csr_array((values[part], (group_of, positions)), shape=(len(groups), len(unique))) @ near
        voters = np.repeat(groups % len(total), np.diff(votes.indptr))
        _, firsts = np.unique(groups // len(total), return_index=True)
        for cells in map(slice, votes.indptr[firsts], votes.indptr[[*firsts[1:], len(groups)]]):
            # In a large catalogue, few items have a similarity to one block, so a dense sum would be slow.
            total[voters[cells], votes.indices[cells]] += votes.data[cells]
        start = end
    return total


class ItemKNNConfig(Section):
    """Parameters of `ItemKNN`."""

    history: Positive = Field(20, description="Number of latest interactions to use.")
    decay: Decay = Field(
        0.7, description="Decay of older interactions: weight relative to the next newer one. 1: equal weights."
    )
    asymmetry: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Exponent of the scored item's norm in the similarity. 0.5: cosine similarity.",
    )
    weighting: Literal["none", "user-idf", "tf-idf"] = Field(
        "none",
        description="Weighting of the training matrix. `user-idf`: lower weights for users with many items; "
        "`tf-idf`: lower weights for popular items, with normalised rows.",
    )
    shrinkage: float = Field(
        0.0, ge=0, description="Shrinkage term in the denominator, which lowers similarities of rare items."
    )


class ItemKNN(ScoredBaseline[ItemKNNConfig, _UserItems]):
    """ItemKNN: scores items by similarity to the latest history items, over all neighbours.

    ``score(i) = sum_j decay**age(j) * x_i . x_j / (|x_i|**(2 a) * |x_j|**(2 (1 - a)) + shrinkage)`` over the last
    ``history`` interactions j, for the columns x of the user-item training matrix. ``asymmetry`` a of .5 without
    shrinkage gives cosines (Sarwar et al., WWW 2001, section 3.1); other values give the asymmetric cosine (Aiolli,
    RecSys 2013, equation 3). Shrinkage follows Bell and Koren (ICDM 2007). The matrix is binary; with
    ``weighting=user-idf`` user u has the weight ``ln(1 + items / n_u)`` for n_u items, and with ``tf-idf`` item i has
    the weight ``ln(1 + users / n_i)``, rows scaled to length 1. An item is not a neighbour of itself. Items without a
    neighbour in the history, and all items for an empty history, are ordered by popularity.
    """

    name = "item-knn"
    Config = ItemKNNConfig
    AUTO = (AutoSetting(5), AutoSetting(9, "whole history", {"history": 200, "decay": 1.0}))
    GRID: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "decay": DECAYS,
        "history": (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100, 200),
        "asymmetry": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "weighting": ("none", "user-idf", "tf-idf"),
        "shrinkage": (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0),
    }
    AT_ANSWER: ClassVar[frozenset[str]] = frozenset(ItemKNNConfig.model_fields)

    def learn(self, data: SplitDataset) -> None:
        """Store the user-item matrix."""
        self._model = _UserItems.of(data)

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the summed similarities for every request, shape (n, items)."""
        model, config = self._fitted, self._config
        matrix = model.cache("matrix", config.weighting, lambda: _weight_user_items(model.binary, config.weighting))

        def powers() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            squares = np.asarray(matrix.multiply(matrix).sum(axis=0)).ravel()
            return np.power(squares, config.asymmetry), np.power(squares, 1 - config.asymmetry)

        norms = model.cache("powers", (config.weighting, config.asymmetry), powers)

        def similar(both: NDArray[np.float64], source: NDArray[np.int64], item: NDArray[np.int64]) -> Any:
            return both / (norms[0][item] * norms[1][source] + config.shrinkage)

        weights = windowed_recency_weights(requests, model.catalogue, config.history, config.decay)
        key = config.asymmetry, config.shrinkage
        votes = _sum_similarities(weights, model, matrix, similar, matrix_key=config.weighting, key=key)
        return break_ties_by_popularity(votes, model.popular)


class RP3BetaConfig(Section):
    """Parameters of `RP3Beta`."""

    history: Positive = Field(100, description="Number of latest interactions to use.")
    decay: Decay = Field(
        0.8, description="Decay of older interactions: weight relative to the next newer one. 1: equal weights."
    )
    alpha: float = Field(
        0.8, ge=0, description="Exponent of the transition probabilities in the second and third steps."
    )
    beta: float = Field(0.6, ge=0, description="Exponent of item popularity in the divisor of the scores.")


class RP3Beta(ScoredBaseline[RP3BetaConfig, _UserItems]):
    """RP3beta: scores items by three-step random-walk probability, divided by popularity (Paudel et al., TiiS 2016).

    The walk goes from the user to an item j of the history, to a user u of j, and to another item i of u:
    ``score(i) = sum_j w_j sum_u (1 / n_j * 1 / n_u)**alpha / n_i**beta``, for n_j training users of an item and n_u
    training items of a user (their P3alpha, divided by popularity: RP3beta, section 3.3). The first step, which is
    uniform over the history in the paper, goes to the last ``history`` interactions with ``w_j = decay**age(j)``. Walks
    that return to j do not count. Items that no walk reaches are ordered by popularity.
    """

    name = "rp3beta"
    Config = RP3BetaConfig
    AUTO = (AutoSetting(8),)
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "decay": DECAYS,
        "alpha": (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0),
        "beta": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "history": (1, 2, 3, 5, 10, 20, 50, 100, 200),
    }
    AT_ANSWER: ClassVar[frozenset[str]] = frozenset(RP3BetaConfig.model_fields)

    def learn(self, data: SplitDataset) -> None:
        """Store the user-item matrix."""
        self._model = _UserItems.of(data)

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the random-walk probabilities divided by popularity, shape (n, items)."""
        model, config = self._fitted, self._config

        def walked() -> Any:
            # Both factors of a product get the square root of the weight of their common user.
            of_user = np.asarray(model.binary.sum(axis=1)).ravel()
            return sparse.diags_array(np.power(of_user, -config.alpha / 2)) @ model.binary

        def powers() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            of_item = np.maximum(np.asarray(model.binary.sum(axis=0)).ravel(), 1)
            return np.power(of_item, -config.alpha), np.power(of_item, -config.beta)

        matrix = model.cache("matrix", config.alpha, walked)
        source_weight, target_weight = model.cache("powers", (config.alpha, config.beta), powers)

        def similar(both: NDArray[np.float64], source: NDArray[np.int64], item: NDArray[np.int64]) -> Any:
            return both * source_weight[source] * target_weight[item]

        weights = windowed_recency_weights(requests, model.catalogue, config.history, config.decay)
        votes = _sum_similarities(weights, model, matrix, similar, matrix_key=config.alpha, key=config.beta)
        return break_ties_by_popularity(votes, model.popular)


def _weight_user_items(binary: Any, weighting: str) -> Any:
    """Return the weighted user-item matrix, sparse, of the same shape."""
    if weighting == "none":
        return binary
    users, items = binary.shape
    if weighting == "user-idf":
        # at least 1, since every user has an interaction
        return (sparse.diags_array(np.log1p(items / np.asarray(binary.sum(axis=1)).ravel())) @ binary).tocsr()
    item_users = np.maximum(np.asarray(binary.sum(axis=0)).ravel(), 1)
    rows = (binary @ sparse.diags_array(np.log1p(users / item_users))).tocsr()
    lengths = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
    return (sparse.diags_array(1 / lengths) @ rows).tocsr()
