"""Shared code of the tasks: template variables, training examples in seeded order, and answers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from llmrec.data.described import USER_FIELD, StoredProfile
from llmrec.data.hashing import hash_one
from llmrec.data.knowledge import FACTS_FIELD
from llmrec.data.requests import USER_FIELDS
from llmrec.data.split import SplitDataset
from llmrec.data.stats import RatingSummaries
from llmrec.errors import DataError
from llmrec.guard import TEXT_LIMIT, TITLE_LIMIT, clean
from llmrec.prompts.template import Template
from llmrec.prompts.values import Fields
from llmrec.types import (
    Answer,
    Case,
    Code,
    CodedId,
    Event,
    Interaction,
    ItemCodes,
    Ranking,
    Request,
    SplitName,
)

YES, NO = "Yes", "No"
"""Names of the two answers; prompts use the words of their template's language."""

ABOUT_USER = frozenset({"noun", "user_id", "user_name", "profile"})
ABOUT_ITEM = frozenset({"item", "item_id", "fields", "item_stats"})
USER_STATS = frozenset({"user_stats"})
"""Variables for chats only: in a list, user statistics on successive lines would reveal the ratings."""
HISTORY_VARIABLES = frozenset({"history", "liked", "disliked"})
"""Variables that show a user's history; a template without them shows none."""
# The first words of a past review are sufficient; complete reviews would leave no room for the question.
_MAX_PAST_TEXT = 160

Values = dict[str, object]


class DataView:
    """The data as shown by templates, with cleaned texts."""

    def __init__(self, data: SplitDataset, index: ItemCodes | None = None) -> None:
        self.data = data
        self.index = index
        self._items: dict[str, Fields] = {}
        self._tallies = RatingSummaries(data)

    def item(self, item_id: str) -> Fields:
        """Return the title and fields of an item, and its code if there is an index.

        Raises:
            DataError: If the catalogue has no such item.
        """
        known = self._items.get(item_id)
        if known is None:
            entry = self.data.dataset.items.get(item_id)
            if entry is None:
                raise DataError(
                    f"{self.data.dataset.name}: there is no item {item_id!r}; use items of the catalogue",
                    kind="unknown-name",
                    at=self.data.dataset.name,
                )
            title = clean(entry.title) or clean(item_id) or "untitled"
            known = Fields(title=title)
            for name, text in sorted(entry.fields.items()):
                known.setdefault(name, clean(text, TEXT_LIMIT if name == FACTS_FIELD else TITLE_LIMIT))
            if self.index is not None:
                known["code"] = self.index.encode(item_id)
            self._items[item_id] = known
        return known

    def title(self, item_id: str) -> str:
        """Return the title of an item on one line; never empty."""
        return str(self.item(item_id)["title"])

    def about(self, item_id: str) -> Values:
        """Return the template variables about an item.

        Without a user there are no statistics, since it is unknown whose interactions to exclude: see `pair`.
        """
        item = self.item(item_id)
        fields = [{"name": name, "value": value} for name, value in self._further_fields(item)]
        shown_id = CodedId(item_id, self.index.encode(item_id)) if self.index and self.index.writes_ids else item_id
        return {"item": item, "item_id": shown_id, "fields": fields, "item_stats": None}

    def pair(self, user_id: str, item_id: str) -> Values:
        """Return the template variables about a user and an item, without statistics of interactions between them.

        Statistics are functions, evaluated when a template shows them.
        """
        counted = {"item_stats": partial(self._item_stats, item_id, user_id)}
        return self.about(item_id) | counted | self.user_stats(user_id, [item_id])

    def user_stats(self, user_id: str, without: Collection[str]) -> Values:
        """Return the training statistics of a user, without items that are possible answers."""
        return {"user_stats": lambda: self._tallies.user(user_id, without).shown}

    def candidate(self, user_id: str, item_id: str) -> Values:
        """Return the template variables of a candidate, with count and mean rating without the user's interactions."""

        def stat(name: str) -> object:
            return (self._item_stats(item_id, user_id) or {}).get(name)

        counted = {name: partial(stat, name) for name in ("count", "mean")}
        return {**self._shown(item_id), **counted}

    def _shown(self, item_id: str) -> Values:
        """Return the template variables of an item in a list."""
        return {**self._fields, **self.item(item_id), "details": partial(self.details, item_id)}

    @cached_property
    def _fields(self) -> Values:
        return dict.fromkeys(name for item in self.data.dataset.items.values() for name in item.fields)

    def details(self, item_id: str) -> str:
        """Return the fields of an item beyond its title as one text; empty if there are none."""
        return "; ".join(value for _, value in self._further_fields(self.item(item_id)))

    def _item_stats(self, item_id: str, user_id: str) -> Mapping[str, object] | None:
        return self._tallies.item(item_id, user_id).shown

    def _further_fields(self, item: Fields) -> list[tuple[str, str]]:
        shown = ("title",) if self.index is None else ("title", "code")
        message = [(name, str(value)) for name, value in item.items() if name not in shown and value]
        return [(name, value) for name, value in message if value not in str(item["title"])]

    def user(self, user_id: str, context: Mapping[str, str] | None = None) -> Values:
        """Return the template variables about a user; a profile or fields in ``context`` take precedence.

        The name defaults to the id.
        """
        fields = self.data.dataset.users.get(user_id, {})
        token = self.index.users.get(user_id) if self.index is not None else None
        user_id = user_id if token is None else CodedId(user_id, Code(token))
        if context and context.get(USER_FIELDS):
            fields = json.loads(context[USER_FIELDS])
        name = fields.get("name") or user_id
        if context and context.get("profile"):
            fields = {USER_FIELD: context["profile"]}
        elif isinstance(text := fields.get(USER_FIELD), StoredProfile):
            fields = {USER_FIELD: text}
        profile = [{"name": clean(name), "value": clean(value)} for name, value in fields.items() if clean(value)]
        known: Values = {"noun": self.data.dataset.noun, "user_id": user_id, "user_name": name, "profile": profile}
        return known | {"user_stats": None}

    def events(self, events: Sequence[Event], rating_label: Callable[[float], str] | None = None) -> list[Values]:
        """Return the template variables of interactions in a list.

        Each has the fields of its item by name, ``title``, ``details``, ``code``, ``rating``, ``text`` and ``n``,
        counted from 1; these take precedence over fields of the same name.
        """
        return [
            {
                **self._shown(event.item_id),
                "code": self.item(event.item_id)["code"],
                "rating": None if event.rating is None or rating_label is None else rating_label(event.rating),
                "text": clean(event.text or "", _MAX_PAST_TEXT),
                "n": n,
            }
            for n, event in enumerate(events, start=1)
        ]


