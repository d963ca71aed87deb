"""Business rules that recommendation lists always satisfy: allowed items, quotas and diversity.

Rules compare the values of an item's fields. A field may list several, separated by commas: ``Comedy, Drama`` has the
values ``comedy`` and ``drama``, and also the whole text ``comedy, drama``, so that ``Acme, Inc.`` can be named. Values
are compared case-insensitively, without surrounding space. A field without text has no value. ``item_id`` and
``title`` are not fields.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from llmrec.errors import DataError, did_you_mean
from llmrec.types import Item

__all__ = ["MAX_FIELD_VALUES", "OneOf", "Quota", "Rules", "required_depth"]

MAX_FIELD_VALUES = 50
"""Maximum number of distinct values in a list of a field that contributes to the similarity of items."""

_NON_FIELDS = {"item_id", "title"}
_Fields = Mapping[str, str]
_RULE_KEYS = ("only", "without", "block", "quotas", "diversity")


@dataclass(frozen=True, slots=True)
class Quota:
    """The maximum number of items in a list that share a value of a field.

    Raises:
        DataError: If ``most`` is less than 1.
    """

    field: str
    most: int

    def __post_init__(self) -> None:
        if self.most < 1:
            wrong = (
                f"quotas: the maximum of {self.field!r} is {self.most}; use at least 1, or exclude values with "
                "'without'"
            )
            raise DataError(wrong, kind="bad-value", column=f"quotas.{self.field}")


@dataclass(frozen=True, slots=True)
class OneOf:
    """Requires that a field of an item has one of these values."""

    field: str
    values: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The business rules of a list. Equivalent rules compare as equal, regardless of order and case.

    Attributes:
        only: Values by field; an item must have one of them. An empty set of values allows no item.
        more: Further conditions as in ``only``, on a field that has one already. They result from joining rules: an
            item may satisfy two sets by two different values, so the intersection of the sets is not equivalent.
        without: Values by field; an item must have none of them.
        block: Ids of items that are never listed.
        quotas: One quota per field; of several the strictest.
        diversity: From 0 (keep the order) to 1 (the order only breaks ties); see `arrange`.

    Raises:
        DataError: If the diversity is out of bounds.
    """

    only: Mapping[str, frozenset[str]] = field(default_factory=dict)
    without: Mapping[str, frozenset[str]] = field(default_factory=dict)
    block: frozenset[str] = frozenset()
    quotas: tuple[Quota, ...] = ()
    diversity: float = 0.0
    more: tuple[OneOf, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.diversity <= 1.0:
            raise DataError(f"diversity: {self.diversity} is not between 0 and 1", kind="bad-value", column="diversity")
        only, more = _simplify_conditions((*(OneOf(name, values) for name, values in self.only.items()), *self.more))
        least = {quota.field: quota for quota in sorted(self.quotas, key=lambda quota: (quota.field, -quota.most))}
        without = {name: _normalise_values(values) for name, values in self.without.items()}
        # Normalised at creation, because rules are cache keys and are compared case-insensitively.
        object.__setattr__(self, "only", only)
        object.__setattr__(self, "more", more)
        object.__setattr__(self, "without", {name: values for name, values in without.items() if values})
        object.__setattr__(self, "quotas", tuple(least.values()))

    def __hash__(self) -> int:
        """Hash the compared fields, because mappings are not hashable."""
        only, without = frozenset(self.only.items()), frozenset(self.without.items())
        return hash((only, without, self.block, self.quotas, self.diversity, self.more))

    def __bool__(self) -> bool:
        """Whether there are any rules."""
        return bool(self.only or self.without or self.block or self.quotas or self.diversity)

    @classmethod
    def read(cls, record: object) -> Rules:
        """Parse rules from a file or a request.

        Args:
            record: A mapping with the keys ``only``, ``without`` (fields with lists of values), ``block`` (a list of
                ids), ``quotas`` (a list of ``{"field": ..., "most": ...}``) and ``diversity``; all are optional. Values
                and ids are texts or integers.
        """
        settings = _require_mapping("", record, _RULE_KEYS)
        only = _parse_conditions("only", settings.get("only", {}))
        if empty := next((f"only.{name}" for name, values in only.items() if not values), None):
            wrong = f"{empty} is empty, so no item would be allowed; list values, or omit the field"
            raise DataError(wrong, kind="empty", column=empty)
        diversity = settings.get("diversity", 0.0)
        if not isinstance(diversity, int | float) or isinstance(diversity, bool):
            raise _invalid_value_error("diversity", "a number is expected", diversity)
        return cls(
            only=only,
            without=_parse_conditions("without", settings.get("without", {})),
            block=_parse_texts("block", settings.get("block", [])),
            quotas=tuple(
                _parse_quota(f"quotas.{position}", entry)
                for position, entry in enumerate(_require_list("quotas", settings.get("quotas", [])))
            ),
            diversity=diversity,
        )

    def joined(self, other: Rules) -> Rules:
        """Combine two sets of rules, such as the rules of a service and of a request.

        Of two quotas on a field the stricter applies, and of two diversities the larger. The order does not matter.
        """
        without = {name: self.without.get(name, frozenset()) | values for name, values in other.without.items()}
        return Rules(
            only=self.only,
            more=(*self.more, *other.more, *(OneOf(name, values) for name, values in other.only.items())),
            without={**self.without, **without},
            block=self.block | other.block,
            quotas=self.quotas + other.quotas,
            diversity=max(self.diversity, other.diversity),
        )

    def check(self, items: Mapping[str, Item]) -> None:
        """Reject a rule on a field that no item has, because a misspelt field would forbid all items or none.

        Values are not checked: an item with a value may be added later. An empty catalogue accepts all rules.

        Args:
            items: The catalogue.
        """
        missing = {name for _, name in self._named()}
        for item in items.values():
            if not missing:
                return
            missing -= item.fields.keys() - _NON_FIELDS
        if not items or not missing:
            return
        known = sorted({name for item in items.values() for name in item.fields} - _NON_FIELDS)
        key, name = next((key, name) for key, name in self._named() if name in missing)
        raise DataError(
            f"{key}: no item has a field {name!r}{did_you_mean(name, known)}; "
            f"known fields: {', '.join(known) or 'none'}",
            kind="unknown-name",
            column=key,
        )

    def allowed(self, items: Mapping[str, Item]) -> frozenset[str]:
        """Return the ids of the items allowed by ``only``, ``without`` and ``block``.

        Args:
            items: The catalogue, by id.
        """
        must = [(name, _value_matcher(values)) for name, values in self.only.items()]
        must += [(condition.field, _value_matcher(condition.values)) for condition in self.more]
        never = [(name, _value_matcher(values)) for name, values in self.without.items()]
        if not must and not never:
            return frozenset(items) - self.block
        return frozenset(
            key
            for key, item in items.items()
            if key not in self.block
            and all(shares(item.fields.get(name, "")) for name, shares in must)
            and not any(shares(item.fields.get(name, "")) for name, shares in never)
        )

    def arrange(
        self, ranked: Sequence[tuple[str, float]], items: Mapping[str, Item], k: int
    ) -> list[tuple[str, float]]:
        """Select at most k items under quotas and diversity, and return them in their new order.

        Quotas: an item with a value whose quota is exhausted is skipped; an item with several values counts for each,
        one without the field for none. A list shorter than k is maximal: no item of ``ranked`` can be added to it. It
        need not be the longest possible: an item with two values may take the capacity of two others. If no item has
        more than p values under quotas, its length is at least 1/p of the optimum; with p = 1, as for one quota on a
        field with one value per item, it is optimal.

        Diversity d is maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): of the items that fit, the next
        is the one with the largest ``(1 - d) * relevance - d * similarity``; ties go to the one ranked first.

        - The relevance of the item at index i of ``ranked``, from 0, is ``1 / log2(i + 2)``, the discount of NDCG: 1
          for the first. It does not depend on the scale of the scores, the length of the list or k.
        - The similarity is the largest Jaccard index with a selected item, of their sets of (field, value); it is 0 for
          items without any. Values are the listed ones, without the whole text. A field counts if in ``ranked`` it has
          at most `MAX_FIELD_VALUES` values, two items share one, and not all items have all: free text, unique values
          and constant values are uninformative.

        Without diversity, items are taken in ranked order. The list of k items is a prefix of the list of k + 1.

        Args:
            ranked: Unique ids with scores, best first, without forbidden items.
            items: The items by id.
            k: The number of items to select.

        Returns:
            Entries of ``ranked``, with unchanged scores.
        """
        if not self.quotas and not self.diversity:
            return list(ranked[: max(k, 0)])
        try:
            results = [items[key].fields for key, _ in ranked]
        except KeyError as error:
            raise DataError(f"item {error} is ranked, but its fields are missing", kind="unknown-name") from None
        room = _QuotaCapacity(self.quotas)
        rows = (
            _select_diverse(results, room, self.diversity, k) if self.diversity else _select_in_order(results, room, k)
        )
        return [ranked[row] for row in rows]

    def _named(self) -> Iterator[tuple[str, str]]:
        """Yield the key and field of every rule."""
        yield from ((f"only.{name}", name) for name in self.only)
        yield from ((f"only.{condition.field}", condition.field) for condition in self.more)
        yield from ((f"without.{name}", name) for name in self.without)
        yield from ((f"quotas.{quota.field}", quota.field) for quota in self.quotas)


def required_depth(rules: Rules, k: int) -> int | None:
    """Return how many top-ranked items `Rules.arrange` needs to select k items.

    Returns:
        ``k`` without quotas and diversity. None (all of them) with either: a quota may skip any number of items, and
        the informative fields depend on the whole list.
    """
    return None if rules.quotas or rules.diversity else max(k, 0)


# --------------------------------------------------------------------------- field values


def _normalise_value(text: str) -> str:
    return text.casefold().strip()


def _split_values(text: str) -> frozenset[str]:
    """Return the values listed in the text of a field."""
    # Equivalent to `_normalise_value` for each value, but converts the whole text at once.
    return frozenset([value.strip() for value in text.casefold().split(",")]) - {""}


def _normalise_values(values: Iterable[str]) -> frozenset[str]:
    """Normalise values for comparison and drop empty ones."""
    return frozenset(map(_normalise_value, values)) - {""}


def _value_matcher(values: frozenset[str]) -> Callable[[str], bool]:
    """Return a cached function that tests whether a field has one of these values."""
    return cache(lambda text: _normalise_value(text) in values or not values.isdisjoint(_split_values(text)))


def _simplify_conditions(conditions: Iterable[OneOf]) -> tuple[dict[str, frozenset[str]], tuple[OneOf, ...]]:
    """Simplify conditions by removing conditions that others imply."""
    known = {OneOf(condition.field, _normalise_values(condition.values)) for condition in conditions}
    needed = [rule for rule in known if not any(rule.field == by.field and by.values < rule.values for by in known)]
    only: dict[str, frozenset[str]] = {}
    more: list[OneOf] = []
    for rule in sorted(needed, key=lambda rule: (rule.field, sorted(rule.values))):
        if only.setdefault(rule.field, rule.values) is not rule.values:
            more.append(rule)
    return only, tuple(more)


# --------------------------------------------------------------------------- selection


class _QuotaCapacity:
    """The remaining capacity of quotas while a list is built."""

    def __init__(self, quotas: Sequence[Quota]) -> None:
        self._quotas = quotas
        self._chosen: Counter[tuple[str, str]] = Counter()
        self._full: dict[str, set[str]] = {quota.field: set() for quota in quotas}
        self._listed = cache(_split_values)

    def has(self, fields: _Fields) -> bool:
        """Whether adding an item keeps within the quotas."""
        return all(full.isdisjoint(self._listed(fields.get(name, ""))) for name, full in self._full.items())

    def take(self, fields: _Fields) -> list[tuple[str, str]]:
        """Count an item, and return each (field, value) whose quota is now exhausted."""
        full: list[tuple[str, str]] = []
        for quota in self._quotas:
            for value in self._listed(fields.get(quota.field, "")):
                self._chosen[quota.field, value] += 1
                if self._chosen[quota.field, value] == quota.most:
                    self._full[quota.field].add(value)
                    full.append((quota.field, value))
        return full


def _select_in_order(items: Sequence[_Fields], room: _QuotaCapacity, k: int) -> list[int]:
    """Return the indices of the first k items that satisfy the quotas."""
    rows: list[int] = []
    for row, fields in enumerate(items):
        if len(rows) >= k:
            break
        if room.has(fields):
            room.take(fields)
            rows.append(row)
    return rows


def _select_diverse(items: Sequence[_Fields], room: _QuotaCapacity, diversity: float, k: int) -> list[int]:
    """Return the indices of k items selected by maximal marginal relevance."""
    similarity = _Similarity(items)
    holders = cache(lambda name: similarity.fields.get(name) or _rows_by_value(items, name))
    relevance = (1.0 - diversity) / np.log2(np.arange(len(items)) + 2.0)
    closest = np.zeros(len(items))
    rows: list[int] = []
    while len(rows) < min(k, len(items)):
        # Among ties, argmax returns the item that was ranked first.
        best = int(np.argmax(relevance - diversity * closest))
        if relevance[best] == -np.inf:
            break
        rows.append(best)
        relevance[best] = -np.inf
        for name, value in room.take(items[best]):
            relevance[holders(name)[value]] = -np.inf
        np.maximum(closest, similarity.to(best), out=closest)
    return rows


class _Similarity:
    """Similarity of items: Jaccard index of their (field, value) pairs, for fields that distinguish items."""

    def __init__(self, items: Sequence[_Fields]) -> None:
        self._items = items
        self.fields: dict[str, dict[str, NDArray[np.int64]]] = {}
        self._sizes = np.zeros(len(items), dtype=np.int64)
        for name in {name for fields in items for name in fields} - _NON_FIELDS:
            holders = _rows_by_value(items, name, MAX_FIELD_VALUES)
            counts = [len(rows) for rows in holders.values()]
            if counts and max(counts) > 1 and min(counts) < len(items):
                self.fields[name] = holders
                for rows in holders.values():
                    self._sizes[rows] += 1

    def to(self, row: int) -> NDArray[np.float64]:
        """Return the similarity of every item to a given item, shape (items,)."""
        both = np.zeros_like(self._sizes)
        for name, holders in self.fields.items():
            for value in _split_values(self._items[row].get(name, "")):
                both[holders[value]] += 1
        return np.asarray(both / np.maximum(self._sizes + self._sizes[row] - both, 1), dtype=np.float64)


def _rows_by_value(items: Sequence[_Fields], name: str, most: int | None = None) -> dict[str, NDArray[np.int64]]:
    """Return the items with each value of a field; empty if the field has more than ``most`` values."""
    same: dict[str, list[int]] = {}
    lists: dict[str, list[list[int]]] = {}
    for row, fields in enumerate(items):
        text = fields.get(name, "")
        if (rows := same.get(text)) is None:
            rows = same[text] = []
            for value in _split_values(text):
                lists.setdefault(value, []).append(rows)
            if most is not None and len(lists) > most:
                return {}
        rows.append(row)
    return {value: np.fromiter(chain.from_iterable(parts), np.int64) for value, parts in lists.items()}


# --------------------------------------------------------------------------- parsing


def _require_mapping(key: str, value: object, known: Sequence[str] = ()) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise _invalid_value_error(key or "rules", "a mapping is expected", value)
    for name in value:
        if not isinstance(name, str) or not name:
            raise _invalid_value_error(key or "rules", "keys must be strings; write keys in quotes", name)
        if known and name not in known:
            dotted = f"{key}.{name}".removeprefix(".")
            raise DataError(
                f"unknown key {dotted!r}{did_you_mean(name, known)}; known here: {', '.join(known)}",
                kind="unknown-key",
                column=dotted,
            )
    return value


def _require_list(key: str, value: object) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise _invalid_value_error(key, "a list is expected", value)
    return value


def _parse_texts(key: str, value: object) -> frozenset[str]:
    texts: set[str] = set()
    for entry in _require_list(key, value):
        # The table's own spelling of a boolean or float is not known here.
        text = str(entry) if isinstance(entry, int) and not isinstance(entry, bool) else entry
        if not isinstance(text, str) or not text.strip():
            raise _invalid_value_error(key, "values must be non-empty strings; write values in quotes", entry)
        texts.add(text)
    return frozenset(texts)


def _parse_conditions(key: str, value: object) -> dict[str, frozenset[str]]:
    return {name: _parse_texts(f"{key}.{name}", values) for name, values in _require_mapping(key, value).items()}


def _parse_quota(key: str, value: object) -> Quota:
    settings = _require_mapping(key, value, ("field", "most"))
    for part in ("field", "most"):
        if part not in settings:
            raise DataError(f"key '{key}.{part}' is missing; add it", kind="missing-key", column=f"{key}.{part}")
    name, most = settings["field"], settings["most"]
    if not isinstance(name, str) or not name:
        raise _invalid_value_error(f"{key}.field", "a field name is expected", name)
    if not isinstance(most, int) or isinstance(most, bool):
        raise _invalid_value_error(f"{key}.most", "an integer is expected", most)
    return Quota(name, most)


def _invalid_value_error(key: str, expected: str, value: object) -> DataError:
    return DataError(f"{key}: {expected}, got {value!r:.80}", kind="bad-value", column=key)
