"""Titles as codes: every item's title, told apart where several items share one."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from llmrec.guard import clean, without_item_tokens
from llmrec.index.table import Embed, ItemIndex
from llmrec.recipe.schema import IndexSection
from llmrec.types import Item

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset

# Soft hyphens, joiners, marks of direction, variation selectors and tags.
UNSEEN = re.compile(
    "[\u00ad\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]"
)
# What tells two items apart must stand beside a title, not replace it.
_LONGEST_FIELD = 40


class Titles:
    """Titles, as prompts show them without an index, but unique.

    Titles that differ in case or punctuation alone count as equal. Of items that share one, each gets the first field
    that none of the others has, in brackets; where no field tells all of them apart, they are counted: ``(2)``.
    """

    @staticmethod
    def build(section: IndexSection, data: SplitDataset, *, seed: int, embed: Embed | None = None) -> ItemIndex:
        """Return the codes; see `Scheme`."""
        codes, shared = _told_apart(data.dataset.items, frozenset())
        return ItemIndex("title", codes, figures={"collisions": shared / max(1, len(codes))})

    @staticmethod
    def extend(index: ItemIndex, items: Mapping[str, Item], *, embed: Embed | None = None) -> ItemIndex:
        """Write further items by their titles, told apart from the known ones; see `Scheme`."""
        codes, _ = _told_apart(items, {title_key(title) for (title,) in index.codes.values()})
        return index.adding(codes)


@lru_cache(maxsize=65536)
def title_key(title: str) -> str:
    """Return what makes two titles the same: letters, marks and digits, case folded, with single spaces.

    What cannot be seen, such as a joiner inside a Persian word or the variation selector of an emoji, does not count.
    """
    folded = UNSEEN.sub("", unicodedata.normalize("NFKC", title).casefold())
    kept = "".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in folded)
    return " ".join(kept.split()) or " ".join(folded.split())


def shown(item_id: str, item: Item) -> str:
    """Return an item's title as one line; never empty."""
    return without_item_tokens(clean(item.title) or clean(item_id) or "untitled").strip()


def _told_apart(items: Mapping[str, Item], taken: Collection[str]) -> tuple[dict[str, tuple[str, ...]], int]:
    """Return unique titles by item, and how many items shared theirs."""
    groups: dict[str, list[str]] = defaultdict(list)
    for item in sorted(items):
        groups[title_key(shown(item, items[item]))].append(item)
    used = {*taken}
    codes: dict[str, tuple[str, ...]] = {}
    # Titles of one item alone come first: none of them may be pushed aside by what another group is given.
    alone = [key for key, group in groups.items() if len(group) == 1 and key not in used]
    for key in alone:
        (item,) = groups.pop(key)
        codes[item] = (shown(item, items[item]),)
    used.update(alone)
    shared = sum(map(len, groups.values()))
    for group in groups.values():
        remarks = _remarks({item: items[item] for item in group})
        for item in group:
            title = next(t for t in _forms(shown(item, items[item]), remarks[item]) if title_key(t) not in used)
            used.add(title_key(title))
            codes[item] = (title,)
    return {item: codes[item] for item in sorted(items)}, shared


def _forms(title: str, remark: str) -> Iterator[str]:
    yield from [f"{title} ({remark})"] if remark else [title]
    number = 2
    while True:
        yield f"{title} ({number})"
        number += 1


def _remarks(group: Mapping[str, Item]) -> dict[str, str]:
    """Return the value of the first field that is short and different for every item of a group; else nothing."""
    names = dict.fromkeys(name for item in group.values() for name in item.fields)
    for name in names:
        values = {item: clean(entry.fields.get(name, "")) for item, entry in group.items()}
        keys = {title_key(value) for value in values.values() if value and len(value) <= _LONGEST_FIELD}
        if len(keys) == len(group) > 1:
            return {item: without_item_tokens(value).strip() for item, value in values.items()}
    return dict.fromkeys(group, "")