# --------------------------------------------------------------------------- training examples


@dataclass(frozen=True, slots=True)
class ExampleDraw:
    """A training example before it is rendered as text.

    Attributes:
        id: The example's id.
        user_id: The user of the interactions.
        template: The template that it will use.
        events: The shown interactions, oldest first.
        first_target: For list templates, the first target; earlier interactions are context.
    """

    id: str
    user_id: str
    template: Template
    events: tuple[Event, ...]
    first_target: int


def describe_events(template: Template, history: int, shots: int) -> str:
    """Describe the number of interactions and of few-shot examples in a prompt."""
    shows = template.shape == "list" or HISTORY_VARIABLES & template.names("system", "user")
    return (f"text of the last {history} events" if shows else "no history") + describe_shots(shots)


def describe_shots(shots: int) -> str:
    """Describe the number of few-shot examples in a prompt."""
    return f", {shots} solved examples" if shots else ""


def count_training_rows(data: SplitDataset, column: str | None = None) -> int:
    """Return the number of training interactions, optionally only with a value in ``column``."""
    return len(data.train) if column is None else len(data.train) - data.train[column].null_count()


def seeded_random(purpose: str, seed: int, *parts: str) -> random.Random:
    """Return a random generator seeded by its arguments."""
    return random.Random(hash_one(purpose, seed, *parts))


def required_candidates(request: Request) -> tuple[str, ...]:
    """Return the candidates of a request, or raise an error if it has none.

    Raises:
        DataError: If there are none.
    """
    if not request.candidates:
        raise DataError(
            f"request {request.id!r} has no candidates to rank; set Request.candidates",
            kind="missing-value",
            column="candidates",
        )
    return request.candidates


