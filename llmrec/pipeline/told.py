"""Users whose own profile names an item that is held out for them: they are counted, listed and not asked about."""

from __future__ import annotations

from dataclasses import dataclass

from llmrec.data.described import held_titles, names
from llmrec.data.split import SplitDataset


@dataclass(frozen=True)
class Told:
    """A profile that tells an answer: whose, in which of its fields, and which item."""

    user_id: str
    field: str
    item_id: str


def told(data: SplitDataset) -> tuple[Told, ...]:
    """Return every place where a profile, as prompts show it, names an item that is held out for its user."""
    profiles = data.dataset.users
    held = held_titles(data, profiles)
    return tuple(
        Told(user, name, item)
        for user, titles in held.items()
        for name, text in profiles[user].items()
        for title, item in titles.items()
        if names(text, title)
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
