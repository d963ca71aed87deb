"""The old way to draw negatives, which knows what is held out: a double for tests of what finds it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from llmrec.data.split import SplitDataset
from llmrec.tasks.pool import Negatives


class Knowing(Negatives):
    """Draws items that a user has had in no split, so that a held-out item is never shown as a negative."""

    def __init__(self, data: SplitDataset, kind: str) -> None:
        super().__init__(data, kind)
        self._whole = data.dataset.interactions

    @cached_property
    def _trained(self) -> Mapping[str, frozenset[str]]:
        by_user = self._whole.group_by("user_id").agg("item_id").iter_rows()
        return {user: frozenset(items) for user, items in by_user}