class UserHistories(Mapping[str, tuple[Event, ...]]):
    """Training interactions of a task by user, read from the split on access.

    Args:
        data: The split.
        keep: Selects a user's interactions for the family; None: all.
        least: Minimum number per user; users with fewer are omitted.
        rated: Keep interactions with a rating, instead of ``keep``.
    """

    def __init__(
        self,
        data: SplitDataset,
        keep: Callable[[str, tuple[Event, ...]], tuple[Event, ...]] | None = None,
        *,
        least: int = 1,
        rated: bool = False,
    ) -> None:
        self._data, self._keep = data, (lambda _, events: rated_events(events)) if rated else keep
        if rated or keep is None:
            counts = data.train_counts(rated=rated)
        else:
            counts = {user: len(self._create(user)) for user in data.users()}
        self._users = {user: size for user, size in counts.items() if size >= least}

    def __getitem__(self, user: str) -> tuple[Event, ...]:
        """Return the training interactions of a user, oldest first."""
        if user not in self._users:
            raise KeyError(user)
        return self._create(user)

    def sizes(self) -> Mapping[str, int]:
        """Return the number of interactions of each user, without reading them."""
        return self._users

    def __iter__(self) -> Iterator[str]:
        """Iterate over the users in sorted order."""
        return iter(self._users)

    def __len__(self) -> int:
        """Return the number of users."""
        return len(self._users)

    def __contains__(self, user: object) -> bool:
        """Whether a user has enough interactions for an example."""
        return user in self._users

    def _create(self, user: str) -> tuple[Event, ...]:
        events = self._data.train_events(user)
        return events if self._keep is None else self._keep(user, events)


def iterate_user_passes(
    family: str, users: Sequence[str], seed: int, limit: int | None
) -> Iterator[tuple[str, str, random.Random]]:
    """Yield (example id, user, random generator) endlessly, in repeated passes over the users in random order.

    Raises:
        DataError: If there is no user to train on.
    """
    if not users:
        raise DataError(
            f"tasks.{family}: no user has enough training interactions; use more data or remove the task",
            kind="too-few",
            column=f"tasks.{family}",
        )
    done = 0
    number = 0
    while limit is None or done < limit:
        order = sorted(users)
        seeded_random(f"{family} order", seed, str(number)).shuffle(order)
        for user in order[: None if limit is None else limit - done]:
            yield f"{family}/train/{number}/{user}", user, seeded_random(f"{family} row", seed, str(number), user)
        done += len(order)
        number += 1


def check_not_test(split: SplitName) -> None:
    """Reject the test split, which must not be used for training or model selection."""
    if split == "test":
        raise ValueError("examples with targets come from 'train' or 'valid'; the test split is only for cases()")


def rated_events(events: Sequence[Event]) -> tuple[Event, ...]:
    """Return the interactions that have a rating."""
    return tuple(event for event in events if event.rating is not None)


def event_text(event: Event | Interaction) -> str:
    """Return the text of an interaction on one line; empty if it has none."""
    return clean(event.text or "", TEXT_LIMIT)


def user_item_pairs(user_id: str, events: Sequence[Event]) -> tuple[tuple[str, str], ...]:
    """Return the (user_id, item_id) pairs shown in an example."""
    return tuple((user_id, event.item_id) for event in events)


def sample_window(events: Sequence[Event], length: int, rng: random.Random) -> tuple[Event, ...]:
    """Return ``length`` consecutive interactions from a random start, or all if there are fewer."""
    start = rng.randrange(max(1, len(events) - length + 1))
    return tuple(events[start : start + length])


def requested_item(request: Request, family: str) -> str:
    """Return the item of a request, or raise an error if it has none.

    Raises:
        DataError: If it names no item.
    """
    if request.item is None:
        raise DataError(
            f"request {request.id!r}: the {family} task needs an item; set Request.item",
            kind="missing-value",
            column="item",
        )
    return request.item


def ranking_reward(answer: Answer, case: Case) -> float:
    """Return 1 / log2(1 + rank) of the true item, averaged over ties; 0 if it is not ranked."""
    if not isinstance(answer, Ranking) or case.truth not in answer.items:
        return 0.0
    true_score = answer.scores[answer.items.index(str(case.truth))]
    above = sum(score > true_score for score in answer.scores)
    level = sum(score == true_score for score in answer.scores)
    return sum(1 / math.log2(2 + rank) for rank in range(above, above + level)) / level
