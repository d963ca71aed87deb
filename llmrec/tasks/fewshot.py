"""Selects few-shot examples from training interactions."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llmrec.data.hashing import hash64
from llmrec.errors import DataError, RecipeError
from llmrec.recipe.schema import ShotChoice
from llmrec.tasks.base import UserHistories, seeded_random
from llmrec.tasks.history import ItemVectors, ShownHistory
from llmrec.types import Event, Request

TEXT_CHOICES = ("nearest", "diverse")
"""Methods of choosing examples that compare item texts."""
# For `diverse`: number of users to choose among, as a multiple of the examples; and the weight of similarity to the
# question versus similarity to chosen examples (Carbonell and Goldstein, SIGIR 1998, equation 1).
_POOL_FACTOR, _SIMILARITY_WEIGHT = 10, 0.3


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive training interactions of a user; the last one is the target of the example."""

    user_id: str
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class FewShotDraw:
    """The few-shot examples for a request, and the remaining history of the question."""

    windows: tuple[Window, ...]
    history: tuple[Event, ...]
    summary: str = ""

    def context(self, given: Mapping[str, str]) -> Mapping[str, str]:
        """Return the context of a request; if there is no profile, a summary of the history replaces it."""
        return ShownHistory(self.history, self.summary).context(given)


