"""Text baselines without a language model: copied training texts, and ratings by ridge regression on TF-IDF."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field
from scipy import sparse

from llmrec.baselines.base import Baseline, NoParameters, PositiveFloat
from llmrec.baselines.rated import rate_requests, training_ratings
from llmrec.errors import DataError
from llmrec.recipe.schema import Positive, Section
from llmrec.types import Answer, Request, Text, Unparsed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset


_WORD = re.compile(r"\w+")
# A sentence ends with a punctuation mark before white space, or at the end of the text.
_SENTENCE = re.compile(r"\s*(\S.*?(?:[.!?]+[\"')\]]*(?=\s)|$))", re.DOTALL)


@dataclass(frozen=True)
class TfIdf:
    """TF-IDF with smoothed weights ``ln((1 + n) / (1 + df)) + 1`` over n texts (Salton and Buckley, 1988).

    Attributes:
        index: Column of each word or n-gram, in sorted order.
        weights: Inverse document frequency of each, shape (words,).
        longest: Maximum length of n-grams in words; 1: single words.
    """

    index: Mapping[str, int]
    weights: NDArray[np.float64]
    longest: int = 1

    @staticmethod
    def of(texts: Sequence[str], *, longest: int = 1, least: int = 1) -> TfIdf:
        """Learn the vocabulary and its weights.

        Args:
            texts: The texts.
            longest: Maximum length of n-grams in words.
            least: The minimum number of texts that contain a word or n-gram.
        """
        frequency = Counter(word for text in texts for word in set(_word_ngrams(text, longest)))
        words = sorted(word for word, count in frequency.items() if count >= least)
        document_counts = np.array([frequency[word] for word in words], dtype=np.float64)
        return TfIdf(
            index={word: index for index, word in enumerate(words)},
            weights=np.log((1 + len(texts)) / (1 + document_counts)) + 1,
            longest=longest,
        )

    def vectors(self, texts: Sequence[str]) -> Any:
        """Return normalised TF-IDF vectors, sparse, shape (n, words); 0 for a text without known words."""
        indices = [
            [self.index[word] for word in _word_ngrams(text, self.longest) if word in self.index] for text in texts
        ]
        rows = np.repeat(np.arange(len(texts)), [len(row) for row in indices])
        columns = np.array([index for row in indices for index in row], dtype=np.int64)
        matrix = sparse.csr_array((self.weights[columns], (rows, columns)), shape=(len(texts), len(self.index)))
        matrix.sum_duplicates()
        lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
        return (sparse.diags_array(1 / np.where(lengths > 0, lengths, 1.0)) @ matrix).tocsr()


def _word_ngrams(text: str, longest: int) -> list[str]:
    """Return the words and n-grams of a text, up to length ``longest``."""
    words = _WORD.findall(text.lower())
    return [
        " ".join(words[start : start + size])
        for size in range(1, longest + 1)
        for start in range(len(words) - size + 1)
    ]


@dataclass(frozen=True)
class _TrainingTexts:
    """Training texts in a fixed order, with their users and items."""

    users: tuple[str, ...]
    items: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class _TextIndex:
    """Training texts with their vectors, indices by item and user, and titles."""

    known: _TrainingTexts
    model: TfIdf
    vectors: Any
    of_item: Mapping[str, NDArray[np.int64]]
    of_user: Mapping[str, NDArray[np.int64]]
    titles: Mapping[str, str]
    fallback: str


class FrequentText(Baseline[NoParameters, str]):
    """Returns the most frequent training text for every request.

    Among equally frequent texts it takes the one most similar to the sum of all training vectors.
    """

    name = "frequent-text"
    Config = NoParameters

    def learn(self, data: SplitDataset) -> None:
        """Find the most frequent training text.

        Raises:
            DataError: If the training interactions carry no texts.
        """
        texts = _training_texts(data, self.name).texts
        self._model = _most_frequent_text(texts, TfIdf.of(texts).vectors(texts))

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the most frequent text for every request."""
        text = self._fitted
        return [_text_answer(request, text) for request in requests]


