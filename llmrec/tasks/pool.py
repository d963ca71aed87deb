"""Negative and rejected items, and fixed sets of a few training examples (TALLRec, section 4)."""

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
from llmrec.tasks.base import seeded_random
from llmrec.tasks.task import EventLists, Task
from llmrec.types import Event, Example

# Number of consecutive duplicate examples after which a stream counts as exhausted.
_PATIENCE = 2000


@runtime_checkable
class BalancedTask(Protocol):
    """A task whose examples have classes that are balanced in a small training set."""

    kinds: tuple[str, ...]

    def kind(self, example: Example) -> str:
        """Return the class of a training example."""
        ...


def distinct_examples(task: Task, count: int) -> tuple[Example, ...]:
    """Return the first ``count`` different examples of a task's training stream.

    Two examples are equal if they show the same interactions of the same user with the same last one, in any template.
    The classes of a `BalancedTask` have equal numbers of examples; another class compensates for one with too few. A
    smaller pool is a subset of a larger one as long as no class is exhausted.

    Raises:
        RecipeError: If there are fewer different examples.
    """
    kinds = task.kinds if isinstance(task, BalancedTask) else ()
    room = {kind: count // len(kinds) + (index < count % len(kinds)) for index, kind in enumerate(kinds)}
    taken: Counter[str] = Counter()
    chosen: dict[int, Example] = {}
    spare: dict[int, Example] = {}
    seen = set()
    since = 0
    for index, example in enumerate(task.examples("train")):
        since += 1
        if since > _PATIENCE or len(chosen) == count:
            break
        key = (example.user_id, example.pairs) if example.pairs else (example.messages, example.answer)
        if key in seen:
            continue
        seen.add(key)
        kind = task.kind(example) if isinstance(task, BalancedTask) else ""
        if kinds and taken[kind] >= room[kind]:
            # An example of a full class may be replaced later by one of a class with too few.
            spare[index] = example
            continue
        taken[kind] += 1
        chosen[index] = example
        since = 0
    for index, example in spare.items():
        if len(chosen) == count:
            break
        chosen[index] = example
    if len(chosen) < count:
        raise RecipeError(
            f"train.examples: tasks.{task.family} has only {len(chosen)} different training examples, but {count} are "
            "requested; lower train.examples, or remove the key",
            kind="too-few",
            column="train.examples",
        )
    return tuple(chosen[index] for index in sorted(chosen))


def training_examples(task: Task, count: int | None, seed: int) -> Iterator[Example]:
    """Yield training examples endlessly: a task's stream, or ``count`` fixed examples, reshuffled in every pass."""
    if count is None:
        yield from task.examples("train")
        return
    rows = distinct_examples(task, count)
    for number in numbers():
        order = list(rows)
        seeded_random(f"{task.family} pool", seed, str(number)).shuffle(order)
        yield from order


class NegativeSampler:
    """Draws items that a user has no training interaction with.

    Held-out items are drawn like all others, as in serving. Otherwise the item that is never a negative of a user would
    be the answer.

    Args:
        data: The split data.
        kind: ``uniform`` over the catalogue, or ``popularity``: by 1 + number of training interactions.
        key: The recipe key to lower if users leave too few items.
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
            user: The user, whose training items are excluded.
            count: Number of items.
            rng: Random numbers.
            but: Further excluded items.

        Raises:
            DataError: If there are fewer.
        """
        had = self._trained.get(user, frozenset()).union(but)
        free = len(self._catalogue) - len(had)
        if free < count:
            raise DataError(
                f"user {user!r} has interactions with {len(had)} of {len(self._catalogue)} items, so only {free} are "
                f"left for {count} negatives; set {self._key} to at most {free + self._key.endswith('count')}",
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
class RejectedItemSampler:
    """Draws rejected items for training interactions (``train.preference.rejected``), from training data only.

    Attributes:
        family: The task family.
        events: Training interactions by user.
        section: ``negatives`` and ``rejected``.
        negatives: Draws items without an interaction of the user.
        lists: Hard items for the indices of a user's interactions, if ``rejected`` names a ranker.
    """

    family: str
    events: Mapping[str, tuple[Event, ...]]
    section: PreferenceSection
    negatives: NegativeSampler
    lists: EventLists | None = None

    @cached_property
    def users(self) -> list[str]:
        """Users who have a training interaction with a rejected item.

        Raises:
            DataError: If there is none.
        """
        if self.lists is not None and self.section.rejected != "beam":
            results = [user for user in self.events if self.lists.of(user)]
        elif self.section.rejected == "ratings":
            results = [user for user in self.events if any(self._lower(user))]
        else:
            results = list(self.events)
        if not results:
            raise DataError(
                f"tasks.{self.family}: no user has a training interaction with {self.section.negatives} rejected "
                f"items by train.preference.rejected={self.section.rejected}; lower train.preference.negatives, or "
                "change train.preference.rejected",
                kind="too-few",
                column="train.preference.rejected",
            )
        return results

    def pair(self, user: str, rng: random.Random) -> tuple[int, tuple[str, ...]]:
        """Return a training interaction of one of the `users` by its index, and its rejected items."""
        count = self.section.negatives
        if self.lists is not None or self.section.rejected == "ratings":
            at, items = rng.choice(self.lists.of(user) if self.lists is not None else list(self._lower(user)))
            return at, tuple(rng.sample(items, count))
        # the first interaction has no history
        at = rng.randrange(min(1, len(self.events[user]) - 1), len(self.events[user]))
        return at, tuple(self.negatives.draw(user, count, rng))

    def _lower(self, user: str) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Yield training interactions by index, with items that the user chose later and rated lower."""
        events = self.events[user]
        for at in range(min(1, len(events) - 1), len(events)):
            rating, known = events[at].rating, {event.item_id for event in events[: at + 1]}
            after = [event for event in events[at + 1 :] if event.item_id not in known and event.rating is not None]
            lower = dict.fromkeys(e.item_id for e in after if rating is not None and (e.rating or 0.0) < rating)
            if len(lower) >= self.section.negatives:
                yield at, tuple(lower)


def shuffle_items(items: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    """Return items in a random order."""
    mixed = list(items)
    rng.shuffle(mixed)
    return tuple(mixed)


def with_other_texts(
    event: Event, events: Mapping[str, tuple[Event, ...]], text: Callable[[Event], str], size: int, rng: random.Random
) -> list[Event]:
    """Return an interaction, followed by copies with texts of other training interactions.

    Args:
        event: The interaction of the true text.
        events: Training interactions by user.
        text: Returns an interaction's text; the returned texts are all different.
        size: Maximum number of interactions.
        rng: Random numbers.
    """
    users, result = sorted(events), {text(event): event}
    for _ in range(_PATIENCE):
        if len(result) == size:
            break
        other = rng.choice(events[rng.choice(users)])
        result.setdefault(text(other), replace(event, text=other.text))
    return list(result.values())
