from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from llmrec.baselines.text import FirstSentence, FrequentText, NearestText, TextRidge, TfIdf, first_sentence
from llmrec.data.dataset import Review
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError
from llmrec.types import Event, Rating, Request, Text, Unparsed
from tests.baselines.trained import all_trained, make_dataset
from tests.facts import Facts, raises

Rows = list[tuple[str, str, str | None]]
TITLES = {"lamp": "Bright desk lamp", "bulb": "Bright bulb", "sofa": "Soft grey sofa", "rug": "Soft rug"}
ROWS: Rows = [
    ("ann", "lamp", "The light is warm and steady."),
    ("bob", "lamp", "Cheap switch, it broke."),
    ("cat", "lamp", "Good value."),
    ("ann", "sofa", "So comfortable to sit on."),
    ("bob", "sofa", "Good value."),
    ("bob", "rug", None),
    ("cat", "rug", "  "),
]


def _trained(rows: Rows) -> SplitDataset:
    return all_trained(make_dataset(sorted(rows, key=lambda row: row[0]), "text", TITLES))


def _write(
    model: FrequentText | NearestText | FirstSentence, user: str, item: str, history: str = "", **context: str
) -> str:
    past = (Event(item_id="sofa", text=history),) if history else ()
    (answer,) = model.answer([Request(id="r", user_id=user, item=item, history=past, context=context)])
    assert isinstance(answer, Text)
    return answer.text


def test_frequent_text() -> None:
    model = FrequentText()
    model.fit(_trained(ROWS))
    assert _write(model, "ann", "rug") == _write(model, "unknown", "nothing") == "Good value."


def test_frequent_text_breaks_ties_by_typicality() -> None:
    model = FrequentText()
    rows: Rows = [("a", "lamp", "a bad lamp"), ("b", "sofa", "a good sofa"), ("c", "rug", "a good rug")]
    model.fit(_trained([*rows, ("d", "bulb", "zzz")]))
    assert _write(model, "a", "bulb") in {"a good sofa", "a good rug"}


def test_nearest_text_of_the_item() -> None:
    model = NearestText()
    model.fit(_trained(ROWS))
    assert _write(model, "dan", "lamp", feature="switch") == "Cheap switch, it broke."
    assert _write(model, "dan", "lamp", feature="light") == "The light is warm and steady."
    assert _write(model, "dan", "lamp", history="good price and value") == "Good value."


def test_nearest_text_falls_back_to_the_user_and_then_to_the_most_frequent() -> None:
    model = NearestText()
    model.fit(_trained(ROWS))
    assert _write(model, "ann", "bulb") == "The light is warm and steady."
    assert _write(model, "ann", "rug") == "So comfortable to sit on."
    # If the user has no texts either, the most frequent text.
    assert _write(model, "dan", "bulb") == _write(model, "dan", "unknown item") == "Good value."


def test_tf_idf_weights_and_cosines_by_hand() -> None:
    model = TfIdf.of(["red car", "red bus", "Red!"])
    rare, common = math.log(4 / 2) + 1, math.log(4 / 4) + 1
    assert {word: model.weights[column] for word, column in model.index.items()} == pytest.approx(
        {"bus": rare, "car": rare, "red": common}
    )
    both = model.vectors(["red car", "red bus", "unknown", ""])
    cosines = (both @ both.T).toarray()
    assert cosines[0, 1] == pytest.approx(common**2 / (common**2 + rare**2))
    assert cosines.diagonal() == pytest.approx([1.0, 1.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("review", "sentence"),
    [
        ("Works well. I like it.", "Works well."),
        ("Is it 3.5 mm? Yes!", "Is it 3.5 mm?"),
        ('  He said "great!" And left.', 'He said "great!"'),
        ("no mark at all", "no mark at all"),
        ("Wow!!! What a thing", "Wow!!!"),
    ],
)
def test_the_first_sentence_ends_with_its_mark(review: str, sentence: str) -> None:
    model = FirstSentence()
    model.fit(_trained(ROWS))
    assert _write(model, "unknown", "rug", review=review) == first_sentence(review) == sentence


def test_first_sentence_without_a_review_is_the_frequent_text() -> None:
    model = FirstSentence()
    model.fit(_trained(ROWS))
    assert _write(model, "ann", "rug") == _write(model, "ann", "rug", review=" \n ") == "Good value."


def _reviewed(texts: list[str], ratings: list[float]) -> SplitDataset:
    rows = [(f"u{n:02d}", "lamp", rating) for n, rating in enumerate(ratings)]
    reviews = {(f"u{n:02d}", "lamp"): Review(text=text) for n, text in enumerate(texts)}
    return all_trained(make_dataset(rows, "rating", TITLES, rating_scale=(1.0, 5.0), reviews=reviews))


def _stars(model: TextRidge, review: str | None) -> float:
    context = {} if review is None else {"review": review}
    (answer,) = model.answer([Request(id="r", user_id="u", item="lamp", context=context)])
    assert isinstance(answer, Rating)
    return answer.value


REVIEWS = ["good and bright", "not good", "bad", "very good", "not bad at all", "so bright", "not so good", "very bad"]
STARS = [5.0, 2.0, 1.0, 5.0, 4.0, 4.0, 2.0, 1.0]


@pytest.mark.parametrize("words", [1, 2])
def test_text_ridge_solves_the_ridge_problem(words: int) -> None:
    penalty = 1.0
    model = TextRidge(TextRidge.Config(penalty=penalty, least=1, words=words))
    model.fit(_reviewed(REVIEWS, STARS))
    tfidf = TfIdf.of(REVIEWS, longest=words)
    assert ("not good" in tfidf.index) == (words == 2) and "good" in tfidf.index and "not so good" not in tfidf.index
    vectors, stars = tfidf.vectors(REVIEWS).toarray(), np.array(STARS)
    centred = vectors - vectors.mean(axis=0)
    normal = centred.T @ centred + penalty * np.eye(centred.shape[1])
    exact = np.linalg.solve(normal, centred.T @ (stars - stars.mean()))
    for text in (*REVIEWS, "bad and so bright"):
        (row,) = tfidf.vectors([text]).toarray()
        expected = stars.mean() + (row - vectors.mean(axis=0)) @ exact
        assert _stars(model, text) == pytest.approx(np.clip(expected, 1, 5), abs=1e-5)


def test_text_ridge_without_known_words_predicts_the_mean() -> None:
    model = TextRidge()
    model.fit(_reviewed(REVIEWS, STARS))
    mean = sum(STARS) / len(STARS)
    for review in (None, "", "never seen", "all"):
        assert _stars(model, review) == pytest.approx(mean)
    assert _stars(model, "very good") > mean + 0.3
    answers = model.answer([Request(id="a", user_id="u", item=None), Request(id="b", user_id="u", item="lamp")])
    assert isinstance(answers[0], Unparsed) and isinstance(answers[1], Rating)


def test_text_ridge_rejects_data_without_reviews() -> None:
    data = _reviewed(REVIEWS, STARS)
    with raises(DataError, Facts("missing-value", says=("text-ridge", "toy", "amazon-reviews"))):
        TextRidge().fit(replace(data, dataset=replace(data.dataset, reviews={})))
