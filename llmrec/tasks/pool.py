"""Items that a user has not had in training, rejected ones, and pools of a few fixed rows (TALLRec, section 4)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count as numbers
from typing import Protocol, runtime_checkable

from llmrec.data.split import SplitDataset
from llmrec.errors import DataError, RecipeError
from llmrec.recipe.schema import PreferenceSection
from llmrec.tasks.base import keyed
from llmrec.tasks.task import EventLists, Task
from llmrec.types import Event, Example

# Rows read in a row without a new one before a stream counts as exhausted.
_PATIENCE = 2000


@runtime_checkable
class Classed(Protocol):
    """A task whose rows fall into classes that a pool holds in equal numbers."""

    kinds: tuple[str, ...]

    def kind(self, example: Example) -> str:
        """Return the class of a training row."""
        ...


def pool(task: Task, count: int) -> tuple[Example, ...]:
    """Return ``count`` different rows of a task: the first of its training stream, in the stream's order.

    Two rows are alike if they show the same events of the same user and end at the same one, whatever the words. Of a
    `Classed` task as many rows of each class are taken; one class makes up for another that has too few. The pool of
    a smaller count is part of that of a larger one, as long as no class runs out.

    Raises:
        RecipeError: If there are not so many different rows.
    """
    kinds = task.kinds if isinstance(task, Classed) else ()
    room = {kind: count // len(kinds) + (place < count % len(kinds)) for place, kind in enumerate(kinds)}
    taken: Counter[str] = Counter()
    chosen: dict[int, Example] = {}
    spare: dict[int, Example] = {}
    seen = set()
    since = 0
    for place, example in enumerate(task.examples("train")):
        since += 1
        if since > _PATIENCE or len(chosen) == count:
            break
        key = (example.user_id, example.pairs) if example.pairs else (example.messages, example.answer)
        if key in seen:
            continue
        seen.add(key)
        kind = task.kind(example) if isinstance(task, Classed) else ""
        if kinds and taken[kind] >= room[kind]:
            # A class that is full is no progress, but its rows may have to stand in for another that has too few.
            spare[place] = example
            continue
        taken[kind] += 1
        chosen[place] = example
        since = 0
    for place, example in spare.items():
        if len(chosen) == count:
            break
        chosen[place] = example
    if len(chosen) < count:
        raise RecipeError(
            f"train.examples: tasks.{task.family} has only {len(chosen)} different training rows, and {count} are "
            "asked for; lower it, or leave it out",
            kind="too-few",
            column="train.examples",
        )
    return tuple(chosen[place] for place in sorted(chosen))


def training_examples(task: Task, count: int | None, seed: int) -> Iterator[Example]:
    """Yield a task's training rows without end: its own stream, or a pool of ``count``, pass after pass reshuffled."""
    if count is None:
        yield from task.examples("train")
        return
    rows = pool(task, count)
    for number in numbers():
        order = list(rows)
        keyed(f"{task.family} pool", seed, str(number)).shuffle(order)
        yield from order


class Negatives:
    """Draws items that a user has not had in training.

    What is held out is not known here: a held-out item is drawn like any other, as it would be at serving time. If it
    never were, the item that a user is never shown as a negative would be the answer.

    Args:
        data: The split data.
        kind: ``uniform`` over the catalogue, or ``popularity``: by 1 + number of training interactions.
        key: What a recipe lowers where users leave too few items.
    """

    def __init__(self, data: SplitDataset, kind: str, key: str = "eval.candidates.count") -> None:
        self._key = key
        self._catalogue = sorted(data.dataset.items)
        self._bag = list(self._catalogue)
        if kind == "popularity":
            self._bag = sorted([*self._bag, *data.train["item_id"].to_list()])
        self._train = data.train

    @cached_property
    def _trained(self) -> Mapping[str, frozenset[str]]:
        by_user: dict[str, set[str]] = {}
        for user, item in self._train.select("user_id", "item_id").iter_rows():
            by_user.setdefault(user, set()).add(item)
        return {user: frozenset(items) for user, items in by_user.items()}

    def draw(self, user: str, count: int, rng: random.Random, *, but: Collection[str] = ()) -> list[str]:
        """Return ``count`` different items.

        Args:
            user: Whose training items are left out.
            count: How many.
            rng: Random numbers.
            but: Further items that are left out.

        Raises:
            DataError: If fewer are left.
        """
        had = self._trained.get(user, frozenset()).union(but)
        free = len(self._catalogue) - len(had)
        if free < count:
            raise DataError(
                f"user {user!r} has had {len(had)} of {len(self._catalogue)} items, which leaves {free}, fewer than "
                f"the {count} negatives asked for; set {self._key} to at most {free + self._key.endswith('count')}",
                kind="too-few",
                column=self._key,
            )
        taken: dict[str, None] = {}
        for _ in range(8 * count):
            if len(taken) == count:
                break
            item = self._bag[rng.randrange(len(self._bag))]
            if item not in had:
                taken.setdefault(item)
        if len(taken) < count:
            rest = [item for item in self._bag if item not in had and item not in taken]
            while len(taken) < count:
                item = rng.choice(rest)
                taken[item] = None
                rest = [other for other in rest if other != item]
        return list(taken)


