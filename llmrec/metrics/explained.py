"""What generated explanations talk about: features named, covered, spread and made up, and sentences that repeat.

FMR, FCR, DIV and USR are those of Li et al., "Generate Neural Template Explanations for Recommendation" (NETE, CIKM
2020), which Li et al., "Personalized Transformer for Explainable Recommendation" (PETER, ACL 2021), takes over. A
*feature* is a word or phrase that a review is about, such as "battery life"; a text holds it where its lower-cased
words stand in the text one after the other, as whole words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrec.metrics.copies import Library, Words, copied, library, words_of
from llmrec.metrics.stats import times_drawn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.metrics.stats import Statistic


@dataclass(frozen=True, slots=True)
class Features:
    """The features of a data set, by what training reviews say.

    Attributes:
        vocabulary: Every feature of the training reviews, as its lower-cased words.
        of_item: The features that some training review of an item holds, or was extracted from, by item.
        asked: The feature of each (user, item), held-out pairs included, where there is one.
    """

    vocabulary: frozenset[Words]
    of_item: Mapping[str, frozenset[Words]]
    asked: Mapping[tuple[str, str], Words]


@dataclass(frozen=True, slots=True)
class Background:
    """What generated explanations are held against: training texts, and features where the data knows them."""

    texts: Library
    features: Features | None = None


def background(
    users: Sequence[str],
    items: Sequence[str],
    texts: Sequence[str | None],
    features: Mapping[tuple[str, str], str] | None = None,
) -> Background:
    """Take training texts, and the features of pairs, as what explanations are held against.

    Args:
        users: Users of the training interactions, shape (n,); an interaction with several texts stands several times.
        items: Their items.
        texts: Their texts; None where there is none.
        features: The feature of each (user, item); None where the data knows none. Pairs that are no training
            interactions are held-out ones: their features are asked for, and are in no vocabulary by that.

    Raises:
        ValueError: If the three differ in length.
    """
    told = [(user, item, text or "") for user, item, text in zip(users, items, texts, strict=True)]
    known = library(text for *_, text in told if text)
    asked = {pair: words for pair, feature in (features or {}).items() if (words := words_of(feature))}
    extracted = [asked.get((user, item)) for user, item, _ in told]
    vocabulary = frozenset(words for words in extracted if words)
    if not vocabulary:
        return Background(known)
    of_item: dict[str, set[Words]] = {}
    found = features_of([text for *_, text in told], vocabulary)
    for (_, item, _), held, own in zip(told, found, extracted, strict=True):
        of_item.setdefault(item, set()).update(held, *([{own}] if own else []))
    return Background(known, Features(vocabulary, {item: frozenset(held) for item, held in of_item.items()}, asked))


def features_of(texts: Iterable[str], vocabulary: frozenset[Words]) -> list[frozenset[Words]]:
    """Return the features that each text holds.

    Where one feature is a part of another, such as "battery" of "battery life", a text with the longer holds both.
    """
    sizes = sorted({len(words) for words in vocabulary})
    found = []
    for text in texts:
        words = words_of(text)
        grams = (gram for n in sizes for gram in zip(*(words[start:] for start in range(n)), strict=False))
        found.append(frozenset(gram for gram in grams if gram in vocabulary))
    return found


def feature_match(texts: Sequence[str], asked: Sequence[Words]) -> NDArray[np.bool_]:
    """Say of each text whether it holds the feature of its reference; their mean is the feature matching ratio, FMR.

    Args:
        texts: Generated texts.
        asked: The feature of each one's reference, as `words_of` cuts it.

    Returns:
        Shape (n,).

    Raises:
        ValueError: If the two differ in length.
    """
    pairs = zip(texts, asked, strict=True)
    return np.array([bool(features_of([text], frozenset([words]))[0]) for text, words in pairs], dtype=np.bool_)


def feature_coverage(found: Sequence[frozenset[Words]], vocabulary: frozenset[Words]) -> float:
    """Return the feature coverage ratio, FCR: features that some text holds over all features of the training data.

    It grows with the number of texts, so compare only over the same requests.

    Raises:
        ValueError: If there are no features.
    """
    if not vocabulary:
        raise ValueError("a coverage of no features is not defined")
    return len(frozenset().union(*found) & vocabulary) / len(vocabulary)


def feature_diversity(found: Sequence[frozenset[Words]]) -> float | None:
    """Return DIV: how many features two generated texts share, the mean over all pairs; lower is more diverse.

    A feature that c texts hold is shared by c (c - 1) / 2 pairs, so that no pair has to be looked at. Texts without
    any feature share none, and lower the figure: read it beside FCR.

    Returns:
        A value of 0 or more; None for fewer than two texts, which have no pair.
    """
    if len(found) < 2:
        return None
    counts = Counter(feature for own in found for feature in own)
    shared = sum(count * (count - 1) for count in counts.values())
    return shared / (len(found) * (len(found) - 1))


def unique_sentences(texts: Sequence[str]) -> float:
    """Return the unique sentence ratio, USR: different texts over all texts, by their lower-cased words.

    A text without words is no sentence and makes nothing different. The figure falls with the number of texts.

    Raises:
        ValueError: If there are no texts.
    """
    if not texts:
        raise ValueError("a text metric over no requests is not defined")
    return len({words for text in texts if (words := words_of(text))}) / len(texts)


def hallucinated(
    found: Sequence[frozenset[Words]], items: Sequence[str], of_item: Mapping[str, frozenset[Words]]
) -> NDArray[np.float64]:
    """Count the features that each text holds, and those of them that no training review of its item holds.

    The rate of hallucinated features is the sum of the latter over that of the former. An item without training
    reviews supports no feature.

    Returns:
        Shape (n, 2): held, and of these without support.

    Raises:
        ValueError: If texts and items differ in number.
    """
    pairs = list(zip(found, items, strict=True))
    counts = [(len(own), len(own - of_item.get(item, frozenset()))) for own, item in pairs]
    return np.array(counts, dtype=np.float64).reshape(-1, 2)


def hallucination_statistic(counts: NDArray[np.float64], users: Sequence[str]) -> Statistic:
    """The rate of hallucinated features as a function of resampled users, for `llmrec.metrics.stats.interval_of`.

    Args:
        counts: From `hallucinated`, shape (n, 2).
        users: Whose each text is; the function counts users in sorted order.

    Returns:
        A function from index arrays of shape (b, m) to b values; 0 where no text holds a feature.
    """
    names, owner = np.unique(np.array(users, dtype=object), return_inverse=True)
    total = np.zeros((len(names), 2))
    np.add.at(total, owner, counts)

    def statistic(indices: NDArray[np.intp]) -> NDArray[np.float64]:
        sums = times_drawn(indices, len(total)) @ total
        return np.divide(sums[:, 1], sums[:, 0], out=np.zeros(len(sums)), where=sums[:, 0] > 0)

    return statistic


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What a row's texts do with features.

    Attributes:
        known: Requests whose reference has a feature, shape (m,).
        match: Whether their texts hold it, shape (m,).
        coverage: FCR.
        diversity: DIV; None for a single text.
        counts: Features held, and of these without support, shape (n, 2).
        found: The features that each text holds, n of them.
    """

    known: NDArray[np.intp]
    match: NDArray[np.float64]
    coverage: float
    diversity: float | None
    counts: NDArray[np.float64]
    found: Sequence[frozenset[Words]]

    @property
    def hallucination(self) -> float | None:
        """The share of features without support among those that the texts hold; None where they hold none."""
        held, made_up = self.counts.sum(axis=0)
        return float(made_up / held) if held else None


def named(texts: Sequence[str], users: Sequence[str], items: Sequence[str], features: Features) -> Named:
    """Measure what generated texts, each to a user about an item, do with features."""
    asked = [features.asked.get(pair) for pair in zip(users, items, strict=True)]
    known = [place for place, words in enumerate(asked) if words]
    found = features_of(texts, features.vocabulary)
    match = feature_match([texts[place] for place in known], [asked[place] or () for place in known])
    return Named(
        known=np.array(known, dtype=np.intp),
        match=match.astype(np.float64),
        coverage=feature_coverage(found, features.vocabulary),
        diversity=feature_diversity(found),
        counts=hallucinated(found, items, features.of_item),
        found=found,
    )


def copies(texts: Sequence[str], known: Background) -> NDArray[np.float64]:
    """Say of each text, 1 or 0, whether it is a copy of a training text or sentence; their mean is the copy rate."""
    return copied(texts, known.texts).astype(np.float64)
