"""Who and what a report shows: users and items as questions write them, drawn by a seed and never by an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from llmrec.data.dataset import Dataset
from llmrec.data.hashing import hash64
from llmrec.guard import clean, cut
from llmrec.records import Product, User

COUNT = 20
"""Requests a family, or all that there are."""
INPUT = 400
"""Characters of an input."""


def drawn(requests: Sequence[str], seed: int, count: int = COUNT) -> list[int]:
    """Return the places of the requests to show, in the order of their seeded hash."""
    order = np.argsort(hash64("text sample", seed, requests), kind="stable")
    return [int(place) for place in order[:count]]


def user_of(dataset: Dataset, user_id: str) -> User:
    """Say whose request it is, as questions write it."""
    return User(id=user_id, name=clean(dataset.users.get(user_id, {}).get("name", "")))


def product_of(dataset: Dataset, item_id: str) -> Product:
    """Say what a request is about, as questions write it."""
    item = dataset.items[item_id]
    fields = {clean(name): shortened(clean(value)) for name, value in item.fields.items() if clean(value)}
    return Product(id=item_id, title=clean(item.title), fields=fields)


def shortened(text: str, limit: int = INPUT) -> str:
    """Return the beginning of a long text, and how long it is."""
    return text if len(text) <= limit else f"{cut(text, limit)} … ({len(text)} characters)"


def ranked(parsed: str) -> list[str]:
    """Return the items of an answer that is a ranking, the first one first; nothing of any other."""
    answer = json.loads(parsed)
    return [str(item) for item in answer["items"]] if isinstance(answer, dict) else []
