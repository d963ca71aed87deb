"""What a run's data calls the items of a request: by their ids, or by their titles where only one item has that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from llmrec.answer.questions import NOBODY
from llmrec.data.requests import RankRequest
from llmrec.prompts.template import clean
from llmrec.types import Event, Item, Ranking, Request

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmrec.data.split import SplitDataset


class Naming:
    """Turns requests as people write them into those that classic recommenders read, and rankings back.

    Args:
        data: Whose ids they know.
    """

    def __init__(self, data: SplitDataset) -> None:
        self._items = data.dataset.items

    def known(self, request: RankRequest) -> tuple[tuple[Event, ...], list[str]]:
        """Return the events of a history whose items the data has, under its ids, and the names of the others."""
        events: list[Event] = []
        strange: dict[str, None] = {}
        for past in request.history:
            item = self._called(past.item, request)
            if item is None:
                strange.setdefault(past.item.item_id)
            else:
                events.append(Event(item_id=item, rating=past.rating, timestamp=past.timestamp))
        return tuple(events), list(strange)

    def strange(self, request: RankRequest) -> list[str]:
        """Return the names of the items of a history that the data does not have."""
        return self.known(request)[1]

    def request(self, request: RankRequest) -> Request:
        """Return a request with its candidates; one that the data does not have keeps its name, behind a mark."""
        return Request(
            id=request.id,
            user_id=NOBODY if request.user_id is None else request.user_id,
            history=self.known(request)[0],
            candidates=tuple(self._names(request)),
        )

    def has(self, item: Item) -> bool:
        """Whether the data has an item, under its id or its title."""
        return item.item_id in self._items or self._by_title.get(item.title) is not None

    def answered(self, ranking: Ranking, request: RankRequest) -> Ranking:
        """Return a ranking of a request's candidates under the names that `request` gives them."""
        names = dict(zip((item.item_id for item in request.candidates), self._names(request), strict=True))
        return replace(ranking, items=tuple(names[item] for item in ranking.items))

    def back(self, ranking: Ranking, request: RankRequest) -> Ranking:
        """Return a ranking under the ids of the request."""
        ids = dict(zip(self._names(request), (item.item_id for item in request.candidates), strict=True))
        return replace(ranking, request_id=request.id, items=tuple(ids[item] for item in ranking.items))

    def _names(self, request: RankRequest) -> Sequence[str]:
        found = [self._called(item, request) for item in request.candidates]
        # Two titles may lead to one item, and then neither does.
        times = Counter(found)
        return [
            name if name is not None and times[name] == 1 else f"\0{item.item_id}"
            for name, item in zip(found, request.candidates, strict=True)
        ]

    def _called(self, item: Item, request: RankRequest) -> str | None:
        if item.item_id not in request.titled and item.item_id in self._items:
            return item.item_id
        return self._by_title.get(item.title)

    @cached_property
    def _by_title(self) -> Mapping[str, str | None]:
        found: dict[str, str | None] = {}
        for item_id, item in self._items.items():
            title = clean(item.title)
            found[title] = None if title in found else item_id
        return found
