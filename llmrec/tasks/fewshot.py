"""Solved examples for few-shot prompts, from training interactions only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmrec.data.hashing import hash64
from llmrec.errors import DataError, RecipeError, did_you_mean
from llmrec.tasks.common import keyed
from llmrec.types import Event, Family, Request

ShotChoice = Literal["random", "own", "similar"]
_CHOICES = ("random", "own", "similar")


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive training events of one user; the last one is what the example solves."""

    user_id: str
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Examples for one request, and what of its history the question still shows."""

    windows: tuple[Window, ...]
    history: tuple[Event, ...]


class ShotPool:
    """Draws examples by name: which ones a request gets depends on nothing but the data, the seed and the request.

    Args:
        family: Whose examples these are.
        events: Usable training events by user, oldest first.
        seed: The run's seed.
        choice: ``random``: other users' events; ``own``: the user's own earlier events, cut off the shown history so
            that nothing stands twice; ``similar``: users whose training items overlap most (Jaccard) with the history.
        least: Events that an example needs, the solved one included.
    """

    def __init__(
        self, family: Family, events: Mapping[str, tuple[Event, ...]], *, seed: int, choice: str, least: int
    ) -> None:
        if choice not in _CHOICES:
            raise RecipeError(
                f"unknown shot choice {choice!r}{did_you_mean(choice, _CHOICES)}; known: {', '.join(_CHOICES)}"
            )
        self._family = family
        self._events = events
        self._seed = seed
        self._choice = choice
        self._least = least
        self._users = sorted(user for user, past in events.items() if len(past) >= least)

    def draw(self, request: Request, past: Sequence[Event], shots: int, history: int) -> Drawn:
        """Draw ``shots`` examples for a request.

        An example shows at most half as much history as the question: many short ones teach more than few long ones.

        Args:
            request: The question.
            past: The usable events of its history, oldest first.
            shots: How many examples.
            history: How many events the question may show.

        Raises:
            DataError: If there are fewer other users than examples are asked for.
        """
        latest = tuple(past[-history:])
        if shots == 0:
            return Drawn((), latest)
        length = max(1, history // 2)
        own: list[Window] = []
        if self._choice == "own":
            own, latest = self._own(request.user_id, past, shots, length, history)
        missing = shots - len(own)
        others = self._others(request, past, missing)
        rng = keyed(f"{self._family} shots", self._seed, request.id)
        drawn = []
        for user in others:
            events = self._events[user]
            # A window is short only where the user's past is.
            end = rng.randrange(max(self._least, min(length + 1, len(events))), len(events) + 1)
            drawn.append(Window(user, events[max(0, end - length - 1) : end]))
        return Drawn((*drawn, *own), latest)

    def _own(
        self, user: str, past: Sequence[Event], shots: int, length: int, history: int
    ) -> tuple[list[Window], tuple[Event, ...]]:
        """Cut earlier windows off the history; the question keeps at least its later half."""
        trained = {event.item_id for event in self._events.get(user, ())}
        usable = next((i for i, event in enumerate(past) if event.item_id not in trained), len(past))
        kept = min(history, max(len(past) - shots * (length + 1), -(-len(past) // 2)))
        end = min(usable, len(past) - kept)
        shots = min(shots, end // self._least)
        if shots == 0:
            return [], tuple(past[-history:])
        size = min(length + 1, end // shots)
        starts = range(end - size * shots, end, size)
        windows = [Window(user, tuple(past[start : start + size])) for start in starts]
        return windows, tuple(past[len(past) - kept :])

    def _others(self, request: Request, past: Sequence[Event], count: int) -> list[str]:
        if count == 0:
            return []
        chosen = self._similar(request.user_id, past)[:count] if self._choice == "similar" else []
        taken = {request.user_id, *chosen}
        rest = count - len(chosen)
        if rest:
            rng = keyed(f"{self._family} shot users", self._seed, request.id)
            sample = rng.sample(self._users, min(rest + len(taken), len(self._users)))
            free = [user for user in sample if user not in taken][:rest]
            if len(free) < rest:
                raise DataError(
                    f"tasks.{self._family}: {count} few-shot examples are asked for, but only {len(self._users)} users "
                    "have training interactions to draw them from; lower eval.shots.k"
                )
            chosen += free
        return chosen

    def _similar(self, user: str, past: Sequence[Event]) -> list[str]:
        """Return users by the Jaccard overlap of their training items with the history, best first, ties by hash."""
        items = {event.item_id for event in past}
        lists = [self._index[item] for item in items if item in self._index]
        if not lists:
            return []
        common = np.bincount(np.concatenate(lists), minlength=len(self._users))
        overlap = common / (self._sizes + len(items) - common)
        order = np.lexsort((self._ties, -overlap))
        return [self._users[i] for i in order if common[i] > 0 and self._users[i] != user]

    @cached_property
    def _index(self) -> Mapping[str, NDArray[np.int64]]:
        places: dict[str, list[int]] = {}
        for place, user in enumerate(self._users):
            for item in {event.item_id for event in self._events[user]}:
                places.setdefault(item, []).append(place)
        return {item: np.array(users, dtype=np.int64) for item, users in places.items()}

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return np.array([len({event.item_id for event in self._events[user]}) for user in self._users], dtype=np.int64)

    @cached_property
    def _ties(self) -> NDArray[np.uint64]:
        return hash64("similar users", self._seed, self._users)