@dataclass(frozen=True)
class Rejecting:
    """Draws what training events are preferred to (``train.preference.rejected``), from training interactions alone.

    Attributes:
        family: Whose rows are made.
        events: Training events by user.
        section: ``negatives`` and ``rejected``.
        negatives: Draws items that a user has not had.
        lists: Hard items for places among a user's events, where ``rejected`` names what ranks.
    """

    family: str
    events: Mapping[str, tuple[Event, ...]]
    section: PreferenceSection
    negatives: Negatives
    lists: EventLists | None = None

    @cached_property
    def users(self) -> list[str]:
        """Users with an event that something is known to be worse than.

        Raises:
            DataError: If there is none.
        """
        if self.lists is not None and self.section.rejected != "beam":
            found = [user for user in self.events if self.lists.of(user)]
        elif self.section.rejected == "ratings":
            found = [user for user in self.events if any(self._lower(user))]
        else:
            found = list(self.events)
        if not found:
            raise DataError(
                f"tasks.{self.family}: no user has a training event with {self.section.negatives} items that "
                f"train.preference.rejected={self.section.rejected} finds; lower train.preference.negatives, or reject "
                "others",
                kind="too-few",
                column="train.preference.rejected",
            )
        return found

    def pair(self, user: str, rng: random.Random) -> tuple[int, tuple[str, ...]]:
        """Return the place of an event of one of the `users`, and what it is preferred to."""
        count = self.section.negatives
        if self.lists is not None or self.section.rejected == "ratings":
            at, items = rng.choice(self.lists.of(user) if self.lists is not None else list(self._lower(user)))
            return at, tuple(rng.sample(items, count))
        # A question about the first event has no history to show.
        at = rng.randrange(min(1, len(self.events[user]) - 1), len(self.events[user]))
        return at, tuple(self.negatives.draw(user, count, rng))

    def _lower(self, user: str) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Yield places, and items that the user first chose after that and rated lower, where there are enough."""
        events = self.events[user]
        for at in range(min(1, len(events) - 1), len(events)):
            own, known = events[at].rating, {event.item_id for event in events[: at + 1]}
            after = [event for event in events[at + 1 :] if event.item_id not in known and event.rating is not None]
            lower = dict.fromkeys(e.item_id for e in after if own is not None and (e.rating or 0.0) < own)
            if len(lower) >= self.section.negatives:
                yield at, tuple(lower)


def shuffled(items: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    """Return items in a random order."""
    mixed = list(items)
    rng.shuffle(mixed)
    return tuple(mixed)


def with_other_texts(
    event: Event, events: Mapping[str, tuple[Event, ...]], text: Callable[[Event], str], size: int, rng: random.Random
) -> list[Event]:
    """Return an event, and behind it the same with texts of other training events, ``size`` in all at most.

    Args:
        event: What the true text is about.
        events: Training events by user.
        text: Reads an event's text; no two of those returned are alike.
        size: How many events.
        rng: Random numbers.
    """
    users, found = sorted(events), {text(event): event}
    for _ in range(_PATIENCE):
        if len(found) == size:
            break
        other = rng.choice(events[rng.choice(users)])
        found.setdefault(text(other), replace(event, text=other.text))
    return list(found.values())
