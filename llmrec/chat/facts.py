"""Facts about a catalogue: fields with a limited set of values, searchable texts, and preferences as rules."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from llmrec.answer.rules import OneOf, Rules
from llmrec.chat.state import ITEM, UserPreference, alternative_groups
from llmrec.data.knowledge import BM25, FACTS_FIELD
from llmrec.guard import clean
from llmrec.types import Item

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.index.table import Embed

_T = TypeVar("_T")

_NUMBER = re.compile(r"-?\d{1,9}")
# Fields whose values have more words on average, or are unique to an item, are texts.
_MAX_MEAN_WORDS = 4.0
# Maximum length in characters of a value and of a field name; longer ones are only searched.
_MAX_VALUE_CHARACTERS, _MAX_FIELD_CHARACTERS = 300, 100
# Minimum share of numbers in a numeric field; years may be "unknown".
_MIN_NUMBER_SHARE = 0.9
# The constant k of reciprocal rank fusion (Cormack et al., SIGIR 2009).
_FUSION_CONSTANT = 60


class Facts:
    """Facts about the items of a catalogue.

    Attributes:
        values: The values of each field with a closed list, the most frequent first.
        numeric: Numeric fields, which have bounds.
        years: The numeric field of years; empty: none.

    Args:
        items: The catalogue.
        embed: A text encoder; with it search uses embeddings of texts and concepts in addition to words.
        embed_query: The text encoder of messages; None: ``embed``.
    """

    def __init__(self, items: Mapping[str, Item], embed: Embed | None = None, embed_query: Embed | None = None) -> None:
        self.items, self._embed, self._embed_query = dict(items), embed, embed_query or embed
        self.titles = {name: clean(item.title) or clean(name) or name for name, item in self.items.items()}
        self.values = _categorical_values(self.items.values())
        self._spelt = {field: {value.casefold(): value for value in values} for field, values in self.values.items()}
        self.numeric = frozenset(field for field, values in self.values.items() if _are_numbers(values))
        self.years = next((name for name in sorted(self.numeric) if _are_years(*self.bounds(name))), "")

    def value(self, field: str, value: str) -> str | None:
        """Return a value as spelled in the catalogue; None if no item has it."""
        return self._spelt.get(field, {}).get(value.casefold().strip())

    def legal(self, wish: UserPreference) -> bool:
        """Whether the catalogue has the item, or the field and value, that a preference names."""
        if wish.field == ITEM:
            return wish.value in self.items and wish.op in ("is", "not", "seen")
        if wish.op in ("from", "until"):
            return wish.field in self.numeric and bool(_NUMBER.fullmatch(wish.value))
        return wish.op != "seen" and self.value(wish.field, wish.value) is not None

    def rules(self, profile: Iterable[UserPreference]) -> Rules:
        """Return the hard preferences of a profile as rules for lists."""
        wishes = tuple(profile)
        without: dict[str, set[str]] = defaultdict(set)
        for wish in wishes:
            if wish.hard and wish.op == "not" and wish.field != ITEM:
                without[wish.field].add(wish.value)
        return Rules(
            more=tuple(
                OneOf(group[0].field, frozenset(value for wish in group for value in self._matching_values(wish)))
                for group in alternative_groups(wishes)
            ),
            without={field: frozenset(values) for field, values in without.items()},
            block=frozenset(wish.value for wish in wishes if wish.field == ITEM),
        )

    def matches(self, item: str, wish: UserPreference) -> bool:
        """Whether an item has the value that a preference names, or is within its limit."""
        values = self._held[item].get(wish.field, ())
        if wish.op in ("from", "until"):
            return any(_is_within_limit(value, wish) for value in values)
        return wish.value.casefold() in {value.casefold() for value in values}

    def fields_of(self, item: str) -> list[tuple[str, str]]:
        """Return the categorical fields of an item, as (field, values)."""
        return [(field, ", ".join(values)) for field, values in self._held[item].items()]

    # ------------------------------------------------------------------- search

    def search(self, text: str, allowed: frozenset[str] | None = None) -> list[str]:
        """Search items by words, best first; with a text encoder also by meaning.

        Rankings by BM25, by text embeddings and by concepts are combined by reciprocal rank fusion.
        """
        words = self._index.scores(text)
        orders = [np.argsort(-words, kind="stable")[: int((words > 0).sum())]]
        if self._embed_query is not None:
            query = self._embed_query([text])[0]
            orders += [np.argsort(-(table @ query), kind="stable") for table in (self._vectors, self.concepts)]
        joined = np.zeros(len(self.items))
        for order in orders:
            joined[order] += 1 / (_FUSION_CONSTANT + np.arange(len(order)))
        names = list(self.items)
        results = [names[row] for row in np.argsort(-joined, kind="stable") if joined[row] > 0]
        return [name for name in results if allowed is None or name in allowed]

    def known_words(self, words: Sequence[str]) -> list[str]:
        """Return the words that occur in the text of any item."""
        return [word for word in words if word.casefold() in self._index.index]

    def bounds(self, field: str) -> tuple[int, int]:
        """Return the lowest and highest number of a numeric field."""
        numbers = [int(value) for value in self.values[field] if _NUMBER.fullmatch(value)]
        return min(numbers), max(numbers)

    def _matching_values(self, wish: UserPreference) -> list[str]:
        if wish.op not in ("from", "until"):
            return [wish.value]
        return [value for value in self.values.get(wish.field, ()) if _is_within_limit(value, wish)]

    @cached_property
    def _held(self) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        """The values of the categorical fields of each item."""
        return {
            name: {field: text for field in self.values if (text := tuple(_split_values(item.fields.get(field, ""))))}
            for name, item in self.items.items()
        }

    @cached_property
    def texts(self) -> list[str]:
        """The title, fields and documents of each item, in catalogue order."""
        return [". ".join((self.titles[name], *item.fields.values())) for name, item in self.items.items()]

    @cached_property
    def _index(self) -> BM25:
        return BM25.of(self.texts)

    @cached_property
    def _vectors(self) -> NDArray[np.floating[Any]]:
        assert self._embed is not None
        return self._embed(self.texts)

    @cached_property
    def concepts(self) -> NDArray[np.floating[Any]]:
        """The mean vector of the values of each item, shape (n, d)."""
        assert self._embed is not None
        pairs = [(field, value) for field, values in self.values.items() for value in values]
        row_of = {pair: row for row, pair in enumerate(pairs)}
        table = self._embed([f"{field}: {value}" for field, value in pairs]) if pairs else np.zeros((0, 1))
        rows = [
            [row_of[field, self._spelt[field][v.casefold()]] for field, vs in held.items() for v in vs]
            for held in self._held.values()
        ]
        return np.stack([table[row].mean(axis=0) if row else np.zeros(table.shape[1]) for row in rows])


def reciprocal_rank_fusion(*orders: Sequence[_T]) -> dict[_T, float]:
    """Return the scores of reciprocal rank fusion of several rankings, best first each."""
    scores: dict[_T, float] = defaultdict(float)
    for order in orders:
        for rank, entry in enumerate(order):
            scores[entry] += 1 / (_FUSION_CONSTANT + rank)
    return scores


def _categorical_values(items: Iterable[Item]) -> dict[str, tuple[str, ...]]:
    """Return the values of each categorical field, most frequent first."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        for field, text in item.fields.items():
            if field not in (FACTS_FIELD, ITEM, "title") and len(field) <= _MAX_FIELD_CHARACTERS:
                counts[field].update(_split_values(text))
    result = {}
    for field, counted in counts.items():
        if not counted:
            continue
        spellings: dict[str, str] = {}
        for value, _ in counted.most_common():
            spellings.setdefault(value.casefold(), value)
        words = sum(len(value.split()) for value in spellings.values()) / max(1, len(spellings))
        if words <= _MAX_MEAN_WORDS and (counted.total() > len(spellings) or _are_numbers(spellings)):
            result[field] = tuple(spellings.values())
    return result


def _split_values(text: str) -> list[str]:
    return [value for value in map(str.strip, text.split(",")) if 0 < len(value) <= _MAX_VALUE_CHARACTERS]


def _are_numbers(values: Iterable[str]) -> bool:
    values = list(values)
    return sum(map(bool, map(_NUMBER.fullmatch, values))) >= _MIN_NUMBER_SHARE * len(values)


def _are_years(low: int, high: int) -> bool:
    return low >= 1800 and high <= 2100


def _is_within_limit(value: str, wish: UserPreference) -> bool:
    if not _NUMBER.fullmatch(value):
        return False
    return int(value) >= int(wish.value) if wish.op == "from" else int(value) <= int(wish.value)
