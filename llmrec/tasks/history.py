"""Selects which interactions of a history are shown: the latest or the most similar ones, with a summary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from llmrec.data.dataset import Dataset
from llmrec.errors import RecipeError
from llmrec.guard import clean
from llmrec.prompts.template import Template
from llmrec.recipe.schema import TaskSection
from llmrec.types import Event, Item

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Number of categories, such as genres, and of titles in a summary.
_SUMMARY_CATEGORIES, _SUMMARY_TITLES = 5, 3
_CATEGORY_SEPARATOR = re.compile(r"\s*[|,>/]\s*")


class ItemVectors:
    """Text vectors of items, computed on first use.

    Args:
        items: The catalogue.
        embed: Items -> vectors of length 1, shape (n, d).
    """

    def __init__(self, items: Mapping[str, Item], embed: Callable[[Sequence[Item]], NDArray[np.floating]]) -> None:
        self._names = sorted(items)
        self._items, self._embed = items, embed

    def of(self, items: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors of items, shape (n, d)."""
        return self._table[[self._index[item] for item in items]]

    @cached_property
    def _index(self) -> Mapping[str, int]:
        return {item: index for index, item in enumerate(self._names)}

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        return np.asarray(self._embed([self._items[name] for name in self._names]), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class ShownHistory:
    """The part of a history that is shown in a prompt.

    Attributes:
        events: Interactions, oldest first.
        summary: A summary of the other interactions; may be empty.
    """

    events: tuple[Event, ...]
    summary: str = ""

    def context(self, given: Mapping[str, str]) -> Mapping[str, str]:
        """Return the context of a request; if there is no profile, a summary of the history replaces it."""
        return {"profile": self.summary, **given} if self.summary else given


class HistorySelector:
    """Selects which interactions of a history are shown in a prompt.

    Args:
        section: ``history`` is the number of shown interactions, ``past`` the rule.
        dataset: The data set, with the items and their kinds.
        vectors: Item vectors, for the rule ``relevant``.
        templates: Templates of training and evaluation, which have to show a summary.

    Raises:
        RecipeError: If a rule lacks a required input.
    """

    def __init__(
        self, section: TaskSection, dataset: Dataset, vectors: ItemVectors | None, templates: Sequence[Template]
    ) -> None:
        self.history, self._rule, self._dataset, self._vectors = section.history, section.past, dataset, vectors
        if self._rule == "relevant" and vectors is None:
            raise RecipeError(
                "tasks: past=relevant compares item texts, but there is no text encoder",
                kind="unsupported",
                column="past",
            )
        if self._rule == "summary":
            blind = [template.id for template in templates if not template.shows_profile]
            if blind:
                raise RecipeError(
                    "tasks: past=summary writes a summary of earlier interactions into the profile, which template "
                    f"{blind[0]} does not show; choose templates that show profiles, or another value of past",
                    kind="contradiction",
                    at=blind[0],
                    column="past",
                )

    def show(self, events: Sequence[Event], about: Sequence[str] = ()) -> ShownHistory:
        """Return the part of a history to show.

        Args:
            events: The whole history, oldest first.
            about: The items of the question. Without any, interactions similar to the latest one are relevant.
        """
        if len(events) <= self.history or self._rule == "latest":
            return ShownHistory(tuple(events[-self.history :]))
        if self._rule == "summary":
            return ShownHistory(tuple(events[-self.history :]), self._summary(events[: -self.history]))
        return ShownHistory(self._select_relevant(events, about))

    def _select_relevant(self, events: Sequence[Event], about: Sequence[str]) -> tuple[Event, ...]:
        """Select the latest interaction and the interactions most similar to an item of the question."""
        assert self._vectors is not None
        past = self._vectors.of([event.item_id for event in events[:-1]])
        query = self._vectors.of(list(about) or [events[-1].item_id])
        near = (past @ query.T).max(axis=1)
        order = np.lexsort((-np.arange(len(near)), -near))[: self.history - 1]
        return (*(events[index] for index in sorted(order.tolist())), events[-1])

    def _summary(self, events: Sequence[Event]) -> str:
        """Summarise the number of interactions, the categories, the ratings and the best-rated items."""
        items = [self._dataset.items[event.item_id] for event in events]
        kinds: Counter[str] = Counter()
        for item in items:
            # The first non-empty field is the category: genres, a category or a brand.
            message = next((text for text in item.fields.values() if text), "")
            kinds.update(list(dict.fromkeys(part for part in _CATEGORY_SEPARATOR.split(message) if part)))
        parts = [f"{len(events)} earlier {self._dataset.noun}"]
        if kinds:
            parts.append(
                "mostly " + ", ".join(f"{clean(kind)} ({n})" for kind, n in kinds.most_common(_SUMMARY_CATEGORIES))
            )
        rated = [event for event in events if event.rating is not None]
        if rated:
            mean = sum(event.rating or 0.0 for event in rated) / len(rated)
            parts.append(f"rated {mean:.1f} on average")
            best = sorted(range(len(rated)), key=lambda index: (-(rated[index].rating or 0.0), -index))[
                :_SUMMARY_TITLES
            ]
            titles = [clean(self._dataset.items[rated[index].item_id].title, 60) for index in best]
            parts.append("liked best: " + ", ".join(titles))
        return "; ".join(parts)