class NearestText(Baseline[NoParameters, _TextIndex]):
    """Returns the training text about the same item that is most similar to the request.

    The request text is: the item's title, the texts in the user's history and the request's context. If there is no
    text about the item, the user's text about the item with the most similar title is taken; for a user without texts,
    the most frequent training text.
    """

    name = "nearest-text"
    Config = NoParameters
    READS = "texts"

    def learn(self, data: SplitDataset) -> None:
        """Index the training texts.

        Raises:
            DataError: If the training interactions carry no texts.
        """
        known = _training_texts(data, self.name)
        titles = {item_id: item.title for item_id, item in data.dataset.items.items()}
        model = TfIdf.of([*known.texts, *(titles[item] for item in sorted(titles))])
        vectors = model.vectors(known.texts)
        self._model = _TextIndex(
            known=known,
            model=model,
            vectors=vectors,
            of_item=_rows_by_name(known.items),
            of_user=_rows_by_name(known.users),
            titles=titles,
            fallback=_most_frequent_text(known.texts, vectors),
        )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the most similar text for every request."""
        library = self._fitted
        return [_text_answer(request, _nearest_text(request, library)) for request in requests]


class FirstSentence(FrequentText):
    """Returns the first sentence of the review in the request; without a review, the most frequent training text.

    The first sentence of a text is the usual baseline for summaries (Nenkova, AAAI 2005).
    """

    name = "first-sentence"
    READS = "texts"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the first sentence of the review for every request."""
        fallback = self._fitted
        return [
            _text_answer(request, first_sentence(request.context.get("review", "")) or fallback) for request in requests
        ]


def first_sentence(text: str) -> str:
    """Return a text up to its first full stop, question mark or exclamation mark."""
    result = _SENTENCE.match(text)
    return result.group(1).strip() if result else ""


# --------------------------------------------------------------------------- ratings from texts


class TextRidgeConfig(Section):
    """Parameters of `TextRidge`."""

    penalty: PositiveFloat = Field(1.0, description="Ridge penalty.")
    words: Positive = Field(2, description="Maximum n-gram length.")
    least: Positive = Field(2, description="Minimum number of training reviews with an n-gram.")


@dataclass(frozen=True)
class _RidgeModel:
    """A fitted ridge regression: vocabulary, word weights, means and rating scale."""

    model: TfIdf
    weights: NDArray[np.float64]
    average: float
    mean: float
    scale: tuple[float, float]


