"""Text controls: what can be had without writing a word, by TF-IDF vectors of short texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from llmrec.baselines.base import Baseline, NoParameters
from llmrec.errors import DataError
from llmrec.types import Answer, Request, Text, Unparsed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset


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


@dataclass(frozen=True)
class _Texts:
    """Training texts in a canonical order, with who wrote them about what."""

    users: tuple[str, ...]
    items: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class _Library:
    """Training texts, their vectors, where each item's and each user's stand, and the titles."""

    known: _Texts
    model: TfIdf
    vectors: Any
    of_item: Mapping[str, NDArray[np.int64]]
    of_user: Mapping[str, NDArray[np.int64]]
    titles: Mapping[str, str]
    fallback: str


class FrequentText(Baseline[NoParameters, str]):
    """Writes the most frequent training text for everyone.

    Of equally frequent ones it takes the most typical: the one nearest to the sum of all training vectors.
    """

    name = "frequent-text"
    Config = NoParameters

    def fit(self, data: SplitDataset) -> None:
        """Find the text.

        Raises:
            DataError: If the training interactions carry no texts.
        """
        known = _texts(data, self.name)
        model = TfIdf.of(known.texts)
        self._model = _most_frequent(known.texts, model.vectors(known.texts))

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Write the text for each request's item."""
        text = self._fitted
        return [_write(request, text) for request in requests]


class NearestText(Baseline[NoParameters, _Library]):
    """Writes a training text that was written about the same item, the one most like what the request says.

    The request says: the item's title, the texts in the user's history and the request's context. Where nobody wrote
    about the item, the user's own text about the item with the most similar title is taken; for a user without
    texts, the most frequent training text.
    """

    name = "nearest-text"
    Config = NoParameters

    def fit(self, data: SplitDataset) -> None:
        """Index the training texts.

        Raises:
            DataError: If the training interactions carry no texts.
        """
        known = _texts(data, self.name)
        titles = {item_id: item.title for item_id, item in data.dataset.items.items()}
        model = TfIdf.of([*known.texts, *(titles[item] for item in sorted(titles))])
        vectors = model.vectors(known.texts)
        self._model = _Library(
            known=known,
            model=model,
            vectors=vectors,
            of_item=_places(known.items),
            of_user=_places(known.users),
            titles=titles,
            fallback=_most_frequent(known.texts, vectors),
        )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Write the text for each request's item."""
        library = self._fitted
        return [_write(request, _nearest(request, library)) for request in requests]


# --------------------------------------------------------------------------- parts


def _texts(data: SplitDataset, name: str) -> _Texts:
    rows = data.train.drop_nulls("text").select("user_id", "item_id", "text").sort("user_id", "item_id", "text")
    kept = [(user, item, text.strip()) for user, item, text in rows.iter_rows() if text.strip()]
    if not kept:
        raise DataError(
            f"the baseline {name!r} needs texts, and the training interactions of {data.dataset.name!r} have none; "
            "name the text column under data.columns.text, or leave the explanation task out",
            kind="missing-column",
            at=data.dataset.name,
            column="text",
        )
    users, items, texts = zip(*kept, strict=True)
    return _Texts(users=users, items=items, texts=texts)


def _places(names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    rows: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        rows.setdefault(name, []).append(place)
    return {name: np.array(places) for name, places in rows.items()}


def _most_frequent(texts: Sequence[str], vectors: Any) -> str:
    counts = Counter(texts)
    most = max(counts.values())
    tied = np.array([place for place, text in enumerate(texts) if counts[text] == most])
    centre = np.asarray(vectors.sum(axis=0)).ravel()
    # Rounded, so that equally typical texts fall by their spelling and not by the last bits of a sum.
    typical = np.round(vectors[tied] @ centre, 9).tolist()
    ranked = [(-closeness, texts[place]) for closeness, place in zip(typical, tied.tolist(), strict=True)]
    text: str = min(ranked)[1]
    return text


def _nearest(request: Request, library: _Library) -> str:
    item = request.item or ""
    title = library.titles.get(item, "")
    if item in library.of_item:
        places = library.of_item[item]
        said = [event.text for event in request.history if event.text]
        query = library.model.vectors([" ".join([title, *request.context.values(), *said])])
        near = (library.vectors[places] @ query.T).toarray().ravel()
    elif request.user_id in library.of_user:
        places = library.of_user[request.user_id]
        own = library.model.vectors([library.titles.get(library.known.items[place], "") for place in places])
        near = (own @ library.model.vectors([title]).T).toarray().ravel()
    else:
        return library.fallback
    best = int(np.argmax(np.round(near, 9)))
    return library.known.texts[int(places[best])]


def _write(request: Request, text: str) -> Answer:
    if request.item is None:
        return Unparsed(request_id=request.id, reason="the request names no item to write about")
    return Text(request_id=request.id, text=text)
