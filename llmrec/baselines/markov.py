"""First-order transitions, decayed over the last few items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from llmrec.baselines.fitted import fitted
from llmrec.baselines.ranked import Catalogue, Log, counts, rank_all, recent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Answer, Request


@dataclass(frozen=True)
class _Transitions:
    """Weighted counts of item j after item i, shape (items, items), and the popularity term."""

    catalogue: Catalogue
    after: Any
    filler: NDArray[np.float64]


class Markov:
    """Scores an item by how often it followed the latest items of the history in training sequences.

    A step from i to j that skips d - 1 events counts ``decay**(d - 1)``, for d up to ``order``; at request time the
    last ``order`` items vote with ``decay**age``. ``order=1`` is the plain first-order chain (Rendle et al., WWW
    2010, section 4.1, without factorisation). A small multiple of popularity stands in where there are few steps;
    both grow alike with the data.
    """

    name = "markov"

    def __init__(self, *, order: int = 10, decay: float = 0.85, popularity: float = 1e-3, seed: int = 0) -> None:
        """Set up.

        Args:
            order: How many of the latest items vote, and how far apart a step may be. The defaults of order and
                decay were chosen on MovieLens-100K's validation split.
            decay: Factor from one event to the one before.
            popularity: Score of one training interaction, against 1 for one direct transition.
            seed: Not used; nothing here is random.
        """
        if order < 1 or not 0 < decay <= 1 or popularity < 0:
            raise ValueError(
                "order must be at least 1, decay in (0, 1] and popularity at least 0, "
                f"not {order}, {decay} and {popularity}"
            )
        self._order = order
        self._decay = decay
        self._popularity = popularity
        self._model: _Transitions | None = None

    def fit(self, data: SplitDataset) -> None:
        """Count the steps of every user's training sequence."""
        catalogue = Catalogue.of(data)
        log = Log.of(data, catalogue)
        size = len(catalogue.ids)
        after = sparse.csr_array((size, size), dtype=np.float64)
        for gap in range(1, self._order + 1):
            same = log.users[gap:] == log.users[:-gap]
            before, later = log.items[:-gap][same], log.items[gap:][same]
            steps = np.full(len(before), self._decay ** (gap - 1))
            after = after + sparse.csr_array((steps, (before, later)), shape=(size, size))
        self._model = _Transitions(catalogue, after, self._popularity * counts(log, catalogue))

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates, or the catalogue less the history; unknown items score 0."""
        model = fitted(self._model, self.name)

        def scores(part: Sequence[Request]) -> NDArray[np.float64]:
            votes = recent(part, model.catalogue, self._order, self._decay) @ model.after
            total: NDArray[np.float64] = votes.toarray() + model.filler
            return total

        return rank_all(requests, model.catalogue, scores)


def first_order(*, seed: int = 0) -> Markov:
    """Return the plain first-order chain: only the last item votes, by its direct transitions."""
    chain = Markov(order=1, seed=seed)
    chain.name = "markov-1"
    return chain
