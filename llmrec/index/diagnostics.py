"""Properties of an item index: token usage, branching of codes, and items with similar codes.

Everything is computed from the codes themselves, except values before a repair, which the index recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from llmrec.durable import Json
from llmrec.index.table import ItemIndex

Pieces = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeSummary:
    """Minimum, mean and maximum of a property over all items."""

    least: int
    mean: float
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """The tokens of one level of the codes, such as ``<a_0>``, ``<a_1>``, ...

    Attributes:
        name: Prefix of the tokens: a letter, or ``item``.
        available: Number of tokens that the index lists.
        counts: Number of items of each used token, largest first.
        perplexity: Exponential of the entropy of items over tokens, in nats: the equivalent number of equally used
            tokens.
        perplexity_trained: The same with items weighted by training interactions; None without counts.
        untrained: Number of used tokens without training interactions; None without counts.
    """

    name: str
    available: int
    counts: tuple[int, ...]
    perplexity: float
    perplexity_trained: float | None = None
    untrained: int | None = None

    @property
    def used(self) -> int:
        """Number of tokens that occur in any code."""
        return len(self.counts)

    @property
    def share(self) -> float:
        """Share of items with the most frequent token, among items whose code has this level."""
        return self.counts[0] / sum(self.counts) if self.counts else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """All code prefixes of one length that can be continued.

    Attributes:
        length: Number of pieces; 0 is the start of every code.
        prefixes: Number of prefixes.
        fan_out: Mean number of pieces that follow a prefix.
        most_fan_out: Maximum number.
        items: Mean number of items with a prefix.
        most_items: Maximum number.
    """

    length: int
    prefixes: int
    fan_out: float
    most_fan_out: int
    items: float
    most_items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstWords:
    """Statistics of the first words of codes with several words."""

    different: int
    common: str
    items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """Properties of an item index.

    Attributes:
        scheme: Name of the scheme.
        items: Number of items.
        tokens: Number of new tokens of the vocabulary; 0 if codes are ordinary text.
        hybrid: Whether the last piece is an item token.
        levels: One for each kind of token; empty if codes are ordinary text.
        depths: One for each prefix length; empty if codes are ordinary text.
        pieces: Number of tokens per code; None if codes are ordinary text.
        characters: Number of characters per code; None if codes are tokens.
        first_words: For codes of several words; None for others.
        bucket: Maximum number of items whose codes differ only in the last piece; None if codes have one piece or are
            text.
        duplicates: Number of items whose code does not decode to them.
        begun: Number of codes that are a prefix of another; 0 means prefix-free.
        figures: Figures recorded when the index was built.
    """

    scheme: str
    items: int
    tokens: int
    hybrid: bool
    levels: tuple[Level, ...]
    depths: tuple[Depth, ...]
    pieces: RangeSummary | None
    characters: RangeSummary | None
    first_words: FirstWords | None
    bucket: int | None
    duplicates: int
    begun: int
    figures: Mapping[str, float]

    @property
    def collisions(self) -> float | None:
        """Share of items whose code had to be changed to be unique; None if unknown."""
        return self.figures.get("collisions")

    def as_json(self) -> dict[str, Json]:
        """Return the properties as JSON, with token counts summarised."""
        result = asdict(self)
        for level, entry in zip(self.levels, result["levels"], strict=True):
            del entry["counts"]
            entry |= {"used": level.used, "share": level.share}
        return result | {"collisions": self.collisions, "figures": dict(self.figures)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedItem:
    """An item with its code and title."""

    item: str
    code: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeGroup:
    """Items with similar codes.

    Attributes:
        length: Number of shared pieces; 0 for consecutive numbers.
        prefix: The shared pieces, or the first and the last number.
        said: The categories of the prefix, if the scheme has them: ``Beauty > Hair Care``.
        size: Number of items.
        entries: Some of the items.
    """

    length: int
    prefix: str
    said: str
    size: int
    entries: tuple[CodedItem, ...]


def diagnose(index: ItemIndex, counts: Mapping[str, int] | None = None) -> Diagnostics:
    """Compute the properties of an item index.

    Args:
        index: At least one item.
        counts: Number of training interactions by item; missing items have none.
    """
    codes = index.codes
    texts = {item: "".join(pieces) for item, pieces in codes.items()}
    has_tokens = bool(index.tokens)
    paths: Iterable[Sequence[str]] = codes.values() if has_tokens else texts.values()
    parents = Counter(pieces[:-1] for pieces in codes.values() if len(pieces) > 1)
    return Diagnostics(
        scheme=index.scheme,
        items=len(codes),
        tokens=len(index.tokens),
        hybrid=bool(index.settings.get("item_token", False)),
        levels=_level_statistics(index, counts) if has_tokens else (),
        depths=_depth_statistics(list(codes.values())) if has_tokens else (),
        pieces=_summarise_range(map(len, codes.values())) if has_tokens else None,
        characters=None if has_tokens else _summarise_range(map(len, texts.values())),
        first_words=None if has_tokens else _first_words(list(texts.values())),
        bucket=max(parents.values()) if has_tokens and parents else None,
        duplicates=sum(index.decode(text) != item for item, text in texts.items()),
        begun=_count_prefix_codes(paths),
        figures=dict(index.figures),
    )


def largest_code_groups(
    index: ItemIndex,
    titles: Mapping[str, str],
    *,
    prefixes: int = 8,
    members: int = 8,
    counts: Mapping[str, int] | None = None,
) -> tuple[CodeGroup, ...]:
    """Return the prefixes with the most items for each length, or ranges of numbers if codes are numbers.

    Args:
        index: The index. Codes with one piece have no prefixes, and so no groups.
        titles: Titles by item; an item without one is shown by its id.
        prefixes: Number of groups per length.
        members: Number of items kept per group, the most popular first.
        counts: Number of training interactions by item.
    """
    if not index.tokens:
        return _number_ranges(index, titles, prefixes, members)
    chosen, groups = counts or {}, []
    longest = max(map(len, index.codes.values()))
    for length in range(1, longest):
        under: dict[Pieces, list[str]] = {}
        for item, pieces in index.codes.items():
            if len(pieces) > length:
                under.setdefault(pieces[:length], []).append(item)
        largest = sorted(under, key=lambda prefix: (-len(under[prefix]), prefix))[:prefixes]
        for prefix in (result for result in largest if len(under[result]) > 1):
            best = sorted(under[prefix], key=lambda item: (-chosen.get(item, 0), item))[:members]
            entries = tuple(_coded_item(index, titles, item) for item in best)
            text, categories = "".join(prefix), _category_names(index, prefix)
            groups.append(
                CodeGroup(length=length, prefix=text, said=categories, size=len(under[prefix]), entries=entries)
            )
    return tuple(groups)


def nearest_items(index: ItemIndex, item: str, titles: Mapping[str, str], *, most: int = 5) -> tuple[CodedItem, ...]:
    """Return the items that share the longest code prefix with a given item.

    Raises:
        DataError: If the item is not in the index.
    """
    index.encode(item)
    code = index.codes[item]
    shared = {other: _common_prefix_length(code, pieces) for other, pieces in index.codes.items() if other != item}
    order = sorted((other for other, length in shared.items() if length), key=lambda other: (-shared[other], other))
    longest = [other for other in order if shared[other] == shared[order[0]]]
    return tuple(_coded_item(index, titles, other) for other in longest[:most])


def example_items(
    index: ItemIndex, titles: Mapping[str, str], most: int, first: Sequence[str] = ()
) -> tuple[CodedItem, ...]:
    """Return items with their codes: the requested ones, then others spread over the index.

    Raises:
        DataError: If a requested item is not in the index.
    """
    for item in first:
        index.encode(item)
    rest = [item for item in index.codes if item not in set(first)]
    room = max(0, min(most - len(first), len(rest)))
    spread = [rest[n * len(rest) // room] for n in range(room)]
    return tuple(_coded_item(index, titles, item) for item in (*first, *spread))


def perplexity(counts: ArrayLike) -> float:
    """Return the equivalent number of equally frequent codes, 0 without counts: the perplexity of counts by code."""
    used = np.asarray(counts, dtype=np.float64)
    used = used[used > 0]
    if not len(used):
        return 0.0
    share = used / used.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


# --------------------------------------------------------------------------- helpers


def _level_statistics(index: ItemIndex, counts: Mapping[str, int] | None) -> tuple[Level, ...]:
    uses: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for item, pieces in index.codes.items():
        uses.update(set(pieces))
        weights.update(dict.fromkeys(pieces, (counts or {}).get(item, 0)))
    kinds: dict[str, list[str]] = {}
    for name in index.tokens:
        kinds.setdefault(_token_level(name), []).append(name)
    levels = []
    for kind in sorted(kinds, key=lambda kind: (kind == "item", kind)):
        used = [name for name in kinds[kind] if uses[name]]
        levels.append(
            Level(
                name=kind,
                available=len(kinds[kind]),
                counts=tuple(sorted((uses[name] for name in used), reverse=True)),
                perplexity=perplexity([uses[name] for name in used]),
                perplexity_trained=None if counts is None else perplexity([weights[name] for name in used]),
                untrained=None if counts is None else sum(not weights[name] for name in used),
            )
        )
    return tuple(levels)


def _token_level(name: str) -> str:
    """Return the level of a token: ``a`` for ``<a_12>``."""
    return name[1:].rpartition("_")[0]


def _depth_statistics(codes: Sequence[Pieces]) -> tuple[Depth, ...]:
    results = []
    for length in range(max(map(len, codes), default=0)):
        longer = [pieces for pieces in codes if len(pieces) > length]
        under = Counter(pieces[:length] for pieces in longer)
        after = Counter(pieces[:-1] for pieces in {pieces[: length + 1] for pieces in longer})
        results.append(
            Depth(
                length=length,
                prefixes=len(under),
                fan_out=after.total() / len(under),
                most_fan_out=max(after.values()),
                items=len(longer) / len(under),
                most_items=max(under.values()),
            )
        )
    return tuple(results)


def _summarise_range(numbers: Iterable[int]) -> RangeSummary:
    results = list(numbers)
    return RangeSummary(least=min(results), mean=sum(results) / len(results), most=max(results))


def _first_words(texts: Sequence[str]) -> FirstWords | None:
    words = [text.split() for text in texts]
    if all(len(result) == 1 for result in words):
        return None
    firsts = Counter(result[0] for result in words)
    common = min(firsts, key=lambda word: (-firsts[word], word))
    return FirstWords(different=len(firsts), common=common, items=firsts[common])


def _count_prefix_codes(paths: Iterable[Sequence[str]]) -> int:
    """Return how many codes are a prefix of another code."""
    ordered = sorted({tuple(path) if not isinstance(path, str) else path for path in paths})
    return sum(after[: len(before)] == before for before, after in pairwise(ordered))


def _common_prefix_length(a: Pieces, b: Pieces) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def _number_ranges(index: ItemIndex, titles: Mapping[str, str], groups: int, members: int) -> tuple[CodeGroup, ...]:
    """Return ranges of consecutive numbers spread over the index; empty if codes are not numbers."""
    texts = {item: "".join(pieces) for item, pieces in index.codes.items()}
    if not all(text.isascii() and text.isdecimal() for text in texts.values()):
        return ()
    order = sorted(texts, key=lambda item: (int(texts[item]), item))
    members = min(members, len(order))
    room = max(1, min(groups, len(order) // members))
    results = []
    for n in range(room):
        start = n * (len(order) - members) // max(1, room - 1)
        entries = tuple(_coded_item(index, titles, item) for item in order[start : start + members])
        prefix = f"{entries[0].code}–{entries[-1].code}"
        results.append(CodeGroup(length=0, prefix=prefix, said="", size=len(entries), entries=entries))
    return tuple(results)


def _category_names(index: ItemIndex, prefix: Pieces) -> str:
    """Return the categories of the tokens in a prefix, if the index has stored them."""
    names = index.settings.get("names")
    if index.scheme != "category" or not names:
        return ""
    levels = [dict(enumerate(level)) for level in names]
    numbers = [int(piece[1:-1].rpartition("_")[2]) for piece in prefix]
    return " > ".join(level.get(number, "no category") for level, number in zip(levels, numbers, strict=False))


def _coded_item(index: ItemIndex, titles: Mapping[str, str], item: str) -> CodedItem:
    return CodedItem(item=item, code="".join(index.codes[item]), title=titles.get(item) or item)
