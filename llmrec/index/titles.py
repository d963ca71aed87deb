"""Titles as codes: the title of each item, made unique if several items share it."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from llmrec.guard import break_item_tokens, clean
from llmrec.index.table import Embed, ItemIndex
from llmrec.recipe.schema import IndexSection
from llmrec.types import Item

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset

# Soft hyphens, joiners, direction marks, variation selectors and tags.
INVISIBLE_CHARACTERS = re.compile(
    "[\u00ad\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]"
)
# The text that distinguishes items must fit next to a title and not replace it.
_MAX_REMARK_LENGTH = 40


class Titles:
    """The titles used in prompts without an index, made unique.

    Titles that differ only in case or punctuation count as equal. Each of the items with the same title gets the first
    field whose value is different for all of them, in parentheses; if there is none, they are numbered: ``(2)``.
    """

    @staticmethod
    def build(section: IndexSection, data: SplitDataset, *, seed: int, embed: Embed | None = None) -> ItemIndex:
        """Assign codes to items; see `Scheme`."""
        codes, shared = _disambiguate_titles(data.dataset.items, frozenset())
        return ItemIndex("title", codes, figures={"collisions": shared / max(1, len(codes))})

    @staticmethod
    def extend(index: ItemIndex, items: Mapping[str, Item], *, embed: Embed | None = None) -> ItemIndex:
        """Add items with titles that differ from the known ones; see `Scheme`."""
        codes, _ = _disambiguate_titles(items, {title_key(title) for (title,) in index.codes.values()})
        return index.adding(codes)


@lru_cache(maxsize=65536)
def title_key(title: str) -> str:
    """Normalise a title: letters, marks and digits in lower case, with single spaces.

    Invisible characters, such as a joiner inside a Persian word or the variation selector of an emoji, are ignored.
    """
    folded = INVISIBLE_CHARACTERS.sub("", unicodedata.normalize("NFKC", title).casefold())
    kept = "".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in folded)
    return " ".join(kept.split()) or " ".join(folded.split())


def display_title(item_id: str, item: Item) -> str:
    """Return the title of an item on one line; never empty."""
    return break_item_tokens(clean(item.title) or clean(item_id) or "untitled").strip()


def _disambiguate_titles(items: Mapping[str, Item], taken: Collection[str]) -> tuple[dict[str, tuple[str, ...]], int]:
    """Return unique titles by item, and the number of items that shared a title."""
    groups: dict[str, list[str]] = defaultdict(list)
    for item in sorted(items):
        groups[title_key(display_title(item, items[item]))].append(item)
    used = {*taken}
    codes: dict[str, tuple[str, ...]] = {}
    # Titles of single items come first, so that titles generated for groups cannot replace them.
    alone = [key for key, group in groups.items() if len(group) == 1 and key not in used]
    for key in alone:
        (item,) = groups.pop(key)
        codes[item] = (display_title(item, items[item]),)
    used.update(alone)
    shared = sum(map(len, groups.values()))
    for group in groups.values():
        remarks = _distinguishing_values({item: items[item] for item in group})
        for item in group:
            title = next(
                t for t in _title_variants(display_title(item, items[item]), remarks[item]) if title_key(t) not in used
            )
            used.add(title_key(title))
            codes[item] = (title,)
    return {item: codes[item] for item in sorted(items)}, shared


def _title_variants(title: str, remark: str) -> Iterator[str]:
    yield from [f"{title} ({remark})"] if remark else [title]
    number = 2
    while True:
        yield f"{title} ({number})"
        number += 1


def _distinguishing_values(group: Mapping[str, Item]) -> dict[str, str]:
    """Return the values of the first short field that distinguishes all items of a group."""
    names = dict.fromkeys(name for item in group.values() for name in item.fields)
    for name in names:
        values = {item: clean(entry.fields.get(name, "")) for item, entry in group.items()}
        keys = {title_key(value) for value in values.values() if value and len(value) <= _MAX_REMARK_LENGTH}
        if len(keys) == len(group) > 1:
            return {item: break_item_tokens(value).strip() for item, value in values.items()}
    return dict.fromkeys(group, "")
