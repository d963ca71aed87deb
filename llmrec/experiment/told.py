"""Users whose own profile names an item that is held out for them: they are counted, listed and not asked about."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from llmrec.data.split import SplitDataset
from llmrec.guard import clean

NAMED = 6
"""Shorter titles ("Emma", "Heat") are words of many texts, and do not name an item where they stand in one."""


@dataclass(frozen=True)
class Told:
    """A profile that tells an answer: whose, in which of its fields, and which item."""

    user_id: str
    field: str
    item_id: str


def told(data: SplitDataset) -> tuple[Told, ...]:
    """Return every place where a profile, as prompts show it, names an item that is held out for its user."""
    profiles, held = data.dataset.users, defaultdict[str, dict[str, str]](dict)
    for user, item in sorted(pair for pair in data.held_out if pair[0] in profiles):
        title = data.dataset.titles.get(item, "")
        if len(title) >= NAMED:
            held[user][title] = item
    return tuple(
        Told(user, name, item)
        for user, titles in held.items()
        for name, text in profiles[user].items()
        for title, item in titles.items()
        if title in clean(text)
    )


def users(places: tuple[Told, ...]) -> tuple[str, ...]:
    """Return whose profiles these are, each once."""
    return tuple(dict.fromkeys(each.user_id for each in places))


def sentence(data: SplitDataset, places: tuple[Told, ...]) -> str:
    """Say how many users are set aside; empty if none is."""
    count, first = len(users(places)), places[0] if places else None
    if first is None:
        return ""
    whose = "1 user is" if count == 1 else f"{count:,} users are"
    return (
        f"{whose} set aside from evaluation, of {len(data.dataset.users):,} with a profile in {data.dataset.name}: "
        f"the profile names an item that is held out for its own user, such as item {first.item_id} in the field "
        f"{first.field!r} of user {first.user_id}"
    )
