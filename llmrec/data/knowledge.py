"""Documents about items: found by item id or title, and shortened to the passages that fit a prompt.

The retrieved passages become the item field ``facts``, numbered in one text. It is data like any other field: templates
show it as ``item.facts``, it is cleaned before a model reads it, and it is part of the fingerprint of the data, so
different documents yield different prompts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from llmrec.data.dataset import Dataset
from llmrec.data.derived import split_sentences
from llmrec.data.read.files import expand_path
from llmrec.data.read.table import read_table
from llmrec.data.read.tables import find_column
from llmrec.data.read.typed import check_unique_ids, id_column, plain_text_column
from llmrec.errors import DataError
from llmrec.recipe.schema import FactsSection
from llmrec.types import Item

if TYPE_CHECKING:
    from numpy.typing import NDArray

FACTS_FIELD = "facts"
"""The item field with the retrieved passages."""

_WORD, _WORD_OR_MARK, _CITATION = re.compile(r"\w+"), re.compile(r"\w+|[^\w\s]"), re.compile(r"\s*\[(\d+)\]")
# k1 (saturation of repeated words) and b (normalisation by text length), with common values.
_K1, _B = 1.2, 0.75


@dataclass(frozen=True)
class BM25:
    """BM25 word weights of a set of texts (Robertson and Zaragoza, 2009, equation 3.15).

    Attributes:
        index: Column of each word.
        weights: Sparse, shape (texts, words).
    """

    index: Mapping[str, int]
    weights: Any

    @staticmethod
    def of(texts: Sequence[str]) -> BM25:
        """Compute the weights of words in texts: ``idf tf (k1 + 1) / (tf + k1 (1 - b + b length / mean length))``."""
        counts = [Counter(_lowercase_words(text)) for text in texts]
        frequency = Counter(word for counted in counts for word in counted)
        index = {word: position for position, word in enumerate(sorted(frequency))}
        idf = {word: np.log(1 + (len(texts) - have + 0.5) / (have + 0.5)) for word, have in frequency.items()}
        mean = max(1.0, sum(map(Counter.total, counts)) / max(1, len(counts)))
        rows, columns, values = [], [], []
        for row, counted in enumerate(counts):
            slow = _K1 * (1 - _B + _B * counted.total() / mean)
            for word, times in counted.items():
                rows.append(row)
                columns.append(index[word])
                values.append(idf[word] * times * (_K1 + 1) / (times + slow))
        shape = (len(texts), len(index))
        return BM25(index, sparse.csr_array((values, (rows, columns)), shape=shape))

    def scores(self, question: str, part: slice = slice(None)) -> NDArray[np.float64]:
        """Return the BM25 scores of texts for a question, shape (texts,)."""
        words = np.zeros(len(self.index))
        for word in _lowercase_words(question):
            if word in self.index:
                words[self.index[word]] += 1
        result: NDArray[np.float64] = self.weights[part] @ words
        return result


@dataclass(frozen=True)
class Documents:
    """Documents about items.

    Attributes:
        names: Ids of the items, or titles if the table has no ids.
        written: One document per name.
        by_title: Whether names are titles.
        source: Name and hash of the table.
    """

    names: tuple[str, ...]
    written: tuple[str, ...]
    by_title: bool
    source: str

    @staticmethod
    def read(path: str, *, column: str = "text") -> Documents:
        """Read a table with a column ``item_id`` or ``title`` and a column of texts.

        Raises:
            DataError: If it cannot be read, a column is missing, or an id is repeated.
        """
        table = read_table(expand_path(path))
        key = find_column(table, None, "item_id", "data.facts") or find_column(table, None, "title", "data.facts")
        text = find_column(table, column, "", "data.facts.text")
        if key is None or text is None:
            raise DataError.at(table.name, "missing-column", ": documents need a column item_id or title", "data.facts")
        by_title = key == "title"
        names = plain_text_column(table, key).fill_null("") if by_title else id_column(table, key)
        if not by_title:
            check_unique_ids(table, key, names, "item", "join its documents into one")
        return Documents(
            tuple(names),
            tuple(plain_text_column(table, text).fill_null("")),
            by_title,
            f"{table.name} {table.sha256[:16]}",
        )

    @cached_property
    def _index(self) -> Mapping[str, int]:
        return {name: index for index, name in reversed(list(enumerate(self.names)))}

    @cached_property
    def _document_weights(self) -> BM25:
        return BM25.of([f"{name} {name} {text}" for name, text in zip(self.names, self.written, strict=True)])

    @cached_property
    def _passages(self) -> tuple[tuple[str, ...], NDArray[np.int64], BM25]:
        """All passages, the index of the first passage of each document, and BM25 weights."""
        cut = [split_sentences(text) for text in self.written]
        flat = tuple(passage for document in cut for passage in document)
        return flat, np.cumsum([0, *map(len, cut)]), BM25.of(flat)

    def about(self, item: Item) -> int | None:
        """Return the index of an item's document, found by id or by the words of its title.

        A title of one word must be a word of the document's title: many texts contain "heat", but few are about "Heat".
        """
        if not self.by_title:
            return self._index.get(item.item_id)
        if (same := self._index.get(item.title)) is not None:
            return same
        if not self.names:
            return None
        best = int(np.argmax(self._document_weights.scores(item.title)))
        title_words, searched = set(_lowercase_words(item.title)), set(_lowercase_words(self.names[best]))
        if len(title_words) > 1:
            searched |= set(_lowercase_words(self.written[best]))
        return best if title_words and title_words <= searched else None

    def passages(self, document: int, question: str, tokens: int) -> list[str]:
        """Return the passages of a document that score highest for a question, in document order.

        Args:
            document: Index of the document.
            question: The question in words. If it is empty or no passage has any of its words, the first passages are
                used.
            tokens: Maximum words and punctuation marks in total; a passage that does not fit is excluded, or truncated
                if it is the best one.
        """
        flat, begins, weights = self._passages
        part = slice(int(begins[document]), int(begins[document + 1]))
        texts, room, kept = flat[part], tokens, dict[int, str]()
        scores = weights.scores(question, part)
        # Ties, such as all passages without a question, stay in document order.
        order = np.argsort(-scores, kind="stable")
        matching = order[scores[order] > 0]
        for index in (matching if len(matching) else order).tolist():
            marks = list(_WORD_OR_MARK.finditer(texts[index]))
            if len(marks) <= room:
                kept[index] = texts[index]
                room -= len(marks)
            elif not kept:
                kept[index] = texts[index][: marks[room - 1].end()]
                break
        return [kept[index] for index in sorted(kept)]


def with_facts(dataset: Dataset, section: FactsSection | None) -> Dataset:
    """Return a data set whose items have the passages retrieved by ``data.facts``.

    Raises:
        DataError: See `Documents.read`; or if no item has a document.
    """
    if section is None:
        return dataset
    documents, question = Documents.read(section.path, column=section.text), " ".join(section.about)
    items = dict(dataset.items)
    for name, item in dataset.items.items():
        document = documents.about(item)
        result = [] if document is None else documents.passages(document, question, section.tokens)
        if result:
            items[name] = replace(item, fields={**item.fields, FACTS_FIELD: format_passages(result)})
    described = sum(FACTS_FIELD in item.fields for item in items.values())
    if not described:
        raise DataError.at(
            section.path,
            "empty",
            f" has no document about an item of {dataset.name}; check that the ids match, or raise tokens",
        )
    fields = {"facts": documents.source, "items with facts": f"{described} of {len(items)}"}
    return replace(dataset, items=items, provenance={**dataset.provenance, **fields})


def format_passages(passages: Sequence[str]) -> str:
    """Return passages as one text, each after its number for citations."""
    # Citation numbers in the document itself would be confused with these numbers.
    cleaned = [_CITATION.sub("", passage).strip() for passage in passages]
    return " ".join(f"[{n}] {passage}" for n, passage in enumerate(cleaned, start=1))


def resolve_citations(answer: str, facts: str) -> tuple[str, tuple[str, ...]]:
    """Return an answer without citations of passages that do not exist, and the passages that it cites."""
    parts = _CITATION.split(facts)
    known = {number: text.strip() for number, text in zip(parts[1::2], parts[2::2], strict=True)}
    numbers = tuple(dict.fromkeys(number for number in _CITATION.findall(answer) if number in known))
    kept = _CITATION.sub(lambda match: match.group() if match[1] in known else "", answer)
    return kept.strip(), tuple(known[number] for number in numbers)


def _lowercase_words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
