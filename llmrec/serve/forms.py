"""From HTTP bodies to requests, and from answers to HTTP bodies."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from llmrec.answer.listing import ranking_of
from llmrec.answer.recommender import Answered
from llmrec.errors import DataError
from llmrec.serve import schema
from llmrec.serve.worker import Card
from llmrec.types import Cost, Event, Item


def entry_of(given: str | schema.ItemText, per_second: float = 1.0) -> str | Mapping[str, object]:
    """Return an entry of a history or of candidates as requests have it.

    Args:
        given: As it was sent.
        per_second: Units of time of the data in a second.
    """
    if isinstance(given, str):
        return given
    told = given.model_dump(exclude={"fields"}, exclude_none=True)
    if "timestamp" in told:
        told["timestamp"] = schema.number_of(told["timestamp"], per_second)
    return {**given.fields, **told}


def shares(scores: Sequence[float], card: Card) -> list[float]:
    """Return scores as shares that add to 1: probabilities of a language model, and ranks' worth of other models."""
    if card.kind == "language model":
        weights = np.exp(np.array(scores) - max(scores))
    else:
        weights = 1.0 / np.arange(1, len(scores) + 1)
    found: list[float] = (weights / weights.sum()).tolist()
    return found


def document_text(given: str | Mapping[str, object]) -> str:
    """Return the text of a document.

    Raises:
        DataError: If it has none.
    """
    text = given if isinstance(given, str) else given.get("text", next(iter(given.values()), ""))
    if not isinstance(text, str) or not text.strip():
        raise DataError("a document has no text; leave it out", kind="empty", column="documents")
    if len(text) > schema.LONGEST_TEXT:
        said = f"a document has {len(text)} characters, more than {schema.LONGEST_TEXT}; shorten it"
        raise DataError(said, kind="too-large", column="documents")
    return text


def card_of(card: Card) -> schema.ModelCard:
    """Return what is said of a model."""
    return schema.ModelCard(
        name=card.name,
        kind=card.kind,
        signature=card.signature,
        answers=list(card.verbs),
        strategies=list(card.strategies),
    )


def usage_of(cost: Cost) -> schema.Usage:
    """Return a language model's work."""
    return schema.Usage(
        prompt_tokens=cost.prompt_tokens, completion_tokens=cost.completion_tokens, forwards=cost.forwards
    )


def since(begun: float) -> float:
    """Return the milliseconds since a moment of the clock that only goes forward."""
    return round(1000 * (time.monotonic() - begun), 3)


def ranked(found: Answered, items: Mapping[str, Item], reasons: Sequence[str] = ()) -> list[schema.RankedItem]:
    """Return the items of a list, with the sentences on the first of them."""
    ranking = ranking_of(found)
    rows = zip(ranking.items, found.titles, ranking.scores, strict=True)
    return [
        schema.RankedItem(
            item_id=name,
            title=title,
            rank=place,
            score=score,
            rationale=(reasons[place - 1] or None) if place <= len(reasons) else None,
            fields=dict(items[name].fields) if name in items else {},
        )
        for place, (name, title, score) in enumerate(rows, start=1)
    ]


def told(user_id: str, events: Sequence[Event], items: Mapping[str, Item]) -> schema.KnownUser:
    """Return a user's events with the titles of their items."""
    history = [
        schema.KnownEvent(
            item_id=event.item_id,
            title=items[event.item_id].title if event.item_id in items else None,
            rating=event.rating,
            timestamp=event.timestamp,
        )
        for event in events
    ]
    return schema.KnownUser(user_id=user_id, history=history)