class TextRidge(Baseline[TextRidgeConfig, _RidgeModel]):
    """Predicts ratings from reviews by ridge regression on TF-IDF vectors of words and n-grams.

    ``rating = mean + w . (x - average x)`` with ``w`` the minimum of the squared error over the training reviews plus
    ``penalty * |w|**2`` (Hoerl and Kennard, 1970; of words for ratings: Pang and Lee, ACL 2005). The request contains
    the review; one without a review, or without a known word, gets the mean. User and item are ignored.
    """

    name = "text-ridge"
    Config = TextRidgeConfig
    READS = "texts"
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "penalty": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        "words": (1, 2, 3),
        "least": (1, 2, 3, 5, 10),
    }

    def learn(self, data: SplitDataset) -> None:
        """Compute the word weights.

        Raises:
            DataError: If the training interactions carry no ratings, or the data has no reviews for them.
        """
        known, config, reviews = training_ratings(data, self.name), self._config, data.dataset.reviews
        users, items = list(known.user_index), list(known.item_index)
        pairs = [(users[user], items[item]) for user, item in zip(known.users, known.items, strict=True)]
        rows = [row for row, pair in enumerate(pairs) if pair in reviews and reviews[pair].text]
        if not rows:
            raise DataError(
                f"the baseline {self.name!r} needs reviews, but the training interactions of {data.dataset.name!r} "
                "have no reviews; use a source with reviews, such as amazon-reviews, or remove the stars task",
                kind="missing-value",
            )
        texts, values = [reviews[pairs[row]].text for row in rows], known.values[rows]
        model = TfIdf.of(texts, longest=config.words, least=config.least)
        vectors, mean = model.vectors(texts), float(values.mean())
        centre = np.asarray(vectors.mean(axis=0)).ravel()
        # Least squares on centred vectors without making them dense.
        # Importing scipy takes 0.1 s, which most commands do not need.
        from scipy.sparse.linalg import LinearOperator, lsqr

        centred = LinearOperator(
            vectors.shape,
            matvec=lambda weights: vectors @ weights - centre @ weights,
            rmatvec=lambda errors: vectors.T @ errors - centre * errors.sum(),
            dtype=np.float64,
        )
        result = lsqr(centred, values - mean, damp=float(np.sqrt(config.penalty)), atol=1e-8, btol=1e-8, iter_lim=1000)
        weights = np.asarray(result[0], dtype=np.float64)
        self._model = _RidgeModel(model, weights, float(centre @ weights), mean, known.scale)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the rating of the review in each request."""
        fitted = self._fitted
        vectors = fitted.model.vectors([request.context.get("review", "") for request in requests])
        offsets = np.where(np.diff(vectors.indptr) > 0, vectors @ fitted.weights - fitted.average, 0.0)
        values = iter((fitted.mean + offsets)[[request.item is not None for request in requests]].tolist())
        return rate_requests(requests, fitted.scale, lambda user, item, request: float(next(values)))


# --------------------------------------------------------------------------- helpers


def _training_texts(data: SplitDataset, name: str) -> _TrainingTexts:
    rows = data.train.drop_nulls("text").select("user_id", "item_id", "text").sort("user_id", "item_id", "text")
    kept = [(user, item, text.strip()) for user, item, text in rows.iter_rows() if text.strip()]
    if not kept:
        raise DataError(
            f"the baseline {name!r} needs texts, but the training interactions of {data.dataset.name!r} have no "
            "texts; set data.columns.text to the text column, or remove the explanation task",
            kind="missing-column",
            at=data.dataset.name,
            column="text",
        )
    users, items, texts = zip(*kept, strict=True)
    return _TrainingTexts(users=users, items=items, texts=texts)


def _rows_by_name(names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    rows: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        rows.setdefault(name, []).append(index)
    return {name: np.array(indices) for name, indices in rows.items()}


def _most_frequent_text(texts: Sequence[str], vectors: Any) -> str:
    counts = Counter(texts)
    most = max(counts.values())
    tied = np.array([row for row, text in enumerate(texts) if counts[text] == most])
    centre = np.asarray(vectors.sum(axis=0)).ravel()
    # Rounded, so that ties are broken by spelling and not by the last bits of a sum.
    similarity = np.round(vectors[tied] @ centre, 9).tolist()
    ranked = [(-value, texts[row]) for value, row in zip(similarity, tied.tolist(), strict=True)]
    text: str = min(ranked)[1]
    return text


def _nearest_text(request: Request, library: _TextIndex) -> str:
    item = request.item or ""
    title = library.titles.get(item, "")
    if item in library.of_item:
        rows = library.of_item[item]
        history_texts = [event.text for event in request.history if event.text]
        query = library.model.vectors([" ".join([title, *request.context.values(), *history_texts])])
        similarity = (library.vectors[rows] @ query.T).toarray().ravel()
    elif request.user_id in library.of_user:
        rows = library.of_user[request.user_id]
        title_vectors = library.model.vectors([library.titles.get(library.known.items[row], "") for row in rows])
        similarity = (title_vectors @ library.model.vectors([title]).T).toarray().ravel()
    else:
        return library.fallback
    best = int(np.argmax(np.round(similarity, 9)))
    return library.known.texts[int(rows[best])]


def _text_answer(request: Request, text: str) -> Answer:
    if request.item is None:
        return Unparsed(request_id=request.id, reason="the request has no item to write about")
    return Text(request_id=request.id, text=text)
