from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.baselines.text import FirstSentence, FrequentText, NearestText, TextRidge, TfIdf, first_sentence
from llmrec.data.dataset import Dataset, Review
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError
from llmrec.types import Event, Item, Rating, Request, Text, Unparsed
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
    frame = pl.DataFrame(rows, schema={"user_id": pl.String, "item_id": pl.String, "text": pl.String}, orient="row")
    items = {item: Item(item_id=item, title=title) for item, title in TITLES.items()}
    data = Dataset(name="toy", noun="things", interactions=frame, items=items)
    none = data.interactions.clear()
    return SplitDataset(
        dataset=data,
        kind="leave_one_out",
        seed=0,
        train=data.interactions.sort("user_id"),
        valid=none,
        test=none,
        held_out=frozenset(),
    )


def _write(
    model: FrequentText | NearestText | FirstSentence, user: str, item: str, history: str = "", **context: str
) -> str:
    past = (Event(item_id="sofa", text=history),) if history else ()
    (answer,) = model.answer([Request(id="r", user_id=user, item=item, history=past, context=context)])
    assert isinstance(answer, Text)
    return answer.text


def test_the_most_frequent_text_is_written_for_all() -> None:
    model = FrequentText()
    model.fit(_trained(ROWS))
    assert _write(model, "ann", "rug") == _write(model, "nobody", "nothing") == "Good value."


def test_of_equally_frequent_texts_the_most_typical_is_taken() -> None:
    model = FrequentText()
    model.fit(
        _trained(
            [
                ("a", "lamp", "a bad lamp"),
                ("b", "sofa", "a good sofa"),
                ("c", "rug", "a good rug"),
                ("d", "bulb", "zzz"),
            ]
        )
    )
    assert _write(model, "a", "bulb") in {"a good sofa", "a good rug"}


def test_the_text_about_the_item_that_is_most_like_the_request_is_taken() -> None:
    model = NearestText()
    model.fit(_trained(ROWS))
    assert _write(model, "dan", "lamp", feature="switch") == "Cheap switch, it broke."
    assert _write(model, "dan", "lamp", feature="light") == "The light is warm and steady."
    assert _write(model, "dan", "lamp", history="good price and value") == "Good value."


def test_without_texts_about_the_item_the_users_own_on_the_most_similar_item_is_taken() -> None:
    model = NearestText()
    model.fit(_trained(ROWS))
    assert _write(model, "ann", "bulb") == "The light is warm and steady."
    assert _write(model, "ann", "rug") == "So comfortable to sit on."


def test_a_stranger_to_both_gets_the_most_frequent_text() -> None:
    model = NearestText()
    model.fit(_trained(ROWS))
    assert _write(model, "dan", "bulb") == _write(model, "dan", "unknown item") == "Good value."


@pytest.mark.parametrize("model", [FrequentText, NearestText])
def test_equally_good_texts_do_not_fall_by_their_order(model: type[FrequentText] | type[NearestText]) -> None:
    alike: Rows = [(f"u{n}", "lamp", text) for n, text in enumerate(["red one", "one red", "red one!", "One red"])]
    written = set()
    for rows in (alike, alike[::-1]):
        # As if the same user had written all of them, so that sorting by user leaves the order of rows.
        fitted = model()
        fitted.fit(_trained([("ann", item, text) for _, item, text in rows]))
        written.add(_write(fitted, "ann", "lamp"))
    assert len(written) == 1


def test_weights_and_cosines_by_hand() -> None:
    model = TfIdf.of(["red car", "red bus", "Red!"])
    rare, common = math.log(4 / 2) + 1, math.log(4 / 4) + 1
    assert {word: model.weights[place] for word, place in model.index.items()} == pytest.approx(
        {"bus": rare, "car": rare, "red": common}
    )
    both = model.vectors(["red car", "red bus", "unknown", ""])
    cosines = (both @ both.T).toarray()
    assert cosines[0, 1] == pytest.approx(common**2 / (common**2 + rare**2))
    assert cosines.diagonal() == pytest.approx([1.0, 1.0, 0.0, 0.0])


@given(texts=st.lists(st.text(st.sampled_from("ab cé1 "), max_size=12), min_size=1, max_size=8))
def test_vectors_have_length_one_or_are_empty(texts: list[str]) -> None:
    matrix = TfIdf.of(texts).vectors(texts).toarray()
    for row, text in zip(matrix, texts, strict=True):
        assert (row**2).sum() == pytest.approx(1.0 if text.split() else 0.0)


