from __future__ import annotations

import math

import numpy as np
import pytest

from llmrec.errors import MissingExtra
from llmrec.metrics import text as text_metrics
from llmrec.metrics.text import bleu4_statistic, distinct_n, rouge
from tests.facts import Facts, raises

_REASON = "is not installed: pip install 'llmrec[text]'"

TEXTS = [
    "the cat sat on the mat",
    "great sound and a comfortable fit",
    "",
    "I liked the story, but the ending was weak.",
    "good",
    "the battery lasts long and the screen is bright",
]
REFERENCES = [
    "the cat sat on a mat",
    "great sound and very comfortable",
    "a fine film",
    "I liked the story but not the ending.",
    "good value",
    "the screen is bright and the battery lasts long",
]


def bleu4(texts: list[str], references: list[str]) -> float:
    """Corpus BLEU-4 by sacrebleu itself."""
    bleu = pytest.importorskip("sacrebleu").BLEU(force=True)
    return float(bleu.corpus_score(texts, [references]).score) / 100


def ours(texts: list[str], references: list[str]) -> float:
    return float(bleu4_statistic(texts, references)(np.arange(len(texts))[None, :])[0])


@pytest.fixture
def sacrebleu() -> object:
    return pytest.importorskip("sacrebleu", reason=f"sacrebleu {_REASON}")


@pytest.fixture
def rouge_score() -> object:
    return pytest.importorskip("rouge_score", reason=f"rouge-score {_REASON}")


def test_bleu_by_hand(sacrebleu: object) -> None:
    # 5/6, 3/5, 2/4 and 1/3 of the n-grams match; lengths are equal, so there is no brevity penalty.
    assert ours(["the cat sat on the mat"], ["the cat sat on a mat"]) == pytest.approx((5 / 6 * 3 / 5 / 2 / 3) ** 0.25)
    assert ours(REFERENCES, REFERENCES) == pytest.approx(1.0)
    assert ours(["", "x"], ["some words", "y"]) == 0.0


def test_statistic_equals_sacrebleu_on_every_resample(sacrebleu: object) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(TEXTS), size=(100, len(TEXTS)))
    values = bleu4_statistic(TEXTS, REFERENCES)(rows)
    expected = [bleu4([TEXTS[i] for i in row], [REFERENCES[i] for i in row]) for row in rows]
    assert np.abs(values - expected).max() < 1e-9
    assert len(set(values.round(9))) > 50
    assert bleu4_statistic(TEXTS, REFERENCES)(np.array([[2], [4]])).tolist() == [0.0, 0.0]


def test_statistic_over_users(sacrebleu: object) -> None:
    by_user = bleu4_statistic(TEXTS, REFERENCES, ["b", "a", "b", "c", "a", "c"])
    rows = np.array([[0, 1, 2], [2, 2, 0]])
    drawn = [[1, 4, 0, 2, 3, 5], [3, 5, 3, 5, 1, 4]]
    expected = [bleu4([TEXTS[i] for i in each], [REFERENCES[i] for i in each]) for each in drawn]
    assert by_user(rows).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="6 texts, but 1 users"):
        bleu4_statistic(TEXTS, REFERENCES, ["a"])


def test_rouge_by_hand(rouge_score: object) -> None:
    # Reference of 3 words, text of 2: both words match, so precision 1 and recall 2/3.
    scores = rouge(["the cat", "sat cat the", ""], ["the cat sat"] * 3)
    assert scores["ROUGE-1"].tolist() == pytest.approx([0.8, 1.0, 0.0])
    # Bigrams: 1 of 1 against 1 of 2; none shared; none at all.
    assert scores["ROUGE-2"].tolist() == pytest.approx([2 / 3, 0.0, 0.0])
    # The longest common subsequence of "sat cat the" and "the cat sat" has one word.
    assert scores["ROUGE-L"].tolist() == pytest.approx([0.8, 1 / 3, 0.0])


def test_distinct_by_hand() -> None:
    # the-cat, cat-sat, the-cat: two of three bigrams differ.
    assert distinct_n(["the cat sat", "The cat"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["a a a"], 1) == pytest.approx(1 / 3)
    assert distinct_n(["one", ""], 2) == 0.0
    with pytest.raises(ValueError, match="at least 1"):
        distinct_n(["a"], 0)


def test_rejects_lengths_that_differ_or_are_zero() -> None:
    for metric in (bleu4_statistic, rouge):
        with pytest.raises(ValueError, match="2 texts but 1 references"):
            metric(["a", "b"], ["a"])
        with pytest.raises(ValueError, match="without requests"):
            metric([], [])


def test_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    monkeypatch.setitem(__import__("sys").modules, "rouge_score", None)
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with raises(MissingExtra, Facts("not-installed", says="pip install 'llmrec[text]'")):
        bleu4_statistic(["a"], ["a"])
    with raises(MissingExtra, Facts("not-installed", says="pip install 'llmrec[text]'")):
        rouge(["a"], ["a"])


def test_bleu_from_sums() -> None:
    # Sums of the first pair above, then the same matches in a text of half the reference's length.
    # Then no match at all, and matches of single words only.
    sums = np.array(
        [
            [5, 3, 2, 1, 6, 5, 4, 3, 6, 6],
            [5, 3, 2, 1, 6, 5, 4, 3, 6, 12],
            [0, 0, 0, 0, 6, 5, 4, 3, 6, 6],
            [4, 0, 0, 0, 5, 4, 3, 2, 5, 5],
        ],
        dtype=np.float64,
    )
    plain = (5 / 6 * 3 / 5 / 2 / 3) ** 0.25
    smoothed = (4 / 5 * (1 / 2) / 4 * (1 / 4) / 3 * (1 / 8) / 2) ** 0.25
    assert text_metrics._bleu_from_counts(sums).tolist() == pytest.approx([plain, plain * math.exp(-1), 0.0, smoothed])
