"""Item-to-item transition models: normalised transitions in both directions, alone and with text similarity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

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
from llmrec.baselines.item_texts import TextsConfig, text_vectors
from llmrec.baselines.knn import MatrixCache
from llmrec.recipe.schema import Positive, Section
from llmrec.results import Reads

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Request

NEIGHBOURS = 100
"""Number of neighbours of an item by text similarity."""
# Maximum distance of a transition.
_MAX_DISTANCE = 20
# Maximum numbers of rows and of values per block of item-item similarities.
_BLOCK_ROWS, _BLOCK_VALUES = 1024, 2**27
_BACKWARD_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class TransitionCounts:
    """Transition counts of the training sequences, by distance.

    Attributes:
        catalogue: The item indices.
        gaps: Transitions over distance 1, 2, ..., each sparse, shape (items, items).
        popular: Training interactions of each item, shape (items,).
        near: Positive text similarity to the most similar items, sparse, shape (items, items); None without text.
        vectors: Text vectors of ``near``, of length 1, shape (items, d), if the encoder was fine-tuned; else None.
        cache: Cached matrices of the last parameters.
    """

    catalogue: Catalogue
    gaps: tuple[Any, ...]
    popular: NDArray[np.float64]
    near: Any = None
    vectors: NDArray[Any] | None = None
    cache: MatrixCache = field(default_factory=MatrixCache, compare=False)


class TransitionsConfig(Section):
    """Parameters of `Transitions`."""

    reach: int = Field(10, ge=1, le=_MAX_DISTANCE, description="Maximum distance of a transition, in positions.")
    fade: Decay = Field(
        0.7, description="Decay with distance: weight of a transition relative to one that is one position shorter."
    )
    backward: float = Field(0.5, ge=0, le=1, description="Weight of transitions in the reverse direction.")
    smoothing: float = Field(
        1.0, gt=0, description="Constant added to an item's transition count before normalisation."
    )
    leaving: float = Field(
        0.25, ge=0, le=1, description="Exponent of the source item's transition count in the normalisation."
    )
    arriving: float = Field(
        0.1, ge=0, le=1, description="Exponent of the target item's popularity in the normalisation."
    )
    history: Positive = Field(10, description="Number of latest interactions to use.")
    decay: Decay = Field(0.6, description="Decay of older interactions: weight relative to the next newer one.")


class Transitions(ScoredBaseline[TransitionsConfig, TransitionCounts]):
    """Scores items by normalised transitions in both directions from the latest history items.

    With ``F_d`` the number of times that an item followed another at distance ``d`` in a training sequence, transitions
    are ``S = sum_d fade**(d - 1) F_d``, in both directions ``R = S + backward * S'``, and normalised ``A[i, j] = R[i,
    j] / ((sum_k R[i, k] + smoothing)**leaving * (n_j + 1)**arriving)`` for n_j training interactions of item j. Then
    ``score(j) = sum_i decay**age(i) * A[i, j]`` over the last ``history`` interactions i. On sparse shop data it is the
    best model without text. Popularity orders items without votes, and breaks ties.

    It combines item-to-item counts normalised by powers of both degrees (Deshpande and Karypis, TOIS 2004, section 4)
    and sequential rules over several positions with decay (Ludewig and Jannach, UMUAI 2018, section 3.1.2).
    """

    name = "transitions"
    Config = TransitionsConfig
    AUTO = (AutoSetting(6),)
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "fade": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "reach": (1, 2, 3, 5, 7, 10, 15, 20),
        "backward": _BACKWARD_WEIGHTS,
        "leaving": (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0),
        "arriving": (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "smoothing": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        "decay": DECAYS,
        "history": (1, 2, 3, 5, 7, 10, 15, 20, 30, 50),
    }
    AT_ANSWER: ClassVar[frozenset[str]] = frozenset(TransitionsConfig.model_fields)

    def learn(self, data: SplitDataset) -> None:
        """Count transitions for each distance."""
        self._model = count_transitions(data)

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the weighted transitions for every request, shape (n, items)."""
        model, config = self._fitted, self._config
        votes = windowed_recency_weights(
            requests, model.catalogue, config.history, config.decay
        ) @ normalise_transitions(model, config)
        return break_ties_by_popularity(votes.toarray(), model.popular)


class TransitionsTextConfig(TransitionsConfig, TextsConfig):
    """Parameters of `TransitionsText`."""

    # On validation users of five data sets, 2 is better than 0.3 with MiniLM, or equal; on sparse data, 8 is better.
    text: float = Field(2.0, ge=0, description="Weight of text similarity to the latest items.")
    sharpness: float = Field(8.0, gt=0, description="Exponent of text similarities before normalisation.")
    text_history: Positive = Field(3, description="Number of latest interactions to use for text similarity.")
    text_decay: Decay = Field(
        0.5, description="Decay of older interactions: weight relative to the next newer one, for text similarity."
    )
    onward: float = Field(0.5, ge=0, description="Weight of text similarity to the targets of transitions.")


