"""Metrics of generated explanations: feature match and coverage, diversity, hallucination, unique sentences.

FMR, FCR, DIV and USR are those of Li et al., "Generate Neural Template Explanations for Recommendation" (NETE, CIKM
2020), which Li et al., "Personalized Transformer for Explainable Recommendation" (PETER, ACL 2021), adopts. A *feature*
is a word or phrase that a review is about, such as "battery life"; a text names it if its lower-cased words occur
consecutively in the text, as whole words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrec.metrics.stats import MetricValues, resample_counts, sum_rows_by_user
from llmrec.metrics.text import WordSequence, lowercase_words, ngrams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.metrics.stats import Statistic


# --------------------------------------------------------------------------- copies
# Detects generated texts that copy training texts, exactly and without comparing all pairs.
#
# The similarity of two texts is ROUGE-L's F-measure (Lin, 2004) on lower-cased words: twice the length of the longest
# common subsequence over the sum of both lengths. A pair above a threshold shares most of its words, and so at least
# one of the rarest words of each (prefix filtering: Chaudhuri et al., ICDE 2006; Bayardo et al., WWW 2007). So an
# inverted index over rare words finds all pairs that can reach the threshold, and only their similarity is computed.


COPY_THRESHOLD = 0.9
"""Minimum similarity of a copy."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# Tolerance for rounding errors of word counts.
_EPS = 1e-9


@dataclass(frozen=True, slots=True)
class TrainingTextIndex:
    """An index of training texts and their sentences by their rarest words.

    A *piece* is a word with the number of its earlier occurrences in the text, so that a text is a set of pieces.
    Pieces are numbered by the number of texts that contain them, rarest first.

    Attributes:
        texts: Different word sequences, shape (n,).
        same: The same sequences as a set, for lookup.
        number: Number of each piece.
        pieces: Numbers of all texts' pieces, one text after the other, shape (total,).
        starts: Start of each text's pieces, and the end, shape (n + 1,).
        holders: Texts that have a piece among their rarest ones, concatenated over pieces.
        held: Start of each piece's holders, and the end, shape (pieces + 1,).
    """

    texts: tuple[WordSequence, ...]
    same: frozenset[WordSequence]
    number: Mapping[tuple[str, int], int]
    pieces: NDArray[np.int64]
    starts: NDArray[np.int64]
    holders: NDArray[np.int64]
    held: NDArray[np.int64]


