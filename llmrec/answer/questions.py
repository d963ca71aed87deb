"""Requests in a task's own terms: every mention of an item has an id of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmrec.answer.index import CodesByMention
from llmrec.answer.strategy import Asking
from llmrec.answer.task import task_of
from llmrec.data.hashing import hash64
from llmrec.data.requests import RankRequest
from llmrec.index.table import ItemIndex
from llmrec.pipeline.bundle import Bundle
from llmrec.tasks.task import Task
from llmrec.types import Event, Item, Request

NOBODY = "unknown"
"""What a user is called in prompts where a request does not say."""


@dataclass(frozen=True)
class TaskRequests:
    """Requests as a task knows them, beside what was asked.

    Every mention of an item has an id of its own, so that two requests can give one item two titles. ``places`` says
    where the seeded order of its request puts a candidate.
    """

    way: Asking
    task: Task
    asked: Sequence[RankRequest]
    requests: Sequence[Request]
    items: Mapping[str, Item]
    places: Mapping[str, int]


def pose(bundle: Bundle, requests: Sequence[RankRequest], way: Asking, index: ItemIndex | None = None) -> TaskRequests:
    """Give every mention of an item an id of its own, and requests the form that a task takes.

    ``index`` stands in for the bundle's, where more items were placed in it.
    """
    index = index or bundle.index
    items: dict[str, Item] = {}
    texts: dict[str, Item] = {}
    places: dict[str, int] = {}

    def register(key: str, item: Item) -> str:
        items[key] = item
        texts[key] = Item(item_id=key, title=item.title, fields=item.fields)
        return key

    posed = []
    for n, request in enumerate(requests):
        past = [
            Event(
                item_id=register(f"{n}/history/{place}", event.item),
                rating=event.rating,
                timestamp=event.timestamp,
                text=event.text,
            )
            for place, event in enumerate(request.history)
        ]
        pool = []
        for place, given in enumerate(_seeded_order(request, bundle.seed)):
            pool.append(register(f"{n}/candidates/{place}", request.candidates[given]))
            places[pool[-1]] = place
        if way.by_title:
            # Rounding depends on where in a forward a title stands: the same set is to give the same scores always.
            pool.sort(key=lambda key: (items[key].title, items[key].item_id))
        posed.append(
            Request(
                id=request.id,
                user_id=NOBODY if request.user_id is None else request.user_id,
                history=tuple(past),
                # A request without candidates is one about the whole catalogue.
                candidates=tuple(pool) or None,
                context={**request.context, **({"profile": request.profile} if request.profile else {})},
            )
        )
    codes = CodesByMention(index, items, requests) if index else None
    return TaskRequests(way, task_of(bundle, way.family, texts, codes), requests, posed, items, places)


def _seeded_order(request: RankRequest, seed: int) -> list[int]:
    ids = [item.item_id for item in request.candidates]
    keys = hash64("rank candidates", seed, [request.id] * len(ids), ids)
    return sorted(range(len(ids)), key=lambda place: (int(keys[place]), ids[place]))
