"""What explanations talk about, worked by hand, and copies found against all pairs."""

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
from llmrec.data.split import SplitDataset, split
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import background_of, evaluate
from llmrec.metrics import explained
from llmrec.metrics.explained import (
    Background,
    Words,
    _common,
    background,
    copied,
    feature_coverage,
    feature_diversity,
    feature_match,
    features_of,
    hallucinated,
    hallucination_statistic,
    library,
    named,
    unique_sentences,
    words_of,
)
from llmrec.metrics.stats import interval_of
from llmrec.recipe.schema import Split
from llmrec.registry import METRICS, better
from llmrec.tasks.family import family_of
from llmrec.types import Answer, Case, Item, Request, Text, Unparsed

PROTOCOL = EvalProtocol(split="leave_one_out", candidates="none", cutoffs=(1,), resamples=100, seed=0, catalogue=2)
SOUND, BATTERY, LIFE, PRICE = ("sound",), ("battery",), ("battery", "life"), ("price",)
VOCABULARY = frozenset([SOUND, BATTERY, LIFE, PRICE])


# --------------------------------------------------------------------------- features


def test_a_feature_is_held_as_whole_words_in_their_order() -> None:
    texts = [
        "Great SOUND, long battery life!",
        "the batteries sounded fine",
        "a life of the battery",
        "",
        "price: sound price",
    ]
    assert features_of(texts, VOCABULARY) == [{SOUND, BATTERY, LIFE}, set(), {BATTERY}, set(), {PRICE, SOUND}]


def test_match_is_with_the_feature_of_the_own_reference() -> None:
    texts = ["good sound", "good sound", "battery life counts", "life, battery", ""]
    asked = [SOUND, PRICE, LIFE, LIFE, SOUND]
    assert feature_match(texts, asked).tolist() == [True, False, True, False, False]
    with pytest.raises(ValueError):
        feature_match(texts, asked[:2])


def test_coverage_is_over_the_features_of_training() -> None:
    assert feature_coverage([frozenset([SOUND]), frozenset([SOUND, PRICE]), frozenset()], VOCABULARY) == 2 / 4
    assert feature_coverage([frozenset()], VOCABULARY) == 0.0
    with pytest.raises(ValueError, match="without features"):
        feature_coverage([], frozenset())


def test_diversity_by_hand() -> None:
    # Pairs: {s, p} and {s, p} share 2, {s, p} and {s} share 1, twice; the empty text shares none in 3 pairs.
    found = [frozenset([SOUND, PRICE]), frozenset([SOUND, PRICE]), frozenset([SOUND]), frozenset[tuple[str, ...]]()]
    assert feature_diversity(found) == pytest.approx((2 + 1 + 1) / 6)
    assert feature_diversity([frozenset([SOUND])] * 5) == 1.0
    assert feature_diversity([frozenset([SOUND]), frozenset([PRICE])]) == 0.0
    assert feature_diversity(found[:1]) is None


@given(st.lists(st.frozensets(st.sampled_from(sorted(VOCABULARY))), min_size=2, max_size=9))
def test_diversity_is_the_mean_over_all_pairs(found: list[frozenset[tuple[str, ...]]]) -> None:
    pairs = [len(one & two) for one, two in combinations(found, 2)]
    assert feature_diversity(found) == pytest.approx(np.mean(pairs))


def test_sentences_that_repeat() -> None:
    assert unique_sentences(["Good sound.", "good sound", "bad sound", "good  sound!"]) == 2 / 4
    # An answer that could not be read is no sentence of its own.
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


def known() -> Background:
    features = {(user, item): feature for user, item, _, feature in TRAIN if feature}
    return background(USERS, ITEMS, TEXTS, features | {("u", "c"): "sound", ("w", "a"): "comfort"})


def test_what_reviews_say_of_an_item_is_held_or_extracted() -> None:
    features = known().features
    assert features is not None
    # Features of held-out pairs are asked for, and are no features of training by that.
    assert features.vocabulary == {SOUND, LIFE, PRICE}
    assert features.of_item == {"a": {SOUND, PRICE, LIFE}, "b": {PRICE}}
    assert features.annotated["w", "a"] == ("comfort",)


