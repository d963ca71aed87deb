"""Users of the data with whom conversations are held: what each wants, and what is known of them when they begin.

A user wants an item of a held-out part. The profile begins with the last items of the training part, liked or known
already, as for a user who is logged in; what was chosen before is not shown either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llmrec.chat.conversation import Conversation
from llmrec.chat.facts import Facts
from llmrec.chat.simulator import Held, SimulatedUser, hold, told_of
from llmrec.chat.state import ITEM, MOST_SHOWN, State, Wish
from llmrec.data.hashing import hash64
from llmrec.data.split import SplitDataset, scale_of, threshold
from llmrec.errors import DataError

# Earlier items that are not shown, so that as many lists as a conversation has still fit beside them.
_EARLIER = MOST_SHOWN - 100


@dataclass(frozen=True)
class Guest:
    """A user of the data who comes for one item.

    Attributes:
        user: Id.
        target: Id of the item that is wanted.
        state: What a conversation begins with.
        liked: Ids of liked items, some of which the user names.
    """

    user: str
    target: str
    state: State
    liked: tuple[str, ...]


def guests(
    data: SplitDataset,
    facts: Facts,
    users: int,
    seed: int,
    *,
    split: Literal["valid", "test"] = "test",
    past: int = 40,
    liked: float | None = None,
) -> list[Guest]:
    """Draw users by a hash, so that fewer of them are the first of more.

    Args:
        data: The split; the profile is of its training part.
        facts: Of the catalogue.
        users: How many, at most.
        seed: Of the draw.
        split: Whose first held-out item each of them wants; who knows that item already wants nothing.
        past: Last items that the profile begins with.
        liked: Lowest rating of a liked item; None: three quarters up the scale. Items without a rating are liked.
    """
    if not any(facts.told(name) for name in facts.items):
        raise DataError(
            "no item has a field that a user could ask for; give the table of items columns such as genres or brand, "
            "and name them under data.columns.fields",
            kind="empty",
            column="data.columns.fields",
        )
    rated = data.train["rating"].null_count() < len(data.train)
    least = threshold(scale_of(data), liked) if rated else 0.0
    known: dict[str, list[tuple[str, bool]]] = {}
    for user, item, rating in data.train.select("user_id", "item_id", "rating").iter_rows():
        known.setdefault(str(user), []).append((str(item), rating is None or rating >= least))
    wanted: dict[str, str] = {}
    for user, item in (data.test if split == "test" else data.valid).select("user_id", "item_id").iter_rows():
        if str(item) in facts.items:
            wanted.setdefault(str(user), str(item))
    names = [user for user, item in wanted.items() if all(item != name for name, _ in known.get(user, ()))]
    if not names:
        raise DataError(
            f"no user has an item in the part {split} that is new to them, so nobody wants anything; choose another "
            "split",
            kind="empty",
            column="split",
        )
    order = np.argsort(hash64("chat", seed, names), kind="stable")[:users]
    return [_guest(user, wanted[user], known.get(user, []), past) for user in (names[place] for place in order)]


def _guest(user: str, target: str, known: Sequence[tuple[str, bool]], past: int) -> Guest:
    at = max(0, len(known) - past)
    wishes = [Wish(field=ITEM, op="is" if likes else "seen", value=item, hard=False) for item, likes in known[at:]]
    earlier = tuple(item for item, _ in known[:at])[-_EARLIER:]
    liked = tuple(item for item, likes in known[at:] if likes)
    return Guest(user, target, State(profile=tuple(wishes), past=earlier), liked)


def talks(
    conversation: Conversation, every: Sequence[Guest], seed: int, turns: int, knows: Sequence[str] = ()
) -> Iterator[tuple[Guest, Held]]:
    """Hold a conversation with each user.

    Args:
        conversation: With whom.
        every: The users, who say the same to every manager as far as it asks the same.
        seed: Of what they bring up, and of their words.
        turns: At most.
        knows: Fields that they know; empty: all.
    """
    facts = conversation.tools.facts
    for number, guest in enumerate(every):
        own = seed * 1000 + number
        wanted = told_of(facts, guest.target, guest.liked, own)
        if knows:
            attributes = {field: values for field, values in wanted.attributes.items() if field in knows}
            unwanted = tuple(item for item in wanted.unwanted if item[0] in knows)
            wanted = replace(wanted, attributes=attributes, unwanted=unwanted)
        user = SimulatedUser(wanted, facts.numeric, own)
        yield guest, hold(conversation, user, guest.target, turns, guest.state)
