"""Metrics of explanations by hand, and copies compared with all pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from unittest import mock

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.dataset import Dataset, Review
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate, explanation_reference
from llmrec.metrics import explained
from llmrec.metrics.explained import (
    ExplanationReference,
    WordSequence,
    _common_subsequence_length,
    build_explanation_reference,
    count_unsupported_features,
    detect_copies,
    feature_coverage,
    feature_diversity,
    feature_match,
    find_features,
    hallucination_statistic,
    index_training_texts,
    lowercase_words,
    measure_mentioned_features,
    unique_sentences,
)
from llmrec.metrics.stats import statistic_interval
from llmrec.recipe.schema import Split
from llmrec.tasks.family import family_of
from llmrec.types import Answer, Case, Item, Request, Text, Unparsed

PROTOCOL = EvalProtocol(split="leave_one_out", candidates="none", cutoffs=(1,), resamples=100, seed=0, catalogue=2)
SOUND, BATTERY, LIFE, PRICE = ("sound",), ("battery",), ("battery", "life"), ("price",)
VOCABULARY = frozenset([SOUND, BATTERY, LIFE, PRICE])


# --------------------------------------------------------------------------- features


def test_features_match_complete_words_in_order() -> None:
    texts = [
        "Great SOUND, long battery life!",
        "the batteries sounded fine",
        "a life of the battery",
        "",
        "price: sound price",
    ]
    assert find_features(texts, VOCABULARY) == [{SOUND, BATTERY, LIFE}, set(), {BATTERY}, set(), {PRICE, SOUND}]


def test_match_uses_the_feature_of_the_same_reference() -> None:
    texts = ["good sound", "good sound", "battery life counts", "life, battery", ""]
    requested = [SOUND, PRICE, LIFE, LIFE, SOUND]
    assert feature_match(texts, requested).tolist() == [True, False, True, False, False]


def test_feature_coverage() -> None:
    assert feature_coverage([frozenset([SOUND]), frozenset([SOUND, PRICE]), frozenset()], VOCABULARY) == 2 / 4
    assert feature_coverage([frozenset()], VOCABULARY) == 0.0
    with pytest.raises(ValueError, match="without features"):
        feature_coverage([], frozenset())


def test_diversity_by_hand() -> None:
    # Pairs: {s, p} and {s, p} share 2, {s, p} and {s} share 1, twice; the empty text shares none in 3 pairs.
    result = [frozenset([SOUND, PRICE]), frozenset([SOUND, PRICE]), frozenset([SOUND]), frozenset[tuple[str, ...]]()]
    assert feature_diversity(result) == pytest.approx((2 + 1 + 1) / 6)
    assert feature_diversity([frozenset([SOUND])] * 5) == 1.0
    assert feature_diversity([frozenset([SOUND]), frozenset([PRICE])]) == 0.0
    assert feature_diversity(result[:1]) is None


@given(st.lists(st.frozensets(st.sampled_from(sorted(VOCABULARY))), min_size=2, max_size=9))
def test_diversity_is_the_mean_over_all_pairs(result: list[frozenset[tuple[str, ...]]]) -> None:
    pairs = [len(one & two) for one, two in combinations(result, 2)]
    assert feature_diversity(result) == pytest.approx(np.mean(pairs))


def test_unique_sentences() -> None:
    assert unique_sentences(["Good sound.", "good sound", "bad sound", "good  sound!"]) == 2 / 4
    # Answers that could not be parsed do not count as sentences.
    assert unique_sentences(["", "", "x"]) == 1 / 3
    with pytest.raises(ValueError, match="without requests"):
        unique_sentences([])


TRAIN = (
    ("u", "a", "Clear sound, but the price is high.", "sound"),
    ("v", "a", "The battery life is short.", "battery life"),
    ("u", "b", "Nothing to say", "price"),
    ("v", "b", None, None),
)
USERS, ITEMS, TEXTS = ([row[0] for row in TRAIN], [row[1] for row in TRAIN], [row[2] for row in TRAIN])


def known() -> ExplanationReference:
    features = {(user, item): feature for user, item, _, feature in TRAIN if feature}
    return build_explanation_reference(USERS, ITEMS, TEXTS, features | {("u", "c"): "sound", ("w", "a"): "comfort"})


def test_features_of_items_come_from_training() -> None:
    features = known().features
    assert features is not None
    # Held-out pairs have annotated features, which are not added to the vocabulary.
    assert features.vocabulary == {SOUND, LIFE, PRICE}
    assert features.of_item == {"a": {SOUND, PRICE, LIFE}, "b": {PRICE}}
    assert features.annotated["w", "a"] == ("comfort",)


def test_counts_hallucinations() -> None:
    features = known().features
    assert features is not None
    texts = ["sound and price", "sound and price", "battery life", "comfort", "sound"]
    items = ["a", "b", "b", "a", "never-seen"]
    counts = count_unsupported_features(find_features(texts, features.vocabulary), items, features.of_item)
    assert counts.tolist() == [[2, 0], [2, 1], [1, 1], [0, 0], [1, 1]]
    rate = statistic_interval(hallucination_statistic(counts, ["u", "u", "v", "v", "w"]), 3, resamples=200, seed=0)
    assert rate.value == pytest.approx(3 / 6)
    assert rate.low < 0.5 < rate.high
    assert hallucination_statistic(np.zeros((2, 2)), ["u", "v"])(np.array([[0, 1]])).tolist() == [0.0]


def test_requests_without_a_feature_are_excluded_from_the_match_only() -> None:
    features = known().features
    assert features is not None
    result = measure_mentioned_features(
        ["good sound", "price", "it offers comfort"], ["u", "x", "w"], ["c", "b", "a"], features
    )
    assert result.known.tolist() == [0, 2] and result.match.tolist() == [1.0, 1.0]
    assert result.coverage == pytest.approx(2 / 3) and result.diversity == 0.0
    assert result.counts.tolist() == [[1, 1], [1, 0], [0, 0]]


def test_no_features_without_training_features() -> None:
    assert build_explanation_reference(USERS, ITEMS, TEXTS).features is None
    assert build_explanation_reference(USERS, ITEMS, TEXTS, {("w", "a"): "comfort"}).features is None
    assert build_explanation_reference(USERS, ITEMS, TEXTS, {("u", "a"): "!?"}).features is None


# --------------------------------------------------------------------------- copies


SENTENCE = "the sound of this small speaker fills a large room"


def test_finds_copies_above_the_threshold() -> None:
    shelf = index_training_texts(["It arrived late. " + SENTENCE.capitalize() + "!", "Great.", "a b c d e f g h i j"])
    texts = {
        SENTENCE: True,  # a sentence of a longer review
        SENTENCE.upper() + "...": True,
        SENTENCE.replace("large", "big"): True,  # 2 * 9 / 20
        SENTENCE.replace("large", "big").replace("small", "tiny"): False,  # 2 * 8 / 20
        "the sound of this small speaker": False,  # a part of a sentence: 2 * 6 / 16
        "j i h g f e d c b a": False,  # all its words, out of order
        "great": True,
        "": False,
        "?!": False,
        "words that do not occur in training": False,
    }
    assert detect_copies(list(texts), shelf).tolist() == list(texts.values())


def test_repeated_words_are_counted() -> None:
    shelf = index_training_texts(["very very very very good"])
    assert detect_copies(["very good very good very", "very very very very good", "very good"], shelf).tolist() == [
        *(False, True, False)
    ]
    assert alike(
        lowercase_words("very good very good very"), lowercase_words("very very very very good")
    ) == pytest.approx(0.6)


def alike(a: WordSequence, b: WordSequence) -> float:
    return 2 * _common_subsequence_length(a, b) / (len(a) + len(b)) if a and b else 0.0


_TEXT = st.lists(st.sampled_from("abcdefg"), max_size=14).map(" ".join)


@given(
    training=st.lists(_TEXT, max_size=12),
    texts=st.lists(_TEXT, max_size=6),
    threshold=st.sampled_from([0.5, 0.75, 0.9, 1.0]),
)
def test_index_equals_all_pairs(training: list[str], texts: list[str], threshold: float) -> None:
    best = [
        max((alike(lowercase_words(text), lowercase_words(other)) for other in training), default=0.0) for text in texts
    ]
    with mock.patch.object(explained, "COPY_THRESHOLD", threshold):
        result = detect_copies(texts, index_training_texts(training)).tolist()
        assert result == [each >= threshold - 1e-9 for each in best]
        # The order of the training texts does not matter.
        assert detect_copies(texts, index_training_texts(training[::-1])).tolist() == result


# --------------------------------------------------------------------------- in an evaluation


class Written:
    name = "written"

    def __init__(self, texts: Sequence[str | None]) -> None:
        self._texts = texts

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [
            Unparsed(request_id=request.id, reason="x") if text is None else Text(request_id=request.id, text=text)
            for request, text in zip(requests, self._texts, strict=True)
        ]


CASES = [
    Case(request=Request(id=f"r{n}", user_id=user, item=item), truth=truth)
    for n, (user, item, truth) in enumerate(
        [("u", "c", "fine sound"), ("w", "a", "some comfort"), ("x", "b", "Nothing to say"), ("x", "a", "other")]
    )
]


def measured(texts: Sequence[str | None], training: ExplanationReference | None) -> dict[str, dict[str, object]]:
    pytest.importorskip("rouge_score", reason="the text extra is not installed")
    result = evaluate(
        Written(texts),
        CASES,
        name="explanation",
        kind=family_of("explanation").answer,
        protocol=PROTOCOL,
        background=training,
    )
    figures = result.figures.as_json()
    json.dumps(figures, allow_nan=False)
    assert set(result.values) == {"ROUGE-1", "ROUGE-2", "ROUGE-L"}
    rates = {
        name: figures.get(name)
        for name in ("truth_copy_rate", "features_asked", "features_named", "truth_hallucination_rate")
    }
    return {**figures["metrics"], "rates": rates}


def test_evaluation_compares_texts_with_training() -> None:
    texts = ["good sound", "the price is low", "nothing to say", None]
    result = measured(texts, known())
    values = {name: result[name]["value"] for name in ("USR", "CopyRate", "FMR", "FCR", "DIV", "Hallucination")}
    assert values == pytest.approx(
        {"USR": 3 / 4, "CopyRate": 1 / 4, "FMR": 1 / 2, "FCR": 2 / 3, "DIV": 0.0, "Hallucination": 1 / 2}
    )
    assert result["rates"] == {
        **{"truth_copy_rate": 1 / 4, "features_asked": 2, "features_named": 2},
        # One of the true texts names a feature; its item has no reviews.
        "truth_hallucination_rate": 1.0,
    }
    assert str(result["FMR"]["signature"]).startswith("FMR|text:words-lower|how:features-3|")
    assert "|how:rouge-l-0.9|" in str(result["CopyRate"]["signature"])
    assert all(result[name]["low"] is None for name in ("USR", "FCR", "DIV"))
    assert all(result[name]["low"] is not None for name in ("CopyRate", "FMR", "Hallucination"))


def test_metrics_without_their_background_are_omitted() -> None:
    texts = ["good sound", "the price is low", "nothing to say", None]
    alone = measured(texts, None)
    assert "USR" in alone and not {"CopyRate", "FMR", "FCR", "DIV", "Hallucination"} & alone.keys()
    with_texts = measured(texts, ExplanationReference(known().texts))
    assert {"USR", "CopyRate"} <= with_texts.keys() and "FMR" not in with_texts
    assert all(alone[name] == with_texts[name] for name in alone if name != "rates")


def test_rate_over_no_cases_is_undefined() -> None:
    training = known()
    assert training.features is not None
    result = measured([None] * 4, replace(training, features=replace(training.features, annotated={})))
    assert result["FMR"]["value"] is None and result["Hallucination"]["value"] is None
    assert result["USR"]["value"] == 0.0 and result["CopyRate"]["value"] == 0.0


def reviews() -> SplitDataset:
    rows = [(f"u{n}", item, float(k), f"text {n} {item}") for n in range(4) for k, item in enumerate("abcd")]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "text"], orient="row")
    items = {item: Item(item_id=item, title=item) for item in "abcd"}
    return split_dataset(Dataset(name="r", noun="things", interactions=frame, items=items), Split(), seed=0)


def test_background_of_a_split_has_no_held_out_texts() -> None:
    data = reviews()
    training = explanation_reference(data)
    train, test = data.train["text"].to_list(), data.test["text"].to_list()
    assert detect_copies(train, training.texts).all() and not detect_copies(test, training.texts).any()
    assert training.features is None
    # Held-out features annotate requests, but are not in the vocabulary.
    parts = {
        name: getattr(data, name).with_columns(feature=pl.lit(f"{name} word")) for name in ("train", "valid", "test")
    }
    features = explanation_reference(replace(data, **parts)).features
    assert features is not None
    assert features.vocabulary == {("train", "word")}
    assert set(features.annotated.values()) == {("train", "word"), ("valid", "word"), ("test", "word")}


def test_full_reviews_are_searched_for_features_and_copies() -> None:
    data = reviews()
    pair = data.train.select("user_id", "item_id").row(0)
    held_out = data.test.select("user_id", "item_id").row(0)
    texts = {pair: Review(text="One sentence. Another about its hinge!"), held_out: Review(text="Never to be read.")}
    # One interaction with another item has the feature hinge, and a review of this item mentions it.
    parts = {name: getattr(data, name).with_columns(feature=pl.lit(None, pl.String)) for name in ("valid", "test")}
    other = pl.col("item_id") != pair[1]
    parts["train"] = data.train.with_columns(feature=pl.when(other).then(pl.lit("hinge")))
    training = explanation_reference(replace(data, **parts, dataset=replace(data.dataset, reviews=texts)))
    assert detect_copies(["another about its hinge", "Never to be read."], training.texts).tolist() == [True, False]
    assert training.features is not None
    assert training.features.vocabulary == {("hinge",)} and training.features.of_item[pair[1]] == {("hinge",)}
    assert explanation_reference(replace(data, **parts)).features.of_item[pair[1]] == frozenset()  # type: ignore[union-attr]
