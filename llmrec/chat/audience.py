"""Selects users of the data, with target items and initial profiles, for simulated conversations.

A target is a held-out item. The initial profile has the last items of the training part, liked or known, as for a
logged-in user; earlier items are not recommended either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llmrec.chat.conversation import Conversation
from llmrec.chat.facts import Facts
from llmrec.chat.simulator import SimulatedConversation, SimulatedUser, sample_user_knowledge, simulate_conversation
from llmrec.chat.state import ITEM, MAX_SHOWN_ITEMS, State, UserPreference
from llmrec.data.hashing import hash64
from llmrec.data.split import SplitDataset, liked_threshold, scale_of
from llmrec.errors import DataError

# Maximum number of earlier items that are excluded, so that enough items remain for recommendations.
_MAX_EARLIER_ITEMS = MAX_SHOWN_ITEMS - 100


@dataclass(frozen=True)
class DataUser:
    """A user of the data with a target item.

    Attributes:
        user: The user's id.
        target: The id of the target item.
        state: The initial state of a conversation.
        liked: Ids of liked items, some of which the user names.
    """

    user: str
    target: str
    state: State
    liked: tuple[str, ...]


def data_users(
    data: SplitDataset,
    facts: Facts,
    users: int,
    seed: int,
    *,
    split: Literal["valid", "test"] = "test",
    past: int = 40,
    liked: float | None = None,
) -> list[DataUser]:
    """Select users by a seeded hash, so that a smaller sample is part of a larger one.

    Args:
        data: The split; profiles come from its training part.
        facts: The facts of the catalogue.
        users: The maximum number of users.
        seed: The seed of the draw.
        split: The part whose first item is the target; users who know that item already are skipped.
        past: The number of last items in the initial profile.
        liked: The minimum rating of a liked item; None: three quarters up the scale. Unrated items are liked.
    """
    if not any(facts.fields_of(name) for name in facts.items):
        raise DataError(
            "items have no fields to talk about; add columns such as genres or brand to the item table, and list "
            "them in data.columns.fields",
            kind="empty",
            column="data.columns.fields",
        )
    rated = data.train["rating"].null_count() < len(data.train)
    least = liked_threshold(scale_of(data), liked) if rated else 0.0
    known: dict[str, list[tuple[str, bool]]] = {}
    for user, item, rating in data.train.select("user_id", "item_id", "rating").iter_rows():
        known.setdefault(str(user), []).append((str(item), rating is None or rating >= least))
    targets: dict[str, str] = {}
    for user, item in (data.test if split == "test" else data.valid).select("user_id", "item_id").iter_rows():
        if str(item) in facts.items:
            targets.setdefault(str(user), str(item))
    names = [user for user, item in targets.items() if all(item != name for name, _ in known.get(user, ()))]
    if not names:
        raise DataError(
            f"no user has a new item in the split {split}, so there is no target; choose another split",
            kind="empty",
            column="split",
        )
    order = np.argsort(hash64("chat", seed, names), kind="stable")[:users]
    return [_data_user(user, targets[user], known.get(user, []), past) for user in (names[row] for row in order)]


def _data_user(user: str, target: str, known: Sequence[tuple[str, bool]], past: int) -> DataUser:
    at = max(0, len(known) - past)
    wishes = [
        UserPreference(field=ITEM, op="is" if likes else "seen", value=item, hard=False) for item, likes in known[at:]
    ]
    earlier = tuple(item for item, _ in known[:at])[-_MAX_EARLIER_ITEMS:]
    liked = tuple(item for item, likes in known[at:] if likes)
    return DataUser(user, target, State(profile=tuple(wishes), past=earlier), liked)


def data_user_conversations(
    conversation: Conversation, every: Sequence[DataUser], seed: int, turns: int, knows: Sequence[str] = ()
) -> Iterator[tuple[DataUser, SimulatedConversation]]:
    """Yield each user with a simulated conversation; their messages depend only on the questions of the manager.

    ``knows`` limits the fields that users know; empty: all.
    """
    facts = conversation.tools.facts
    for number, user in enumerate(every):
        user_seed = seed * 1000 + number
        knowledge = sample_user_knowledge(facts, user.target, user.liked, user_seed)
        if knows:
            attributes = {field: values for field, values in knowledge.attributes.items() if field in knows}
            unwanted = tuple(item for item in knowledge.unwanted if item[0] in knows)
            knowledge = replace(knowledge, attributes=attributes, unwanted=unwanted)
        simulated_user = SimulatedUser(knowledge, facts.numeric, user_seed)
        yield user, simulate_conversation(conversation, simulated_user, user.target, turns, user.state)
