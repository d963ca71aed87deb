"""What an index is like: how evenly its tokens are used, how its codes branch, and which items stand together.

Everything here is computed from the codes themselves; only what was so before a repair comes from the index's figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from llmrec.durable import Json
from llmrec.index.table import ItemIndex

Pieces = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The least, the mean and the most of a number over all items."""

    least: int
    mean: float
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """The tokens of one kind, such as ``<a_0>``, ``<a_1>``, ...

    Attributes:
        name: What the tokens begin with: a letter, or ``item``.
        available: Tokens that the index lists.
        counts: Items of each used token, most first.
        perplexity: Exponential of the entropy of items over tokens, in nats: how many equally used ones they are worth.
        perplexity_trained: The same with every item weighted by its training interactions; None without counts.
        untrained: Used tokens that no training interaction holds; None without counts.
    """

    name: str
    available: int
    counts: tuple[int, ...]
    perplexity: float
    perplexity_trained: float | None = None
    untrained: int | None = None

    @property
    def used(self) -> int:
        """Tokens that stand in at least one code."""
        return len(self.counts)

    @property
    def share(self) -> float:
        """Share of the most used token among the items that have one of the level."""
        return self.counts[0] / sum(self.counts) if self.counts else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """All prefixes of one length that go on.

    Attributes:
        length: Pieces; 0 is the start of every code.
        prefixes: How many there are.
        fan_out: Mean number of pieces that follow a prefix.
        most_fan_out: The largest number.
        items: Mean number of items under a prefix.
        most_items: The largest number.
    """

    length: int
    prefixes: int
    fan_out: float
    most_fan_out: int
    items: float
    most_items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstWords:
    """How codes of several words begin: different first words, the most frequent one, and the items that have it."""

    different: int
    common: str
    items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """Figures of an index.

    Attributes:
        scheme: Name of the scheme.
        items: Number of items.
        tokens: New tokens of the vocabulary; 0 where codes are ordinary text.
        hybrid: Whether the last piece is a token of the item's own.
        levels: One for each kind of token; none where codes are ordinary text.
        depths: One for each length of a prefix that goes on; none where codes are ordinary text.
        pieces: Tokens of a code; None where codes are ordinary text.
        characters: Characters of a code; None where codes are tokens.
        first_words: Of codes of several words; None for others.
        bucket: Most items whose codes differ in the last piece alone; None where codes have one piece or are text.
        duplicates: Items that their own code does not lead back to.
        begun: Codes with which another one begins; 0: prefix-free.
        figures: What building the index showed.
    """

    scheme: str
    items: int
    tokens: int
    hybrid: bool
    levels: tuple[Level, ...]
    depths: tuple[Depth, ...]
    pieces: Spread | None
    characters: Spread | None
    first_words: FirstWords | None
    bucket: int | None
    duplicates: int
    begun: int
    figures: Mapping[str, float]

    @property
    def collisions(self) -> float | None:
        """Share of items that shared their code before it was repaired, where building the index showed it."""
        return self.figures.get("collisions")

    def as_json(self) -> dict[str, Json]:
        """Return the figures as JSON; of counts of single tokens, the number and the largest share are kept."""
        result = asdict(self)
        for level, entry in zip(self.levels, result["levels"], strict=True):
            del entry["counts"]
            entry |= {"used": level.used, "share": level.share}
        return result | {"collisions": self.collisions, "figures": dict(self.figures)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One item with its code and title."""

    item: str
    code: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Items that stand together.

    Attributes:
        length: Pieces that their codes share; 0 for consecutive numbers.
        prefix: The shared pieces, or the first and the last number.
        said: What the prefix stands for, where the scheme has words for it: ``Beauty > Hair Care``.
        size: How many items there are.
        entries: Some of them.
    """

    length: int
    prefix: str
    said: str
    size: int
    entries: tuple[Entry, ...]


def diagnose(index: ItemIndex, counts: Mapping[str, int] | None = None) -> Diagnostics:
    """Return the figures of an index.

    Args:
        index: At least one item.
        counts: Training interactions by item; items that are not in it have none.
    """
    codes = index.codes
    texts = {item: "".join(pieces) for item, pieces in codes.items()}
    made = bool(index.tokens)
    paths: Iterable[Sequence[str]] = codes.values() if made else texts.values()
    parents = Counter(pieces[:-1] for pieces in codes.values() if len(pieces) > 1)
    return Diagnostics(
        scheme=index.scheme,
        items=len(codes),
        tokens=len(index.tokens),
        hybrid=bool(index.settings.get("item_token", False)),
        levels=_levels(index, counts) if made else (),
        depths=_depths(list(codes.values())) if made else (),
        pieces=_spread(map(len, codes.values())) if made else None,
        characters=None if made else _spread(map(len, texts.values())),
        first_words=None if made else _first_words(list(texts.values())),
        bucket=max(parents.values()) if made and parents else None,
        duplicates=sum(index.decode(text) != item for item, text in texts.items()),
        begun=_begun(paths),
        figures=dict(index.figures),
    )


def neighbours(
    index: ItemIndex,
    titles: Mapping[str, str],
    *,
    prefixes: int = 8,
    members: int = 8,
    counts: Mapping[str, int] | None = None,
) -> tuple[Group, ...]:
    """Return the prefixes of each length with the most items, or stretches of consecutive numbers where codes are.

    Args:
        index: Codes of one piece have no prefixes: there are no groups then.
        titles: By item; an item without one is shown by its id.
        prefixes: Groups of each length.
        members: Items of a group that are kept, the most chosen ones first.
        counts: Training interactions by item.
    """
    if not index.tokens:
        return _stretches(index, titles, prefixes, members)
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
            entries = tuple(_entry(index, titles, item) for item in best)
            text, message = "".join(prefix), _said(index, prefix)
            groups.append(Group(length=length, prefix=text, said=message, size=len(under[prefix]), entries=entries))
    return tuple(groups)


def nearest(index: ItemIndex, item: str, titles: Mapping[str, str], *, most: int = 5) -> tuple[Entry, ...]:
    """Return the other items that share the longest prefix with an item; none where codes share no piece or are text.

    Raises:
        DataError: If the index does not hold the item.
    """
    index.encode(item)
    own = index.codes[item]
    shared = {other: _common(own, pieces) for other, pieces in index.codes.items() if other != item}
    order = sorted((other for other, length in shared.items() if length), key=lambda other: (-shared[other], other))
    longest = [other for other in order if shared[other] == shared[order[0]]]
    return tuple(_entry(index, titles, other) for other in longest[:most])


def examples(index: ItemIndex, titles: Mapping[str, str], most: int, first: Sequence[str] = ()) -> tuple[Entry, ...]:
    """Return items with their codes: those asked for, then others at equal steps through the index.

    Raises:
        DataError: If the index does not hold an item that was asked for.
    """
    for item in first:
        index.encode(item)
    rest = [item for item in index.codes if item not in set(first)]
    room = max(0, min(most - len(first), len(rest)))
    spread = [rest[place * len(rest) // room] for place in range(room)]
    return tuple(_entry(index, titles, item) for item in (*first, *spread))


# --------------------------------------------------------------------------- parts


def _levels(index: ItemIndex, counts: Mapping[str, int] | None) -> tuple[Level, ...]:
    uses: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for item, pieces in index.codes.items():
        uses.update(set(pieces))
        weights.update(dict.fromkeys(pieces, (counts or {}).get(item, 0)))
    kinds: dict[str, list[str]] = {}
    for name in index.tokens:
        kinds.setdefault(_kind(name), []).append(name)
    levels = []
    for kind in sorted(kinds, key=lambda kind: (kind == "item", kind)):
        used = [name for name in kinds[kind] if uses[name]]
        levels.append(
            Level(
                name=kind,
                available=len(kinds[kind]),
                counts=tuple(sorted((uses[name] for name in used), reverse=True)),
                perplexity=_perplexity([uses[name] for name in used]),
                perplexity_trained=None if counts is None else _perplexity([weights[name] for name in used]),
                untrained=None if counts is None else sum(not weights[name] for name in used),
            )
        )
    return tuple(levels)


def _kind(name: str) -> str:
    """Return what a token begins with: ``a`` of ``<a_12>``."""
    return name[1:].rpartition("_")[0]


def _perplexity(weights: Sequence[int]) -> float:
    held = np.array([weight for weight in weights if weight], dtype=np.float64)
    if not len(held):
        return 0.0
    share = held / held.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _depths(codes: Sequence[Pieces]) -> tuple[Depth, ...]:
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


def _spread(numbers: Iterable[int]) -> Spread:
    results = list(numbers)
    return Spread(least=min(results), mean=sum(results) / len(results), most=max(results))


def _first_words(texts: Sequence[str]) -> FirstWords | None:
    words = [text.split() for text in texts]
    if all(len(result) == 1 for result in words):
        return None
    firsts = Counter(result[0] for result in words)
    common = min(firsts, key=lambda word: (-firsts[word], word))
    return FirstWords(different=len(firsts), common=common, items=firsts[common])


def _begun(paths: Iterable[Sequence[str]]) -> int:
    """Count the codes with which a different one begins; in order of the alphabet, one such stands right after."""
    ordered = sorted({tuple(path) if not isinstance(path, str) else path for path in paths})
    return sum(after[: len(before)] == before for before, after in pairwise(ordered))


def _common(a: Pieces, b: Pieces) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def _stretches(index: ItemIndex, titles: Mapping[str, str], groups: int, members: int) -> tuple[Group, ...]:
    """Return stretches of consecutive numbers at equal steps; none where codes are no numbers."""
    texts = {item: "".join(pieces) for item, pieces in index.codes.items()}
    if not all(text.isascii() and text.isdecimal() for text in texts.values()):
        return ()
    order = sorted(texts, key=lambda item: (int(texts[item]), item))
    members = min(members, len(order))
    room = max(1, min(groups, len(order) // members))
    results = []
    for place in range(room):
        start = place * (len(order) - members) // max(1, room - 1)
        entries = tuple(_entry(index, titles, item) for item in order[start : start + members])
        prefix = f"{entries[0].code}–{entries[-1].code}"
        results.append(Group(length=0, prefix=prefix, said="", size=len(entries), entries=entries))
    return tuple(results)


def _said(index: ItemIndex, prefix: Pieces) -> str:
    """Return the categories that the pieces of a prefix stand for, where the index names them by level and number."""
    names = index.settings.get("names")
    if index.scheme != "category" or not names:
        return ""
    levels = [dict(enumerate(level)) for level in names]
    numbers = [int(piece[1:-1].rpartition("_")[2]) for piece in prefix]
    return " > ".join(level.get(number, "no category") for level, number in zip(levels, numbers, strict=False))


def _entry(index: ItemIndex, titles: Mapping[str, str], item: str) -> Entry:
    return Entry(item=item, code="".join(index.codes[item]), title=titles.get(item) or item)
