"""Text metrics: BLEU-4, ROUGE-1, ROUGE-2, ROUGE-L and Distinct-n, all in [0, 1].

They are computed with sacrebleu and rouge-score, for comparability with published results; multiply by 100 to compare
with percentages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmrec.errors import require
from llmrec.metrics.stats import resample_counts, sum_rows_by_user

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.metrics.stats import Statistic

_MAX_NGRAM = 4
_WORD = re.compile(r"\w+")
_ROUGE = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}

WordSequence = tuple[str, ...]


def lowercase_words(text: str) -> WordSequence:
    """Return the lower-case words of a text."""
    return tuple(_WORD.findall(text.lower()))


def ngrams(words: WordSequence, n: int) -> Iterator[WordSequence]:
    """Return the sequences of n consecutive words."""
    return zip(*(words[start:] for start in range(n)), strict=False)


def bleu4_statistic(texts: Sequence[str], references: Sequence[str], owners: Sequence[str] | None = None) -> Statistic:
    """Return corpus BLEU-4 as a function of resampled users, for `llmrec.metrics.stats.statistic_interval`.

    Corpus BLEU is not a mean over requests but a function of sums of n-gram counts, which are computed once.

    Args:
        texts: Generated texts.
        references: One reference per text.
        owners: The user of each text; None if each has a different user. Indices refer to the sorted users.

    Returns:
        A function from index arrays of shape (b, m) to b values.

    Raises:
        MissingExtra: If sacrebleu is not installed.
        ValueError: If the two differ in length or are empty.
    """
    _check_lengths(texts, references)
    scorer = require("sacrebleu", "text").BLEU(force=True)
    counts = np.empty((len(texts), 2 * _MAX_NGRAM + 2))
    for row, text, reference in zip(counts, texts, references, strict=True):
        one = scorer.corpus_score([text], [[reference]])
        row[:] = [*one.counts, *one.totals, one.sys_len, one.ref_len]
    if owners is not None:
        counts = sum_rows_by_user(counts, owners)

    def statistic(indices: NDArray[np.intp]) -> NDArray[np.float64]:
        return _bleu_from_counts(resample_counts(indices, len(counts)) @ counts)

    return statistic


def _bleu_from_counts(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute BLEU-4 in [0, 1] from summed n-gram counts and lengths, shape (b, 10)."""
    matches, totals = sums[:, :_MAX_NGRAM], sums[:, _MAX_NGRAM : 2 * _MAX_NGRAM]
    length, reference = sums[:, -2], sums[:, -1]
    # Exponential smoothing: the j-th n-gram order without a match counts as 2**-j matches.
    empty = (matches == 0) & (totals > 0)
    smoothed = np.where(empty, 0.5 ** np.cumsum(empty, axis=1), matches)
    # Like sacrebleu without effective order, a corpus without matches or too short for 4-grams scores 0.
    scored: NDArray[np.bool_] = np.all(totals > 0, axis=1) & np.any(matches > 0, axis=1)
    log_precision = np.log(np.where(scored[:, None], smoothed / np.maximum(totals, 1), 1.0)).mean(axis=1)
    brevity = np.minimum(0.0, 1 - reference / np.maximum(length, 1))
    return np.where(scored, np.exp(brevity + log_precision), 0.0)


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Compute the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) of each request, without stemming.

    rouge-score uses only ASCII letters and digits of lower-cased text, so text in other scripts scores 0.

    Returns:
        ``{"ROUGE-1": (n,), "ROUGE-2": (n,), "ROUGE-L": (n,)}``, values in [0, 1].

    Raises:
        MissingExtra: If rouge-score is not installed.
        ValueError: If the two differ in length or are empty.
    """
    _check_lengths(texts, references)
    scorer = require("rouge_score.rouge_scorer", "text").RougeScorer(list(_ROUGE.values()), use_stemmer=False)
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {
        name: np.array([score[kind].fmeasure for score in scores], dtype=np.float64) for name, kind in _ROUGE.items()
    }


def rouge_of(rouge: Mapping[str, NDArray[np.float64]], name: str) -> NDArray[np.float64]:
    """Return one of the ROUGE metrics, shape (n,)."""
    return rouge[name]


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Compute distinct n-grams over all n-grams of the texts (Li et al., NAACL 2016), ignoring case.

    It decreases with the number of texts, so compare only over the same requests. It has no bootstrap interval, since a
    resample repeats texts and thus their n-grams.

    Returns:
        A value in [0, 1]; 0 if no text has n words.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    counts = Counter(gram for text in texts for gram in ngrams(lowercase_words(text), n))
    return len(counts) / counts.total() if counts else 0.0


def _check_lengths(texts: Sequence[str], references: Sequence[str]) -> None:
    if len(texts) != len(references):
        raise ValueError(f"{len(texts)} texts but {len(references)} references")
    if not texts:
        raise ValueError("text metrics are undefined without requests")
