"""Items that a user has nothing to do with: negatives of training rows and of solved examples."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cached_property

from llmrec.data.split import SplitDataset
from llmrec.errors import DataError


class Negatives:
    """Draws items that a user touched in no split, so that no held-out pair stands in a training text.

    Args:
        data: The split data.
        kind: ``uniform`` over the catalogue, or ``popularity``: by 1 + number of training interactions.
    """

    def __init__(self, data: SplitDataset, kind: str) -> None:
        self._catalogue = sorted(data.dataset.items)
        self._bag = list(self._catalogue)
        if kind == "popularity":
            self._bag = sorted([*self._bag, *data.train["item_id"].to_list()])
        self._interactions = data.dataset.interactions

    @cached_property
    def _touched(self) -> Mapping[str, frozenset[str]]:
        by_user: dict[str, set[str]] = {}
        for user, item in self._interactions.select("user_id", "item_id").iter_rows():
            by_user.setdefault(user, set()).add(item)
        return {user: frozenset(items) for user, items in by_user.items()}

    def draw(self, user: str, count: int, rng: random.Random) -> list[str]:
        """Return ``count`` different items.

        Raises:
            DataError: If the user left fewer untouched.
        """
        touched = self._touched.get(user, frozenset())
        free = len(self._catalogue) - len(touched)
        if free < count:
            raise DataError(
                f"user {user!r} leaves only {free} of {len(self._catalogue)} items untouched, fewer than the {count} "
                f"negatives asked for; set eval.candidates.count to at most {free + 1}"
            )
        taken: dict[str, None] = {}
        for _ in range(8 * count):
            if len(taken) == count:
                break
            item = self._bag[rng.randrange(len(self._bag))]
            if item not in touched:
                taken.setdefault(item)
        if len(taken) < count:
            rest = [item for item in self._bag if item not in touched and item not in taken]
            while len(taken) < count:
                item = rng.choice(rest)
                taken[item] = None
                rest = [other for other in rest if other != item]
        return list(taken)