class ShotPool:
    """Draws few-shot examples that depend only on the data, the seed and the request.

    Args:
        family: The task family.
        events: Usable training interactions by user, oldest first.
        seed: The run's seed.
        choice: ``random``: other users' interactions; ``own``: the user's own earlier interactions, removed from the
            shown history so that nothing occurs twice; ``similar``: users whose training items overlap most (Jaccard)
            with the history; ``nearest``: users whose latest items have the texts most similar to the latest of the
            history; ``diverse``: of the nearest, those least similar to each other; ``recent``: the latest interactions
            of all; ``balanced``: other users' interactions, every answer equally often.
        least: Minimum number of interactions of an example, including the target.
        vectors: Item vectors, for ``nearest`` and ``diverse``.
        label: The answer for an interaction, for ``balanced``; None if a family's answers are not a few labels.
    """

    def __init__(
        self,
        family: str,
        events: Mapping[str, tuple[Event, ...]],
        *,
        seed: int,
        choice: ShotChoice,
        least: int,
        vectors: ItemVectors | None = None,
        label: Callable[[Event], Hashable] | None = None,
    ) -> None:
        if choice == "balanced" and label is None:
            raise RecipeError(
                f"eval.shots.choice: 'balanced' needs a few answer labels, which tasks.{family} does not have; choose "
                "another value, or remove the task",
                kind="contradiction",
                column="eval.shots.choice",
            )
        if choice in TEXT_CHOICES and vectors is None:
            raise RecipeError(
                f"eval.shots.choice: {choice!r} compares item texts, but there is no text encoder",
                kind="unsupported",
                column="eval.shots.choice",
            )
        self._vectors, self._label = vectors, label
        self._family = family
        self._events = events
        self._seed = seed
        self._choice = choice
        self._least = least
        sizes = (
            events.sizes() if isinstance(events, UserHistories) else {user: len(past) for user, past in events.items()}
        )
        self._users = sorted(user for user, size in sizes.items() if size >= least)
        self._mean_vectors: dict[int, NDArray[np.float32]] = {}

    def draw(
        self,
        request: Request,
        past: Sequence[Event],
        shots: int,
        history: int,
        shown: ShownHistory | None = None,
    ) -> FewShotDraw:
        """Draw ``shots`` examples for a request.

        An example shows at most half as much history as the question: many short examples teach more than few long
        ones.

        Args:
            request: The question.
            past: The available interactions of its history, oldest first.
            shots: Number of examples.
            history: The maximum number of interactions in the question.
            shown: These interactions; by default the latest.

        Raises:
            DataError: If there are fewer other users than requested examples.
        """
        shown = shown or ShownHistory(tuple(past[-history:]))
        if shots == 0:
            return FewShotDraw((), shown.events, shown.summary)
        length = max(1, history // 2)
        windows: list[Window] = []
        if self._choice == "own":
            windows, latest = self._from_history(request.user_id, past, shots, length, history)
            shown = ShownHistory(latest) if windows else shown
        missing = shots - len(windows)
        rng = seeded_random(f"{self._family} shots", self._seed, request.id)
        if self._choice == "balanced":
            ends = self._sample_balanced(request, missing)
        else:
            users = self._others(request, past, missing, length)
            # a window is shorter only if the user's history is
            least = [max(self._least, min(length + 1, len(self._events[user]))) for user in users]
            late = self._choice == "recent"
            ends = [
                (user, len(self._events[user]) if late else rng.randrange(first, len(self._events[user]) + 1))
                for user, first in zip(users, least, strict=True)
            ]
        drawn = [Window(user, self._events[user][max(0, end - length - 1) : end]) for user, end in ends]
        return FewShotDraw((*drawn, *windows), shown.events, shown.summary)

    def _from_history(
        self, user: str, past: Sequence[Event], shots: int, length: int, history: int
    ) -> tuple[list[Window], tuple[Event, ...]]:
        """Take examples from the start of the user's history, but leave at least the later half for the question."""
        trained = {event.item_id for event in self._events.get(user, ())}
        usable = next((i for i, event in enumerate(past) if event.item_id not in trained), len(past))
        kept = min(history, max(len(past) - shots * (length + 1), -(-len(past) // 2)))
        end = min(usable, len(past) - kept)
        shots = min(shots, end // self._least)
        if shots == 0:
            return [], ()
        size = min(length + 1, end // shots)
        starts = range(end - size * shots, end, size)
        windows = [Window(user, tuple(past[start : start + size])) for start in starts]
        return windows, tuple(past[len(past) - kept :])

    def _others(self, request: Request, past: Sequence[Event], count: int, length: int) -> list[str]:
        if count == 0:
            return []
        chosen: list[str] = []
        if self._choice == "similar":
            chosen = self._similar(request.user_id, past)[:count]
        elif self._choice == "recent":
            chosen = [user for user in self._latest[: count + 1] if user != request.user_id][:count]
        elif self._choice in TEXT_CHOICES and past:
            chosen = self._near(request.user_id, past[-length:], count)
        taken = {request.user_id, *chosen}
        rest = count - len(chosen)
        if rest:
            rng = seeded_random(f"{self._family} shot users", self._seed, request.id)
            sample = rng.sample(self._users, min(rest + len(taken), len(self._users)))
            free = [user for user in sample if user not in taken][:rest]
            if len(free) < rest:
                raise self._too_few(count)
            chosen += free
        return chosen

    def _too_few(self, count: int) -> DataError:
        return DataError(
            f"tasks.{self._family}: {count} few-shot examples are requested, but only {len(self._users)} users have "
            "training interactions for examples; lower eval.shots.k",
            kind="too-few",
            column="eval.shots.k",
        )

    def _sample_balanced(self, request: Request, count: int) -> list[tuple[str, int]]:
        """Return (user, end) pairs with balanced answers, in seeded order.

        With fewer examples than answers, the omitted answers are drawn for every request. An answer without further
        users is skipped.
        """
        rng = seeded_random(f"{self._family} balanced shots", self._seed, request.id)
        labels = sorted(self._by_label, key=str)
        rng.shuffle(labels)
        results: list[tuple[str, int]] = []
        taken = {request.user_id}
        turn = 0
        while len(results) < count and labels:
            label = labels[turn % len(labels)]
            chosen = self._free(self._by_label[label], taken, rng)
            if chosen is None:
                labels.remove(label)
                continue
            results.append(chosen)
            taken.add(chosen[0])
            turn += 1
        if len(results) < count:
            raise self._too_few(count)
        rng.shuffle(results)
        return results

    def _free(
        self, pool: Sequence[tuple[str, int]], taken: Collection[str], rng: random.Random
    ) -> tuple[str, int] | None:
        """Draw a pair with an unused user; None if there is none."""
        few = rng.sample(pool, min(len(pool), len(taken) * 8 + 32))
        if (chosen := next((pair for pair in few if pair[0] not in taken), None)) is not None:
            return chosen
        # Nearly all pairs may belong to used users, so that random draws would not find another.
        free = [pair for pair in pool if pair[0] not in taken]
        return rng.choice(free) if free else None

    @cached_property
    def _by_label(self) -> Mapping[Hashable, list[tuple[str, int]]]:
        assert self._label is not None
        result: dict[Hashable, list[tuple[str, int]]] = {}
        for user in self._users:
            events = self._events[user]
            for end in range(self._least, len(events) + 1):
                result.setdefault(self._label(events[end - 1]), []).append((user, end))
        return result

    @cached_property
    def _latest(self) -> list[str]:
        """Users sorted by the time of their last training interaction, latest first."""
        times = np.array([self._events[user][-1].timestamp or 0.0 for user in self._users])
        return [self._users[index] for index in np.lexsort((self._ties, -times))]

    def _near(self, user: str, past: Sequence[Event], count: int) -> list[str]:
        """Return users, sorted by the similarity of their latest items to the history, by mean vectors."""
        assert self._vectors is not None
        query = _normalised_mean(self._vectors.of([event.item_id for event in past]))
        similarity = self._mean_user_vectors(len(past)) @ query
        order = [index for index in np.lexsort((self._ties, -similarity)).tolist() if self._users[index] != user]
        if self._choice == "nearest" or not order:
            return [self._users[index] for index in order[:count]]
        pool, chosen = order[: _POOL_FACTOR * count], [order[0]]
        vectors = self._mean_user_vectors(len(past))
        while len(chosen) < min(count, len(pool)):
            left = [index for index in pool if index not in chosen]
            again = (vectors[left] @ vectors[chosen].T).max(axis=1)
            gain = _SIMILARITY_WEIGHT * similarity[left] - (1 - _SIMILARITY_WEIGHT) * again
            chosen.append(left[int(np.argmax(gain))])
        return [self._users[index] for index in chosen]

    def _mean_user_vectors(self, length: int) -> NDArray[np.float32]:
        """Return the normalised mean vector of each user's latest items, shape (users, d)."""
        if length not in self._mean_vectors:
            assert self._vectors is not None
            item = [self._vectors.of([e.item_id for e in self._events[user][-length:]]) for user in self._users]
            self._mean_vectors[length] = np.stack([_normalised_mean(vectors) for vectors in item])
        return self._mean_vectors[length]

    def _similar(self, user: str, past: Sequence[Event]) -> list[str]:
        """Return users by Jaccard similarity of their training items with the history."""
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
        indices: dict[str, list[int]] = {}
        for index, user in enumerate(self._users):
            for item in {event.item_id for event in self._events[user]}:
                indices.setdefault(item, []).append(index)
        return {item: np.array(users, dtype=np.int64) for item, users in indices.items()}

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return np.array([len({event.item_id for event in self._events[user]}) for user in self._users], dtype=np.int64)

    @cached_property
    def _ties(self) -> NDArray[np.uint64]:
        return hash64("similar users", self._seed, self._users)


def _normalised_mean(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the normalised mean of vectors of shape (n, d)."""
    mean = vectors.mean(axis=0)
    unit: NDArray[np.float32] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return unit