class TransitionsText(ScoredBaseline[TransitionsTextConfig, TransitionCounts]):
    """`Transitions` with text similarity to the history items and to the items that follow them.

    With T the text similarities, ``max(cos, 0)**sharpness`` of the 100 most similar items, rows scaled to sum 1, an
    item has ``score(j) = sum_i w_i (A + onward * A T)[i, j] + text * sum_i v_i T[i, j]``, where ``w_i =
    decay**age(i)`` over the last ``history`` interactions and ``v_i = text_decay**age(i)`` over the last
    ``text_history``. Cold-start items have a score too. The encoder is frozen.
    """

    name = "transitions-text"
    Config = TransitionsTextConfig
    AUTO = (AutoSetting(10),)
    READS: ClassVar[Reads] = "texts"
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "text": (0.0, 0.03, 0.1, 0.2, 0.3, 0.5, 0.8, 1.3, 2.0, 3.0, 5.0, 8.0, 13.0, 20.0, 30.0),
        "onward": (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0),
        "sharpness": (2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0),
        "text_decay": DECAYS,
        "text_history": (1, 2, 3, 5, 10, 20),
        **Transitions.GRID,
    }
    AT_ANSWER: ClassVar[frozenset[str]] = frozenset(TransitionsTextConfig.model_fields) - set(TextsConfig.model_fields)

    def learn(self, data: SplitDataset) -> None:
        """Count transitions, and find the most similar items of each item by text.

        Raises:
            DataError: If no item has a text.
            ModelError: If the encoder is missing.
        """
        steps = count_transitions(data)
        vectors = text_vectors(data, steps.catalogue.ids, self._config)
        self._model = TransitionCounts(
            steps.catalogue, steps.gaps, steps.popular, nearest_neighbour_similarities(vectors, NEIGHBOURS)
        )

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the weighted transitions and similarities for every request, shape (n, items)."""
        model, config = self._fitted, self._config
        steps = normalise_transitions(model, config)
        similarity = model.cache(
            "similarity", config.sharpness, lambda: _sharpen_similarities(model.near, config.sharpness)
        )
        votes = windowed_recency_weights(requests, model.catalogue, config.history, config.decay) @ steps
        last = windowed_recency_weights(requests, model.catalogue, config.text_history, config.text_decay)
        # One product for both text terms, with the weights of these requests only, because the product A T is large.
        text_votes = (config.onward * votes + config.text * last) @ similarity
        return break_ties_by_popularity(votes.toarray() + text_votes.toarray(), model.popular)


def nearest_neighbour_similarities(vectors: NDArray[np.floating[Any]], count: int) -> Any:
    """Return the positive cosine similarities to the nearest other items, sparse, shape (items, items).

    Args:
        vectors: Item vectors of length 1, shape (items, d).
        count: Number of neighbours per item; ties with the last one are added if the item then has at most ten times
            as many, and left out otherwise, such as those of thousands of items with the same text.
    """
    items = len(vectors)
    count = min(count, items - 1)
    parts = [sparse.csr_array((0, items))]
    height = max(1, min(_BLOCK_ROWS, _BLOCK_VALUES // max(1, items)))
    for start in range(0, items if count > 0 else 0, height):
        cosines = np.asarray(vectors[start : start + height] @ vectors.T, dtype=np.float64)
        cosines[np.arange(len(cosines)), np.arange(start, start + len(cosines))] = -np.inf
        border = np.maximum(np.partition(cosines, items - count, axis=1)[:, items - count, None], 1e-9)
        kept = cosines >= border
        crowded = kept.sum(axis=1) > 10 * count
        kept[crowded] = cosines[crowded] > border[crowded]
        parts.append(sparse.csr_array(np.where(kept, cosines, 0.0)))
    result = sparse.vstack(parts, format="csr")
    return result if result.shape[0] == items else sparse.csr_array((items, items))


def count_transitions(data: SplitDataset) -> TransitionCounts:
    """Return the training transition counts for each distance."""
    catalogue = Catalogue.of(data)
    log, size = InteractionLog.of(data, catalogue), len(catalogue.ids)
    gaps = tuple(log.steps(gap, size) for gap in range(1, _MAX_DISTANCE + 1))
    return TransitionCounts(catalogue, gaps, item_counts(log, catalogue))


def normalise_transitions(model: TransitionCounts, config: TransitionsConfig) -> Any:
    """Return the normalised transitions in both directions, sparse, shape (items, items)."""
    shape = config.reach, config.fade, config.backward

    def summed() -> Any:
        steps = model.gaps[0]
        for gap in range(1, config.reach):
            steps = steps + config.fade**gap * model.gaps[gap]
        return (steps + config.backward * steps.T).tocsr()

    both = model.cache("steps", shape, summed)

    def divided() -> Any:
        leaving = (np.asarray(both.sum(axis=1)).ravel() + config.smoothing) ** -config.leaving
        arriving = (model.popular + 1) ** -config.arriving
        return (sparse.diags_array(leaving) @ both @ sparse.diags_array(arriving)).tocsr()

    return model.cache("divided", (*shape, config.smoothing, config.leaving, config.arriving), divided)


def _sharpen_similarities(near: Any, sharpness: float) -> Any:
    """Raise similarities to a power and scale rows to sum 1."""
    result = near.copy()
    result.data = result.data**sharpness
    total = np.asarray(result.sum(axis=1)).ravel()
    return (sparse.diags_array(np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)) @ result).tocsr()
