"""The state of a conversation: a profile in words, candidates, shown items and messages.

A profile is a list of wishes, which the user can read, edit and delete. Hard wishes are constraints: forbidden items
are never shown until the wish is revoked. A state is plain data, so a client can store it and a transcript can be
replayed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmrec.guard import TEXT_LIMIT, clean

Op = Literal["is", "or", "not", "from", "until", "seen"]
"""``or`` is an alternative to the previous wish on the same field; ``seen`` applies only to items."""
Source = Literal["said", "inferred", "edited"]

ITEM = "item_id"
"""The field of wishes about an item itself: liked (``is``), unwanted (``not``) or already known (``seen``)."""
INFERRED_WISH_TURNS = 8
"""Number of turns after which an inferred wish expires; a stated wish holds until it is revoked."""
MAX_QUERY_CHARACTERS = 200
"""Maximum length of a search query in characters."""
MAX_PROFILE_WISHES, MAX_SHOWN_ITEMS, MAX_BUFFER_ITEMS, MAX_LINES, MAX_TURNS = 100, 1000, 200, 12, 1 << 20

_OPERATOR_WORDS = {"is": "is", "or": "or is", "not": "is not", "from": "is at least", "until": "is at most"}
_ITEM_OPERATOR_WORDS = {"is": "likes", "not": "does not want", "seen": "knows already"}


class FrozenModel(BaseModel):
    """Base class of frozen records of conversations; unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class UserPreference(FrozenModel):
    """A preference of the user.

    Attributes:
        field: A field of the catalogue, or `ITEM`.
        op: The operator of the condition.
        value: One of the field's values, or an item's id.
        hard: Whether it is a constraint; a soft wish only affects the order.
        source: Stated by the user, inferred, or edited in the profile by the user.
        turn: The turn, from 1.
        ban: Whether a bound comes from a negation: *nothing before 1999*.
    """

    field: str = Field(max_length=100)
    op: Op
    value: str = Field(max_length=1000)
    hard: bool = True
    source: Source = "said"
    turn: int = Field(0, ge=0, le=MAX_TURNS)
    ban: bool = False

    @property
    def asks(self) -> bool:
        """Whether the preference requires something, instead of excluding something."""
        return self.hard and self.field != ITEM and self.op != "not" and not self.ban

    @property
    def key(self) -> tuple[str, str]:
        """The key that must be unique in a profile."""
        return (self.field, self.op if self.op in ("from", "until") else self.value)

    def describe(self, titles: Mapping[str, str]) -> str:
        """Return the preference in words, on one line; ``titles`` has those of items by id."""
        if self.field == ITEM:
            text = f"{_ITEM_OPERATOR_WORDS.get(self.op, self.op)} {titles.get(self.value, self.value)}"
        else:
            text = f"{'' if self.hard else 'rather: '}{self.field} {_OPERATOR_WORDS[self.op]} {self.value}"
        return clean(text, TEXT_LIMIT)


class ChatMessage(FrozenModel):
    """A message of the user or the assistant."""

    role: Literal["user", "assistant"]
    text: str = Field(max_length=4000)


class State(FrozenModel):
    """The state of a conversation between turns.

    Attributes:
        turn: Number of user turns so far.
        profile: Wishes, oldest first.
        buffer: Candidates, best first.
        query: The last search; empty: none, or replaced by another request.
        shown: The last shown list, to which positions in user messages refer.
        past: All shown items, which are not shown again.
        asked: Fields that the assistant has asked about.
        lines: The last messages of both sides.
    """

    turn: int = Field(0, ge=0, le=MAX_TURNS)
    profile: tuple[UserPreference, ...] = Field((), max_length=MAX_PROFILE_WISHES)
    buffer: tuple[str, ...] = Field((), max_length=MAX_BUFFER_ITEMS)
    query: str = Field("", max_length=MAX_QUERY_CHARACTERS)
    shown: tuple[str, ...] = Field((), max_length=MAX_SHOWN_ITEMS)
    past: tuple[str, ...] = Field((), max_length=MAX_SHOWN_ITEMS)
    asked: tuple[str, ...] = Field((), max_length=MAX_PROFILE_WISHES)
    lines: tuple[ChatMessage, ...] = Field((), max_length=MAX_LINES)

    @property
    def liked(self) -> tuple[str, ...]:
        """Ids of liked items, in the order in which they were named."""
        return tuple(wish.value for wish in self.profile if wish.field == ITEM and wish.op == "is")

    @property
    def barred(self) -> frozenset[str]:
        """Ids of items that are not shown: unwanted, known, liked or already shown."""
        return frozenset(wish.value for wish in self.profile if wish.field == ITEM) | frozenset(self.past)

    def with_(self, **changes: Any) -> State:
        """Return the state with changed values."""
        return self.model_copy(update=changes)

    def saying(self, role: Literal["user", "assistant"], text: str) -> State:
        """Return the state with an additional message."""
        return self.with_(lines=(*self.lines, ChatMessage(role=role, text=text[:4000]))[-MAX_LINES:])


