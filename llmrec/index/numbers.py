"""Codes without meaning: random numbers, numbers in training order, and one token per item.

Numbers are ordinary text, which the tokenizer splits, or new tokens of ``index.digits`` digits each; an item token is
one entry of the vocabulary. (Hua et al., "How to Index Item IDs for Recommendation Foundation Models", SIGIR-AP 2023:
RID, SID and IID.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmrec.data.hashing import hash64
from llmrec.errors import DataError
from llmrec.index.table import Embed, ItemIndex, item_token, level_token, user_token
from llmrec.recipe.schema import IndexSection
from llmrec.types import Item

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset


class _Numbers:
    """Base class of schemes that number items."""

    @staticmethod
    def extend(index: ItemIndex, items: Mapping[str, Item], *, embed: Embed | None = None) -> ItemIndex:
        """Assign the next free numbers to new items; see `Scheme`.

        Raises:
            DataError: If the numbers do not fit into the tokens of a code.
        """
        start = int(index.settings["next"])
        order = shuffle_by_hash(items, int(index.settings["seed"]))
        digits, levels = (int(index.settings.get(key, 0)) for key in ("digits", "levels"))
        if digits and start + len(items) > 10 ** (digits * levels):
            raise DataError(
                f"index {index.scheme}: {len(items)} more items, numbered from {start}, do not fit into {levels} "
                f"tokens of {digits} digits; build the index again with these items, and fine-tune again",
                kind="exhausted",
            )
        codes = {
            item: _number_tokens(number, digits, levels) if digits else (str(number),)
            for number, item in enumerate(order, start)
        }
        return index.adding(codes, next=start + len(items))


class RandomNumbers(_Numbers):
    """Numbers assigned by a seeded hash of the item's id."""

    @staticmethod
    def build(section: IndexSection, data: SplitDataset, *, seed: int, embed: Embed | None = None) -> ItemIndex:
        """Assign codes to items; see `Scheme`."""
        return _build_number_index("random", shuffle_by_hash(data.dataset.items, seed), section, seed)


class SequentialNumbers(_Numbers):
    """Numbers items in the order in which they first occur in the training histories.

    Consecutive items of a user get neighbouring numbers. Held-out interactions are not read: items without training
    interactions are numbered last, by hash. P5's published files include them, so the next number reveals the
    answer (`docs/index-sequential.md`).
    """

    @staticmethod
    def build(section: IndexSection, data: SplitDataset, *, seed: int, embed: Embed | None = None) -> ItemIndex:
        """Assign codes to items; see `Scheme`."""
        histories = {user: [event.item_id for event in data.train_events(user)] for user in data.users()}
        first = dict.fromkeys(item for user in sort_users(histories, section.order, seed) for item in histories[user])
        rest = [item for item in shuffle_by_hash(data.dataset.items, seed) if item not in first]
        return _build_number_index("sequential", [*first, *rest], section, seed)


class ItemTokens:
    """One new token per item, without shared tokens."""

    @staticmethod
    def build(section: IndexSection, data: SplitDataset, *, seed: int, embed: Embed | None = None) -> ItemIndex:
        """Assign codes to items; see `Scheme`."""
        codes = {item: (item_token(n),) for n, item in enumerate(shuffle_by_hash(data.dataset.items, seed))}
        return ItemIndex("token", codes, tokens=tuple(piece for (piece,) in codes.values()), settings={"seed": seed})

    @staticmethod
    def extend(index: ItemIndex, items: Mapping[str, Item], *, embed: Embed | None = None) -> ItemIndex:
        """Add a token for each new item, which a trained model does not know; see `Scheme`."""
        start = len(index.tokens)
        order = shuffle_by_hash(items, int(index.settings["seed"]))
        codes = {item: (item_token(n),) for n, item in enumerate(order, start)}
        return index.adding(codes, [piece for (piece,) in codes.values()])


def user_tokens(users: Iterable[str], seed: int) -> dict[str, str]:
    """Return one token for each user, in the order of a seeded hash (P5-I, RecSys 2022)."""
    names = sorted(users)
    order = np.argsort(hash64("user tokens", seed, names), kind="stable")
    return {names[index]: user_token(number) for number, index in enumerate(order)}


def shuffle_by_hash(items: Mapping[str, Item] | Sequence[str], seed: int) -> list[str]:
    """Return items in the order of a seeded hash of their ids."""
    names = sorted(items)
    return [names[index] for index in np.argsort(hash64("item codes", seed, names), kind="stable")]


def sort_users(histories: Mapping[str, Sequence[str]], order: str, seed: int) -> list[str]:
    """Sort users by id (numerically if possible), by length of training history, or by hash; ties by id."""
    users = sorted(histories, key=_natural_sort_key)
    if order == "random":
        return [users[index] for index in np.argsort(hash64("user order", seed, users), kind="stable")]
    if order == "user":
        return users
    return sorted(users, key=lambda user: len(histories[user]), reverse=order == "longest")


def _natural_sort_key(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _build_number_index(scheme: str, order: Sequence[str], section: IndexSection, seed: int) -> ItemIndex:
    settings = {"seed": seed, "next": section.first + len(order)}
    if section.digits is None:
        codes = {item: (str(number),) for number, item in enumerate(order, section.first)}
        return ItemIndex(scheme, codes, settings=settings)
    levels = -(-len(str(section.first + len(order) - 1)) // section.digits)
    pieces = {item: _number_tokens(number, section.digits, levels) for number, item in enumerate(order, section.first)}
    tokens = [level_token(level, value) for level in range(levels) for value in range(10**section.digits)]
    settings |= {"digits": section.digits, "levels": levels}
    return ItemIndex(scheme, pieces, tokens=tuple(tokens), settings=settings)


def _number_tokens(number: int, digits: int, levels: int) -> tuple[str, ...]:
    """Split a number into tokens of a fixed number of digits, such as 1023 into 10 and 23."""
    written = str(number).zfill(levels * digits)
    return tuple(level_token(level, int(written[level * digits : (level + 1) * digits])) for level in range(levels))