def index_training_texts(texts: Iterable[str]) -> TrainingTextIndex:
    """Index training texts, both whole and sentence by sentence."""
    units = [lowercase_words(unit) for text in texts for unit in _text_and_sentences(text)]
    known = tuple(dict.fromkeys(unit for unit in units if unit))
    all_pieces = [piece for unit in known for piece in _word_occurrences(unit)]
    frequency = Counter(all_pieces)
    # Equally rare words are sorted, so that the index does not depend on the order of texts.
    number = {piece: index for index, piece in enumerate(sorted(frequency, key=lambda key: (frequency[key], key)))}
    lengths = np.array([len(unit) for unit in known], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    owner = np.repeat(np.arange(len(known)), lengths)
    pieces = np.array([number[piece] for piece in all_pieces], dtype=np.int64)
    pieces = pieces[np.lexsort((pieces, owner))]
    rare = np.arange(len(pieces)) - starts[owner] < _prefix_lengths(lengths)[owner]
    order = np.argsort(pieces[rare], kind="stable")
    counts = np.bincount(pieces[rare], minlength=len(number))
    return TrainingTextIndex(
        texts=known,
        same=frozenset(known),
        number=number,
        pieces=pieces,
        starts=starts,
        holders=owner[rare][order],
        held=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def detect_copies(texts: Sequence[str], known: TrainingTextIndex) -> NDArray[np.bool_]:
    """Return whether each generated text is a near copy of a training text or sentence.

    A text without words is not a copy. Short texts are often copies, so the copy rate of generated texts is reported
    with that of the true texts.

    Returns:
        Shape (n,).
    """
    cut = [lowercase_words(text) for text in texts]
    result = {words: _is_copy(words, known) for words in set(cut)}
    return np.array([result[words] for words in cut], dtype=np.bool_)


# --------------------------------------------------------------------------- helpers


def _text_and_sentences(text: str) -> Iterable[str]:
    sentences = _SENTENCE_END.split(text.strip())
    return [text, *sentences] if len(sentences) > 1 else [text]


def _word_occurrences(words: WordSequence) -> list[tuple[str, int]]:
    before: Counter[str] = Counter()
    pieces = []
    for word in words:
        pieces.append((word, before[word]))
        before[word] += 1
    return pieces


def _prefix_lengths(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many of the rarest words of a text must be indexed to find all similar texts.

    The shortest text that can be similar to one of n words has ``n t / (2 - t)`` words, all of them shared.
    """
    shared = np.ceil(lengths * COPY_THRESHOLD / (2 - COPY_THRESHOLD) - _EPS).astype(np.int64)
    prefixes: NDArray[np.int64] = lengths - np.maximum(shared, 1) + 1
    return prefixes


def _is_copy(words: WordSequence, known: TrainingTextIndex) -> bool:
    if not words or words in known.same:
        return bool(words)
    size = len(words)
    # Words that occur in no training text are the rarest.
    numbers = sorted(known.number.get(piece, -1) for piece in _word_occurrences(words))
    rare = [piece for piece in numbers[: int(_prefix_lengths(np.array([size]))[0])] if piece >= 0]
    if not rare:
        return False
    texts = np.unique(np.concatenate([known.holders[known.held[piece] : known.held[piece + 1]] for piece in rare]))
    lengths = known.starts[texts + 1] - known.starts[texts]
    least = COPY_THRESHOLD * (size + lengths) / 2 - _EPS
    texts, lengths, least = (item[np.minimum(size, lengths) >= least] for item in (texts, lengths, least))
    if not len(texts):
        return False
    shared = _shared_word_counts(np.array(numbers), known, texts, lengths)
    # Texts with the most shared words first, to find copies early.
    for index in np.argsort(-shared, kind="stable"):
        if (
            shared[index] >= least[index]
            and _common_subsequence_length(words, known.texts[texts[index]]) >= least[index]
        ):
            return True
    return False


def _shared_word_counts(
    numbers: NDArray[np.int64], known: TrainingTextIndex, texts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the number of words that a text has in common with each of several texts, shape (texts,)."""
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) + np.repeat(known.starts[texts] - (ends - lengths), lengths)
    hits = np.isin(known.pieces[positions], numbers)
    sums: NDArray[np.int64] = np.add.reduceat(hits.astype(np.int64), ends - lengths)
    return sums


def _common_subsequence_length(a: WordSequence, b: WordSequence) -> int:
    """Return the length of the longest common subsequence.

    Crochemore et al., "A fast and practical bit-vector algorithm for the longest common subsequence problem" (2001).
    """
    where: dict[str, int] = {}
    for index, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << index
    full = (1 << len(a)) - 1
    column = full
    for word in b:
        match = column & where.get(word, 0)
        column = ((column + match) | (column - match)) & full
    return len(a) - column.bit_count()


@dataclass(frozen=True, slots=True)
class ReviewFeatures:
    """The features of a data set, and which features the training reviews of each item mention.

    Attributes:
        vocabulary: Every feature of the training reviews, as its lower-cased words.
        of_item: By item, the features that its training reviews name or are annotated with.
        annotated: The annotated feature of each (user, item), including held-out pairs.
    """

    vocabulary: frozenset[WordSequence]
    of_item: Mapping[str, frozenset[WordSequence]]
    annotated: Mapping[tuple[str, str], WordSequence]


@dataclass(frozen=True, slots=True)
class ExplanationReference:
    """The reference for generated explanations: training texts, and features if there are any."""

    texts: TrainingTextIndex
    features: ReviewFeatures | None = None


def build_explanation_reference(
    users: Sequence[str],
    items: Sequence[str],
    texts: Sequence[str | None],
    features: Mapping[tuple[str, str], str] | None = None,
) -> ExplanationReference:
    """Build the reference for explanations from training texts and the features of (user, item) pairs.

    Args:
        users: Users of the training interactions, shape (n,); an interaction with several texts is repeated.
        items: Their items.
        texts: Their texts; None for no text.
        features: The feature of each (user, item); None if the data has none. Features of held-out pairs are used as
            references but not added to the vocabulary.

    Raises:
        ValueError: If the three differ in length.
    """
    rows = [(user, item, text or "") for user, item, text in zip(users, items, texts, strict=True)]
    known = index_training_texts(text for *_, text in rows if text)
    annotated = {pair: words for pair, feature in (features or {}).items() if (words := lowercase_words(feature))}
    references = [annotated.get((user, item)) for user, item, _ in rows]
    vocabulary = frozenset(words for words in references if words)
    if not vocabulary:
        return ExplanationReference(known)
    of_item: dict[str, set[WordSequence]] = {}
    mentions = find_features([text for *_, text in rows], vocabulary)
    for (_, item, _), mentioned, annotation in zip(rows, mentions, references, strict=True):
        of_item.setdefault(item, set()).update(mentioned, *([{annotation}] if annotation else []))
    return ExplanationReference(
        known, ReviewFeatures(vocabulary, {k: frozenset(v) for k, v in of_item.items()}, annotated)
    )


def find_features(texts: Iterable[str], vocabulary: frozenset[WordSequence]) -> list[frozenset[WordSequence]]:
    """Return the features that each text mentions.

    If a feature contains another, as "battery life" contains "battery", a text with the longer one names both.
    """
    sizes = sorted({len(words) for words in vocabulary})
    results = []
    for text in texts:
        words = lowercase_words(text)
        grams = (gram for n in sizes for gram in ngrams(words, n))
        results.append(frozenset(gram for gram in grams if gram in vocabulary))
    return results


def feature_match(texts: Sequence[str], expected: Sequence[WordSequence]) -> NDArray[np.bool_]:
    """Return whether each text mentions the feature of its reference; the mean is the feature matching ratio, FMR.

    Args:
        texts: Generated texts.
        expected: The feature of each reference, split by `lowercase_words`.

    Returns:
        Shape (n,).

    Raises:
        ValueError: If the two differ in length.
    """
    pairs = zip(texts, expected, strict=True)
    return np.array([bool(find_features([text], frozenset([words]))[0]) for text, words in pairs], dtype=np.bool_)


def feature_coverage(mentions: Sequence[frozenset[WordSequence]], vocabulary: frozenset[WordSequence]) -> float:
    """Compute the feature coverage ratio, FCR: features mentioned by any text, over all training features.

    It grows with the number of texts, so compare only over the same requests.

    Raises:
        ValueError: If there are no features.
    """
    if not vocabulary:
        raise ValueError("feature coverage is undefined without features")
    return len(frozenset().union(*mentions) & vocabulary) / len(vocabulary)


def feature_diversity(mentions: Sequence[frozenset[WordSequence]]) -> float | None:
    """Compute DIV: the mean number of features that two generated texts share; lower is more diverse.

    A feature that c texts name is shared by c (c - 1) / 2 pairs, so pairs need not be enumerated. Texts without
    features lower the value, so report it with FCR.

    Returns:
        A value of 0 or more; None for fewer than two texts.
    """
    if len(mentions) < 2:
        return None
    counts = Counter(feature for features in mentions for feature in features)
    shared = sum(count * (count - 1) for count in counts.values())
    return shared / (len(mentions) * (len(mentions) - 1))


def unique_sentences(texts: Sequence[str]) -> float:
    """Compute the unique sentence ratio, USR: distinct texts over all texts, ignoring case.

    A text without words does not count as distinct. The value decreases with the number of texts.

    Raises:
        ValueError: If there are no texts.
    """
    if not texts:
        raise ValueError("text metrics are undefined without requests")
    return len({words for text in texts if (words := lowercase_words(text))}) / len(texts)


def count_unsupported_features(
    mentions: Sequence[frozenset[WordSequence]], items: Sequence[str], of_item: Mapping[str, frozenset[WordSequence]]
) -> NDArray[np.float64]:
    """Count the features that each text mentions, in total and without support in the item's training reviews.

    The hallucination rate is the sum of the latter over the sum of the former. For an item without training reviews,
    all named features are unsupported.

    Returns:
        Shape (n, 2): named features, and of these the unsupported ones.

    Raises:
        ValueError: If texts and items differ in number.
    """
    pairs = list(zip(mentions, items, strict=True))
    counts = [(len(features), len(features - of_item.get(item, frozenset()))) for features, item in pairs]
    return np.array(counts, dtype=np.float64).reshape(-1, 2)


def hallucination_statistic(counts: NDArray[np.float64], users: Sequence[str]) -> Statistic:
    """Return the hallucination rate as a function of resampled users, for `llmrec.metrics.stats.statistic_interval`.

    Args:
        counts: From `count_unsupported_features`, shape (n, 2).
        users: The user of each text; the function numbers users in sorted order.

    Returns:
        A function from index arrays of shape (b, m) to b values; 0 if no text names a feature.
    """
    total = sum_rows_by_user(counts, users)

    def statistic(indices: NDArray[np.intp]) -> NDArray[np.float64]:
        sums = resample_counts(indices, len(total)) @ total
        return np.divide(sums[:, 1], sums[:, 0], out=np.zeros(len(sums)), where=sums[:, 0] > 0)

    return statistic


@dataclass(frozen=True, slots=True, kw_only=True)
class MentionedFeatures:
    """Features mentioned by generated texts.

    Attributes:
        known: Requests whose reference has a feature, shape (m,).
        match: Whether their texts name it, shape (m,).
        coverage: FCR.
        diversity: DIV; None for a single text.
        counts: Named features, and of these the unsupported ones, shape (n, 2).
        mentions: The features that each of the n texts names.
        vocabulary: Number of features.
    """

    known: NDArray[np.intp]
    match: NDArray[np.float64]
    coverage: float
    diversity: float | None
    counts: NDArray[np.float64]
    mentions: Sequence[frozenset[WordSequence]]
    vocabulary: int

    @property
    def how(self) -> str:
        """Vocabulary size, which is part of the signature of feature metrics."""
        return f"features-{self.vocabulary}"

    @property
    def hallucination(self) -> float | None:
        """Share of the mentioned features that are not supported by reviews; None if no feature is mentioned."""
        mentioned, unsupported = self.counts.sum(axis=0)
        return float(unsupported / mentioned) if mentioned else None


def measure_mentioned_features(
    texts: Sequence[str], users: Sequence[str], items: Sequence[str], features: ReviewFeatures
) -> MentionedFeatures:
    """Count the features in generated texts, each about a user and an item."""
    expected = [features.annotated.get(pair) for pair in zip(users, items, strict=True)]
    known = [index for index, words in enumerate(expected) if words]
    mentions = find_features(texts, features.vocabulary)
    match = feature_match([texts[index] for index in known], [expected[index] or () for index in known])
    return MentionedFeatures(
        known=np.array(known, dtype=np.intp),
        match=match.astype(np.float64),
        coverage=feature_coverage(mentions, features.vocabulary),
        diversity=feature_diversity(mentions),
        counts=count_unsupported_features(mentions, items, features.of_item),
        mentions=mentions,
        vocabulary=len(features.vocabulary),
    )


def copy_rate(texts: Sequence[str], background: ExplanationReference) -> MetricValues:
    """CopyRate: the share of texts that copy a training text or sentence; see `detect_copies`."""
    copies = detect_copies(texts, background.texts).astype(np.float64)
    return MetricValues(result=copies, how=f"rouge-l-{COPY_THRESHOLD:g}")


def match_rate(named: MentionedFeatures, owners: Sequence[str]) -> MetricValues:
    """Compute FMR over the requests whose reference has a feature; see `feature_match`."""
    if not len(named.known):
        return MetricValues(result=None, how=named.how, undefined="no reference text contains a feature")
    return MetricValues(result=named.match, users=[owners[index] for index in named.known], how=named.how)


def coverage_rate(named: MentionedFeatures) -> MetricValues:
    """FCR: see `feature_coverage`."""
    return MetricValues(result=named.coverage, how=named.how)


def shared_features(named: MentionedFeatures) -> MetricValues:
    """DIV: see `feature_diversity`."""
    return MetricValues(result=named.diversity, how=named.how, undefined="a single text has no pairs")


def hallucination_rate(named: MentionedFeatures, owners: Sequence[str]) -> MetricValues:
    """Hallucination: see `hallucination_statistic`."""
    if not named.counts[:, 0].sum():
        return MetricValues(result=None, how=named.how, undefined="no text contains a feature")
    return MetricValues(result=hallucination_statistic(named.counts, owners), how=named.how)
