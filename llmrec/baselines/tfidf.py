"""TF-IDF vectors of short texts: what the text baselines call similar."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class TfIdf:
    """A vocabulary with weights ``ln((1 + n) / (1 + df)) + 1`` over n texts (Salton and Buckley, 1988, smoothed).

    Attributes:
        index: Column of each word, words in sorted order.
        weights: Inverse document frequency of each word, shape (words,).
    """

    index: Mapping[str, int]
    weights: NDArray[np.float64]

    @staticmethod
    def of(texts: Sequence[str]) -> TfIdf:
        """Learn the vocabulary and its weights."""
        frequency = Counter(word for text in texts for word in set(_words(text)))
        words = sorted(frequency)
        have = np.array([frequency[word] for word in words], dtype=np.float64)
        return TfIdf(
            index={word: place for place, word in enumerate(words)}, weights=np.log((1 + len(texts)) / (1 + have)) + 1
        )

    def vectors(self, texts: Sequence[str]) -> Any:
        """Return one row of length 1 a text, sparse, shape (n, words); 0 for a text without a known word."""
        places = [[self.index[word] for word in _words(text) if word in self.index] for text in texts]
        rows = np.repeat(np.arange(len(texts)), [len(row) for row in places])
        columns = np.array([place for row in places for place in row], dtype=np.int64)
        matrix = sparse.csr_array((self.weights[columns], (rows, columns)), shape=(len(texts), len(self.index)))
        matrix.sum_duplicates()
        lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
        return (sparse.diags_array(1 / np.where(lengths > 0, lengths, 1.0)) @ matrix).tocsr()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