def test_planted_hallucinations_are_counted() -> None:
    features = known().features
    assert features is not None
    texts = ["sound and price", "sound and price", "battery life", "comfort", "sound"]
    items = ["a", "b", "b", "a", "never-seen"]
    counts = hallucinated(features_of(texts, features.vocabulary), items, features.of_item)
    assert counts.tolist() == [[2, 0], [2, 1], [1, 1], [0, 0], [1, 1]]
    rate = interval_of(hallucination_statistic(counts, ["u", "u", "v", "v", "w"]), 3, resamples=200, seed=0)
    assert rate.value == pytest.approx(3 / 6)
    assert rate.low < 0.5 < rate.high
    assert hallucination_statistic(np.zeros((2, 2)), ["u", "v"])(np.array([[0, 1]])).tolist() == [0.0]


def test_requests_without_a_feature_are_left_out_of_the_match_alone() -> None:
    features = known().features
    assert features is not None
    found = named(["good sound", "price", "it offers comfort"], ["u", "x", "w"], ["c", "b", "a"], features)
    assert found.known.tolist() == [0, 2] and found.match.tolist() == [1.0, 1.0]
    assert found.coverage == pytest.approx(2 / 3) and found.diversity == 0.0
    assert found.counts.tolist() == [[1, 1], [1, 0], [0, 0]]


def test_without_features_there_are_none() -> None:
    assert background(USERS, ITEMS, TEXTS).features is None
    # Held-out features alone are no features of training.
    assert background(USERS, ITEMS, TEXTS, {("w", "a"): "comfort"}).features is None
    assert background(USERS, ITEMS, TEXTS, {("u", "a"): "!?"}).features is None


# --------------------------------------------------------------------------- copies


SENTENCE = "the sound of this small speaker fills a large room"


def test_planted_copies_are_found_and_their_likes_are_not() -> None:
    shelf = library(["It arrived late. " + SENTENCE.capitalize() + "!", "Great.", "a b c d e f g h i j"])
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
        "words that nobody has used before": False,
    }
    assert copied(list(texts), shelf).tolist() == list(texts.values())


def test_words_that_repeat_count_as_often_as_they_stand() -> None:
    shelf = library(["very very very very good"])
    assert copied(["very good very good very", "very very very very good", "very good"], shelf).tolist() == [
        *(False, True, False),
    ]
    assert alike(words_of("very good very good very"), words_of("very very very very good")) == pytest.approx(0.6)


def alike(a: Words, b: Words) -> float:
    return 2 * _common(a, b) / (len(a) + len(b)) if a and b else 0.0


def test_likeness_by_hand() -> None:
    assert alike(("a", "b", "c", "d"), ("b", "x", "d")) == pytest.approx(2 * 2 / 7)
    assert alike(("a",), ()) == 0.0
    assert alike(("a", "b"), ("b", "a")) == 0.5


_TEXT = st.lists(st.sampled_from("abcdefg"), max_size=14).map(" ".join)


@given(
    training=st.lists(_TEXT, max_size=12),
    texts=st.lists(_TEXT, max_size=6),
    threshold=st.sampled_from([0.5, 0.75, 0.9, 1.0]),
)
def test_the_index_finds_what_all_pairs_find(training: list[str], texts: list[str], threshold: float) -> None:
    best = [max((alike(words_of(text), words_of(other)) for other in training), default=0.0) for text in texts]
    with mock.patch.object(explained, "COPIED", threshold):
        found = copied(texts, library(training)).tolist()
        assert found == [each >= threshold - 1e-9 for each in best]
        # Nothing hangs on the order of the training texts.
        assert copied(texts, library(training[::-1])).tolist() == found


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


def measured(texts: Sequence[str | None], held_against: Background | None) -> dict[str, dict[str, object]]:
    pytest.importorskip("rouge_score", reason="the text extra is not installed")
    found = evaluate(
        Written(texts),
        CASES,
        name="explanation",
        kind=family_of("explanation").answer,
        protocol=PROTOCOL,
        background=held_against,
    )
    figures = found.figures.as_json()
    json.dumps(figures, allow_nan=False)
    assert set(found.values) == {"ROUGE-1", "ROUGE-2", "ROUGE-L"}
    rates = {
        name: figures.get(name)
        for name in ("truth_copy_rate", "features_asked", "features_named", "truth_hallucination_rate")
    }
    return {**figures["metrics"], "rates": rates}