# --------------------------------------------------------------------------- the profile


def merge_preferences(profile: Iterable[UserPreference], new: Iterable[UserPreference]) -> tuple[UserPreference, ...]:
    """Merge new preferences into a profile.

    A wish replaces the one on the same value, or the bound on the same side; repeating one of several alternatives
    replaces all of them. An inferred wish never replaces a stated or edited one.
    """
    known = {wish.key: wish for wish in profile}
    groups = {wish.key: group for group in alternative_groups(known.values()) for wish in group}
    new = list(new)
    chosen = {wish.field for wish in new if wish.op == "or"}
    for wish in new:
        old = known.get(wish.key)
        if wish.source == "inferred" and old is not None and old.source != "inferred":
            continue
        if wish.asks:
            for other in groups.get(wish.key, ()):
                if other is not old and known.get(other.key) is other:
                    del known[other.key]
        if wish.field in chosen:
            # alternatives are kept together
            known.pop(wish.key, None)
        known[wish.key] = wish
    return _limit_profile_size(tuple(known.values()))


def _limit_profile_size(profile: tuple[UserPreference, ...]) -> tuple[UserPreference, ...]:
    """Limit the size of a profile: drop inferred preferences first, then soft, then the oldest; exclusions last."""

    def priority(wish: UserPreference) -> int:
        if wish.source == "inferred":
            return 0
        return 3 if wish.op in ("not", "seen") or wish.ban else 2 if wish.hard else 1

    order = sorted(range(len(profile)), key=lambda index: priority(profile[index]))
    return tuple(profile[index] for index in sorted(order[max(0, len(profile) - MAX_PROFILE_WISHES) :]))


def alternative_groups(profile: Iterable[UserPreference]) -> list[list[UserPreference]]:
    """Return the constraints that an item must meet, each as a list of alternative preferences.

    ``or`` adds to the last constraint on its field of the same turn; otherwise it starts a new constraint.
    """
    results: list[list[UserPreference]] = []
    for wish in (wish for wish in profile if wish.hard and wish.field != ITEM and wish.op != "not"):
        same = (group for group in reversed(results) if (group[0].field, group[0].turn) == (wish.field, wish.turn))
        last = next(same, None) if wish.op == "or" else None
        if last is None:
            results.append([wish])
        else:
            last.append(wish)
    return results


def remove_preferences(profile: Iterable[UserPreference], field: str, value: str) -> tuple[UserPreference, ...]:
    """Return a profile without the preferences about a value."""
    return tuple(wish for wish in profile if (wish.field, wish.value) != (field, value))


def drop_expired_preferences(profile: Iterable[UserPreference], turn: int) -> tuple[UserPreference, ...]:
    """Return a profile without preferences inferred more than `INFERRED_WISH_TURNS` turns ago."""
    return tuple(wish for wish in profile if wish.source != "inferred" or turn - wish.turn <= INFERRED_WISH_TURNS)


def relax_oldest_constraint(
    profile: tuple[UserPreference, ...],
) -> tuple[tuple[UserPreference, ...], UserPreference | None]:
    """Make the oldest constraint of a profile a soft preference, and return both.

    Inferred constraints go before stated ones. Alternatives are relaxed together.
    """
    groups = [group for group in alternative_groups(profile) if group[0].asks]
    if not groups:
        return profile, None
    out = min(groups, key=lambda group: (group[0].source != "inferred", group[0].turn))
    keys = {wish.key for wish in out}
    soft = {"hard": False}
    return tuple(w.model_copy(update=soft) if w.key in keys and w.asks else w for w in profile), out[0]
