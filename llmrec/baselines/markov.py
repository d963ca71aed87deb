"""First-order transitions: of the last item alone, decayed over the last few, and with co-occurrence beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scipy import sparse

from llmrec.baselines.base import Catalogue, Log, counts, filled, fitted, rank_all, recent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Answer, Request


@dataclass(frozen=True)
class _Transitions:
    """Weighted counts of item j after item i, shape (items, items), and popularity."""

    catalogue: Catalogue
    after: Any
    popular: NDArray[np.float64]


class Markov:
    """Scores an item by how often it followed the latest items of the history in training sequences.

    A step from i to j that skips d - 1 events counts ``decay**(d - 1)``, for d up to ``order``; at request time the
    last ``order`` items vote with ``decay**age``. Popularity orders what has no votes, below all that has some, and
    breaks ties.
    """

    name = "markov"
    stochastic = False
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {"order": (3, 10, 20), "decay": (0.7, 0.85)}

    def __init__(self, *, order: int = 10, decay: float = 0.85, seed: int = 0) -> None:
        """Set up.

        Args:
            order: How many of the latest items vote, and how far apart a step may be. The defaults of order and
                decay were chosen on MovieLens-100K's validation split.
            decay: Factor from one event to the one before.
            seed: Not used; nothing here is random.
        """
        if order < 1 or not 0 < decay <= 1:
            raise ValueError(f"order must be at least 1 and decay in (0, 1], not {order} and {decay}")
        self._order = order
        self._decay = decay
        self._model: _Transitions | None = None

    def fit(self, data: SplitDataset) -> None:
        """Count the steps of every user's training sequence."""
        catalogue = Catalogue.of(data)
        log = Log.of(data, catalogue)
        after = _steps(log, len(catalogue.ids), self._order, self._decay)
        self._model = _Transitions(catalogue, after, counts(log, catalogue))

    @property
    def items(self) -> tuple[str, ...]:
        """The catalogue in column order."""
        return fitted(self._model, self.name).catalogue.ids

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the votes for every request and item, shape (n, items)."""
        model = fitted(self._model, self.name)
        votes = recent(requests, model.catalogue, self._order, self._decay) @ model.after
        return filled(votes.toarray(), model.popular)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates, or the catalogue less the history; unknown items score 0."""
        return rank_all(requests, fitted(self._model, self.name).catalogue, self.scores)


class FirstOrder:
    """The plain first-order chain (Rendle et al., WWW 2010, section 4.1, without factorisation).

    Only the last item votes, by its direct transitions; popularity orders what has none.
    """

    name = "markov-1"
    stochastic = False
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {}

    def __init__(self, *, seed: int = 0) -> None:
        self._chain: Markov | None = None

    def fit(self, data: SplitDataset) -> None:
        """Count the direct transitions of every user's training sequence."""
        chain = Markov(order=1)
        chain.fit(data)
        self._chain = chain

    @property
    def items(self) -> tuple[str, ...]:
        """The catalogue in column order."""
        return fitted(self._chain, self.name).items

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the transitions of the last item for every request, shape (n, items)."""
        return fitted(self._chain, self.name).scores(requests)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates, or the catalogue less the history; unknown items score 0."""
        return fitted(self._chain, self.name).answer(requests)


@dataclass(frozen=True)
class _Counted:
    """Transitions and normalised co-occurrences, each of shape (items, items), and popularity."""

    catalogue: Catalogue
    after: Any
    together: Any
    popular: NDArray[np.float64]


class MarkovCooccurrence:
    """Adds what the history's items were bought with to what followed the last of them.

    ``score(i) = transition * steps(last, i) + sum_j decay**age(j) * both(j, i) / sqrt(pop(j) * pop(i) + 1)`` over the
    last ``history`` events j, where ``steps`` counts direct transitions, ``both`` pairs of interactions of one user
    and ``pop`` interactions, all in training. Popularity orders what has neither, and breaks ties. A counting model
    without any training: on Amazon's sparse shop data it is ahead of many published neural figures, so it is the bar
    to clear there.
    """

    name = "markov-cooccurrence"
    stochastic = False
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {"transition": (0.3, 1.0, 3.0), "decay": (0.8, 0.9)}

    def __init__(self, *, history: int = 20, decay: float = 0.8, transition: float = 1.0, seed: int = 0) -> None:
        """Set up.

        Args:
            history: How many of the latest events count for co-occurrence.
            decay: Factor from one event to the one before.
            transition: Weight of one direct transition from the last item.
            seed: Not used; nothing here is random.
        """
        if history < 1 or not 0 < decay <= 1 or transition < 0:
            raise ValueError(
                "history must be at least 1, decay in (0, 1] and transition at least 0, "
                f"not {history}, {decay} and {transition}"
            )
        self._history = history
        self._decay = decay
        self._transition = transition
        self._model: _Counted | None = None

    def fit(self, data: SplitDataset) -> None:
        """Count transitions and co-occurrences of every user's training sequence."""
        catalogue = Catalogue.of(data)
        log = Log.of(data, catalogue)
        size, popular = len(catalogue.ids), counts(log, catalogue)
        users = log.matrix(size)
        # A pair is two interactions: an item that a user had once does not occur together with itself.
        both = (users.T @ users - sparse.diags_array(popular)).tocoo()
        scale = np.sqrt(popular[both.row] * popular[both.col] + 1)
        together = sparse.csr_array((both.data / scale, (both.row, both.col)), shape=(size, size))
        together.eliminate_zeros()
        self._model = _Counted(
            catalogue=catalogue,
            after=self._transition * _steps(log, size, 1, 1.0),
            together=together,
            popular=popular,
        )

    @property
    def items(self) -> tuple[str, ...]:
        """The catalogue in column order."""
        return fitted(self._model, self.name).catalogue.ids

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the sum for every request and item, shape (n, items)."""
        model = fitted(self._model, self.name)
        last = recent(requests, model.catalogue, 1, 1.0) @ model.after
        total = recent(requests, model.catalogue, self._history, self._decay) @ model.together + last
        return filled(total.toarray(), model.popular)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates, or the catalogue less the history; unknown items score 0."""
        return rank_all(requests, fitted(self._model, self.name).catalogue, self.scores)


def _steps(log: Log, size: int, order: int, decay: float) -> Any:
    """Count the steps of up to ``order`` places within each user's sequence, sparse, shape (items, items)."""
    after = sparse.csr_array((size, size), dtype=np.float64)
    for gap in range(1, order + 1):
        same = log.users[gap:] == log.users[:-gap]
        before, later = log.items[:-gap][same], log.items[gap:][same]
        steps = np.full(len(before), decay ** (gap - 1))
        after = after + sparse.csr_array((steps, (before, later)), shape=(size, size))
    return after
