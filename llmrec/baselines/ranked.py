"""What the ranking baselines share: numbered items, request windows and the way scores become rankings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from llmrec.types import Answer, Ranking, Request, Unparsed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

    #: Scores of every catalogue item, at least 0 each: requests -> (b, items).
    Scorer = Callable[[Sequence[Request]], NDArray[np.float64]]

TOP = 100
"""How many items of a whole catalogue are returned."""

# Cells of a block of dense scores: 32 MB of float64.
_CELLS = 1 << 22


@dataclass(frozen=True)
class Catalogue:
    """Every item of the dataset, sorted by id, so that numbering does not depend on the order of rows."""

    ids: tuple[str, ...]
    index: Mapping[str, int]

    @staticmethod
    def of(data: SplitDataset) -> Catalogue:
        """Number the items of a dataset."""
        ids = tuple(sorted(data.dataset.items))
        return Catalogue(ids=ids, index={item: place for place, item in enumerate(ids)})

    def places(self, items: Iterable[str]) -> NDArray[np.int64]:
        """Return each item's number, -1 for an unknown one."""
        return np.array([self.index.get(item, -1) for item in items], dtype=np.int64)


@dataclass(frozen=True)
class Log:
    """Training interactions as numbers, user by user, oldest first.

    Attributes:
        users: Number of the user of each row; users are numbered in sorted order.
        items: Number of the item of each row.
        user_count: Number of users.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    user_count: int

    @staticmethod
    def of(data: SplitDataset, catalogue: Catalogue) -> Log:
        """Number the training interactions."""
        names, users = np.unique(
            np.array(data.train.get_column("user_id").to_list(), dtype=object), return_inverse=True
        )
        items = catalogue.places(data.train.get_column("item_id").to_list())
        order = np.argsort(users, kind="stable")
        return Log(users=users[order].astype(np.int64), items=items[order], user_count=len(names))


def counts(log: Log, catalogue: Catalogue) -> NDArray[np.float64]:
    """Return the number of training interactions of each item, shape (items,)."""
    return np.bincount(log.items, minlength=len(catalogue.ids)).astype(np.float64)


def recent(requests: Sequence[Request], catalogue: Catalogue, window: int, decay: float) -> Any:
    """Weigh the last events of each history: the latest by 1, the one before by ``decay``, and so on.

    Args:
        requests: Requests with histories, oldest first.
        catalogue: The numbering.
        window: How many of the latest events count; an event with an unknown item takes its place but weighs nothing.
        decay: Factor from one event to the one before.

    Returns:
        Sparse matrix of shape (requests, items); an item that occurs twice has the sum of its weights.
    """
    rows, columns, weights = [], [], []
    for row, request in enumerate(requests):
        for age, event in enumerate(reversed(request.history[-window:])):
            place = catalogue.index.get(event.item_id)
            if place is not None:
                rows.append(row)
                columns.append(place)
                weights.append(decay**age)
    shape = (len(requests), len(catalogue.ids))
    return sparse.csr_array(
        (np.array(weights, dtype=np.float64), (np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64))),
        shape=shape,
    )


def rank_all(requests: Sequence[Request], catalogue: Catalogue, scorer: Scorer) -> list[Answer]:
    """Answer every request, a block at a time, with the scores that a baseline gives the catalogue."""
    block = max(1, _CELLS // max(1, len(catalogue.ids)))
    answers: list[Answer] = []
    for start in range(0, len(requests), block):
        part = requests[start : start + block]
        for request, scores in zip(part, scorer(part), strict=True):
            answers.append(_answer(request, catalogue, scores))
    return answers


def ranking(request: Request, items: Sequence[str], scores: NDArray[np.float64]) -> Ranking:
    """Sort items by score, best first, equal ones by id; all of them are kept."""
    order = sorted(range(len(items)), key=lambda place: (-scores[place], items[place]))
    return Ranking(
        request_id=request.id,
        items=tuple(items[place] for place in order),
        scores=tuple(float(scores[place]) for place in order),
    )


def refusal(request: Request) -> Unparsed | None:
    """Return why a request cannot be ranked, or None if it can."""
    if request.candidates is None:
        return None
    if not request.candidates:
        return Unparsed(request_id=request.id, reason="the request has no candidates")
    if len(set(request.candidates)) != len(request.candidates):
        return Unparsed(request_id=request.id, reason="a candidate stands twice in the request")
    return None


def unseen(request: Request, catalogue: Catalogue) -> NDArray[np.int64]:
    """Return the numbers of all items that are not in the request's history."""
    keep = np.ones(len(catalogue.ids), dtype=bool)
    seen = catalogue.places(event.item_id for event in request.history)
    keep[seen[seen >= 0]] = False
    return np.flatnonzero(keep)


def top_of(request: Request, catalogue: Catalogue, places: NDArray[np.int64], scores: NDArray[np.float64]) -> Ranking:
    """Keep the best `TOP` of numbered items, and whatever ties with the last of them.

    Cutting through a tied block would decide by chance, or by id, whether the target is in the list.
    """
    if len(places) > TOP:
        border = np.partition(scores, len(scores) - TOP)[len(scores) - TOP]
        kept = scores >= border
        places, scores = places[kept], scores[kept]
    return ranking(request, [catalogue.ids[place] for place in places], scores)


def _answer(request: Request, catalogue: Catalogue, scores: NDArray[np.float64]) -> Answer:
    if (refused := refusal(request)) is not None:
        return refused
    if request.candidates is None:
        places = unseen(request, catalogue)
        return top_of(request, catalogue, places, scores[places])
    places = catalogue.places(request.candidates)
    # No score is below 0, so an unknown candidate is never above a known one.
    return ranking(request, request.candidates, np.where(places >= 0, scores[places], 0.0))
