from __future__ import annotations

import math

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.baselines.text import FrequentText, NearestText, TfIdf
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset
from llmrec.types import Event, Item, Request, Text

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


def _write(model: FrequentText | NearestText, user: str, item: str, history: str = "", **context: str) -> str:
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
