"""Generated texts that are training texts again, found exactly and without comparing all pairs.

Two texts are alike by ROUGE-L's F-measure (Lin, 2004) on lower-cased words: twice the length of the longest common
subsequence over the sum of both lengths. A pair that reaches a threshold shares most of its words, and so at least one
of the rarest words of each (prefix filtering: Chaudhuri et al., ICDE 2006; Bayardo et al., WWW 2007). An inverted index
over rare words alone therefore finds every pair that can reach it, and only those are measured.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

COPIED = 0.9
"""From which likeness on a text counts as a copy."""

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# A share of whole words may fall on either side of a whole number in binary.
_EPS = 1e-9

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Library:
    """Training texts, and their sentences, by their rarest words.

    A *piece* is a word and how often it has occurred before in its text, so that a text is a set of pieces. Pieces are
    numbered by the number of texts that hold them, rarest first.

    Attributes:
        texts: Different word sequences, shape (n,).
        same: The same sequences, to be looked up.
        number: Number of each piece.
        pieces: Numbers of all texts' pieces, one text after the other, shape (total,).
        starts: Where each text's pieces begin, and the end, shape (n + 1,).
        holders: Texts that hold a piece among their rarest ones, one piece after the other.
        held: Where each piece's holders begin, and the end, shape (pieces + 1,).
        threshold: Likeness from which on a text counts as a copy.
    """

    texts: tuple[Words, ...]
    same: frozenset[Words]
    number: Mapping[tuple[str, int], int]
    pieces: NDArray[np.int64]
    starts: NDArray[np.int64]
    holders: NDArray[np.int64]
    held: NDArray[np.int64]
    threshold: float


def words_of(text: str) -> Words:
    """Return a text's lower-cased words: the cut of Distinct-n."""
    return tuple(_WORD.findall(text.lower()))


def library(texts: Iterable[str], *, threshold: float = COPIED) -> Library:
    """Index training texts, each as a whole and sentence by sentence.

    Raises:
        ValueError: If the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold of a copy must be above 0 and at most 1, not {threshold}")
    units = [words_of(unit) for text in texts for unit in _units(text)]
    known = tuple(dict.fromkeys(unit for unit in units if unit))
    found = [piece for unit in known for piece in _pieces(unit)]
    frequency = Counter(found)
    # Equally rare pieces fall in their own order, so that the index does not depend on that of the texts.
    number = {piece: place for place, piece in enumerate(sorted(frequency, key=lambda each: (frequency[each], each)))}
    lengths = np.array([len(unit) for unit in known], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    owner = np.repeat(np.arange(len(known)), lengths)
    pieces = np.array([number[piece] for piece in found], dtype=np.int64)
    pieces = pieces[np.lexsort((pieces, owner))]
    rare = np.arange(len(pieces)) - starts[owner] < _prefixes(lengths, threshold)[owner]
    order = np.argsort(pieces[rare], kind="stable")
    counts = np.bincount(pieces[rare], minlength=len(number))
    return Library(
        texts=known,
        same=frozenset(known),
        number=number,
        pieces=pieces,
        starts=starts,
        holders=owner[rare][order],
        held=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        threshold=threshold,
    )


def copied(texts: Sequence[str], known: Library) -> NDArray[np.bool_]:
    """Say of each generated text whether some training text or sentence is alike to the library's threshold.

    A text without words is no copy. A short text is one easily: beside the share of copies among generated texts stands
    that among the true ones.

    Returns:
        Shape (n,).
    """
    cut = [words_of(text) for text in texts]
    found = {words: _is_copy(words, known) for words in set(cut)}
    return np.array([found[words] for words in cut], dtype=np.bool_)


def alike(a: Words, b: Words) -> float:
    """Return ROUGE-L's F-measure of two word sequences, in [0, 1]; 0 where one of them is empty."""
    return 2 * _common(a, b) / (len(a) + len(b)) if a and b else 0.0


# --------------------------------------------------------------------------- parts


def _units(text: str) -> Iterable[str]:
    sentences = _SENTENCE_END.split(text.strip())
    return [text, *sentences] if len(sentences) > 1 else [text]


def _pieces(words: Words) -> list[tuple[str, int]]:
    before: Counter[str] = Counter()
    pieces = []
    for word in words:
        pieces.append((word, before[word]))
        before[word] += 1
    return pieces


def _prefixes(lengths: NDArray[np.int64], threshold: float) -> NDArray[np.int64]:
    """Return how many of a text's rarest pieces hold one that it shares with any text that is alike.

    The shortest text that can be alike to one of n words has ``n t / (2 - t)``, all of them shared.
    """
    shared = np.ceil(lengths * threshold / (2 - threshold) - _EPS).astype(np.int64)
    prefixes: NDArray[np.int64] = lengths - np.maximum(shared, 1) + 1
    return prefixes


def _is_copy(words: Words, known: Library) -> bool:
    if not words or words in known.same:
        return bool(words)
    size, threshold = len(words), known.threshold
    # Pieces that no training text holds are the rarest of all, and lead to none.
    own = sorted(known.number.get(piece, -1) for piece in _pieces(words))
    rare = [piece for piece in own[: int(_prefixes(np.array([size]), threshold)[0])] if piece >= 0]
    if not rare:
        return False
    texts = np.unique(np.concatenate([known.holders[known.held[piece] : known.held[piece + 1]] for piece in rare]))
    lengths = known.starts[texts + 1] - known.starts[texts]
    least = threshold * (size + lengths) / 2 - _EPS
    texts, lengths, least = (each[np.minimum(size, lengths) >= least] for each in (texts, lengths, least))
    if not len(texts):
        return False
    shared = _shared(np.array(own), known, texts, lengths)
    # The most shared words first: a copy is found at once.
    for place in np.argsort(-shared, kind="stable"):
        if shared[place] >= least[place] and _common(words, known.texts[texts[place]]) >= least[place]:
            return True
    return False


def _shared(
    own: NDArray[np.int64], known: Library, texts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Count the pieces that one text has in common with each of several, shape (texts,)."""
    ends = np.cumsum(lengths)
    places = np.arange(ends[-1]) + np.repeat(known.starts[texts] - (ends - lengths), lengths)
    hits = np.isin(known.pieces[places], own)
    sums: NDArray[np.int64] = np.add.reduceat(hits.astype(np.int64), ends - lengths)
    return sums


def _common(a: Words, b: Words) -> int:
    """Return the length of the longest common subsequence, one column of the table as the bits of a number.

    Crochemore et al., "A fast and practical bit-vector algorithm for the longest common subsequence problem" (2001).
    """
    where: dict[str, int] = {}
    for place, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << place
    full = (1 << len(a)) - 1
    column = full
    for word in b:
        match = column & where.get(word, 0)
        column = ((column + match) | (column - match)) & full
    return len(a) - column.bit_count()