# ------------------------------------------------------------------ first-sentence


@pytest.mark.parametrize(
    ("review", "sentence"),
    [
        ("Works well. I like it.", "Works well."),
        ("Is it 3.5 mm? Yes!", "Is it 3.5 mm?"),
        ('  He said "great!" And left.', 'He said "great!"'),
        ("no mark at all", "no mark at all"),
        ("Wow!!! What a thing", "Wow!!!"),
        ("Ends here.", "Ends here."),
    ],
)
def test_the_first_sentence_ends_with_its_mark(review: str, sentence: str) -> None:
    model = FirstSentence()
    model.fit(_trained(ROWS))
    assert _write(model, "nobody", "rug", review=review) == first_sentence(review) == sentence


def test_without_a_review_the_most_frequent_text_is_written() -> None:
    model = FirstSentence()
    model.fit(_trained(ROWS))
    assert _write(model, "ann", "rug") == _write(model, "ann", "rug", review=" \n ") == "Good value."


# ------------------------------------------------------------------ text-ridge


def _reviewed(texts: list[str], ratings: list[float]) -> SplitDataset:
    rows = [(f"u{n:02d}", "lamp", rating) for n, rating in enumerate(ratings)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating"], orient="row")
    data = _trained([])
    reviews = {(f"u{n:02d}", "lamp"): Review(text=text) for n, text in enumerate(texts)}
    whole = Dataset("toy", "things", frame, data.dataset.items, rating_scale=(1.0, 5.0), reviews=reviews)
    return replace(data, dataset=whole, train=whole.interactions.sort("user_id"))


def _stars(model: TextRidge, review: str | None) -> float:
    context = {} if review is None else {"review": review}
    (answer,) = model.answer([Request(id="r", user_id="u", item="lamp", context=context)])
    assert isinstance(answer, Rating)
    return answer.value


REVIEWS = ["good and bright", "not good", "bad", "very good", "not bad at all", "so bright", "not so good", "very bad"]
STARS = [5.0, 2.0, 1.0, 5.0, 4.0, 4.0, 2.0, 1.0]


@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0])
def test_the_weights_of_words_solve_the_ridge_problem(penalty: float) -> None:
    model = TextRidge(TextRidge.Config(penalty=penalty, least=1))
    model.fit(_reviewed(REVIEWS, STARS))
    tfidf = TfIdf.of(REVIEWS, longest=2)
    assert "not good" in tfidf.index and "good" in tfidf.index and "not so good" not in tfidf.index
    vectors, stars = tfidf.vectors(REVIEWS).toarray(), np.array(STARS)
    centred = vectors - vectors.mean(axis=0)
    normal = centred.T @ centred + penalty * np.eye(centred.shape[1])
    exact = np.linalg.solve(normal, centred.T @ (stars - stars.mean()))
    for text in (*REVIEWS, "bad and so bright"):
        (row,) = tfidf.vectors([text]).toarray()
        expected = stars.mean() + (row - vectors.mean(axis=0)) @ exact
        assert _stars(model, text) == pytest.approx(np.clip(expected, 1, 5), abs=1e-5)


def test_sequences_of_words_tell_what_words_do_not() -> None:
    two, one = (TextRidge(TextRidge.Config(penalty=0.1, least=1, words=words)) for words in (2, 1))
    for model in (two, one):
        model.fit(_reviewed(REVIEWS, STARS))
    errors = [sum(abs(_stars(model, t) - s) for t, s in zip(REVIEWS, STARS, strict=True)) for model in (two, one)]
    assert errors[0] < 0.8 * errors[1]


def test_without_a_known_word_the_mean_is_predicted_and_rare_words_have_no_weight() -> None:
    model = TextRidge()
    model.fit(_reviewed(REVIEWS, STARS))
    mean = sum(STARS) / len(STARS)
    for review in (None, "", "never seen", "all"):
        assert _stars(model, review) == pytest.approx(mean)
    assert _stars(model, "very good") > mean + 0.3
    unasked = model.answer([Request(id="a", user_id="u", item=None), Request(id="b", user_id="u", item="lamp")])
    assert isinstance(unasked[0], Unparsed) and isinstance(unasked[1], Rating)


def test_data_without_reviews_is_refused() -> None:
    data = _reviewed(REVIEWS, STARS)
    with raises(DataError, Facts("missing-value", says=("text-ridge", "toy", "amazon-reviews"))):
        TextRidge().fit(replace(data, dataset=replace(data.dataset, reviews={})))