def test_an_evaluation_holds_texts_against_training() -> None:
    texts = ["good sound", "the price is low", "nothing to say", None]
    found = measured(texts, known())
    values = {name: found[name]["value"] for name in ("USR", "CopyRate", "FMR", "FCR", "DIV", "Hallucination")}
    assert values == pytest.approx(
        {"USR": 3 / 4, "CopyRate": 1 / 4, "FMR": 1 / 2, "FCR": 2 / 3, "DIV": 0.0, "Hallucination": 1 / 2}
    )
    assert found["rates"] == {
        **{"truth_copy_rate": 1 / 4, "features_asked": 2, "features_named": 2},
        # Of the true texts, one names a feature, of an item without reviews.
        "truth_hallucination_rate": 1.0,
    }
    assert str(found["FMR"]["signature"]).startswith("FMR|text:words-lower|how:features-3|")
    assert "|how:rouge-l-0.9|" in str(found["CopyRate"]["signature"])
    assert all(found[name]["low"] is None for name in ("USR", "FCR", "DIV"))
    assert all(found[name]["low"] is not None for name in ("CopyRate", "FMR", "Hallucination"))


def test_what_is_not_known_is_left_out() -> None:
    texts = ["good sound", "the price is low", "nothing to say", None]
    alone = measured(texts, None)
    assert "USR" in alone and not {"CopyRate", "FMR", "FCR", "DIV", "Hallucination"} & alone.keys()
    told = measured(texts, Background(known().texts))
    assert {"USR", "CopyRate"} <= told.keys() and "FMR" not in told
    # Everything else is as it was.
    assert all(alone[name] == told[name] for name in alone if name != "rates")


def test_a_rate_over_nothing_is_no_figure() -> None:
    held_against = known()
    assert held_against.features is not None
    found = measured([None] * 4, replace(held_against, features=replace(held_against.features, annotated={})))
    assert found["FMR"]["value"] is None and found["Hallucination"]["value"] is None
    assert found["USR"]["value"] == 0.0 and found["CopyRate"]["value"] == 0.0


def test_directions() -> None:
    names = ("FMR", "FCR", "DIV", "USR", "Hallucination", "CopyRate")
    assert {METRICS[name].kind for name in names} == {"text"}
    assert [name for name in names if better(name) == "lower"] == ["DIV", "Hallucination", "CopyRate"]


def reviews() -> SplitDataset:
    rows = [(f"u{n}", item, float(k), f"text {n} {item}") for n in range(4) for k, item in enumerate("abcd")]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "text"], orient="row")
    items = {item: Item(item_id=item, title=item) for item in "abcd"}
    return split(Dataset(name="r", noun="things", interactions=frame, items=items), Split(), seed=0)


def test_training_texts_of_a_split_are_known_and_held_out_ones_are_not() -> None:
    data = reviews()
    held_against = background_of(data)
    train, test = data.train["text"].to_list(), data.test["text"].to_list()
    assert copied(train, held_against.texts).all() and not copied(test, held_against.texts).any()
    assert held_against.features is None


def test_a_column_of_features_is_read_and_held_out_ones_are_asked_for() -> None:
    data = reviews()
    parts = {
        name: getattr(data, name).with_columns(feature=pl.lit(f"{name} word")) for name in ("train", "valid", "test")
    }
    features = background_of(replace(data, **parts)).features
    assert features is not None
    assert features.vocabulary == {("train", "word")}
    assert set(features.annotated.values()) == {("train", "word"), ("valid", "word"), ("test", "word")}


def test_the_rest_of_a_review_supports_features_and_can_be_copied() -> None:
    data = reviews()
    pair = data.train.select("user_id", "item_id").row(0)
    held_out = data.test.select("user_id", "item_id").row(0)
    told = {pair: Review(text="One sentence. Another about its hinge!"), held_out: Review(text="Never to be read.")}
    # One interaction with another item is about a hinge, and a review of this one speaks of it.
    own = {name: getattr(data, name).with_columns(feature=pl.lit(None, pl.String)) for name in ("valid", "test")}
    other = pl.col("item_id") != pair[1]
    own["train"] = data.train.with_columns(feature=pl.when(other).then(pl.lit("hinge")))
    held_against = background_of(replace(data, **own, dataset=replace(data.dataset, reviews=told)))
    assert copied(["another about its hinge", "Never to be read."], held_against.texts).tolist() == [True, False]
    assert held_against.features is not None
    assert held_against.features.vocabulary == {("hinge",)} and held_against.features.of_item[pair[1]] == {("hinge",)}
    assert background_of(replace(data, **own)).features.of_item[pair[1]] == frozenset()  # type: ignore[union-attr]
