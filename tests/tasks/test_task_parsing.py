from __future__ import annotations

import math
import random
from functools import cache
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_data import HOSTILE, load_templates, make_dataset, make_split, make_task

from llmrec.data.dataset import Dataset
from llmrec.errors import DataError
from llmrec.index.titles import title_key
from llmrec.tasks.ctr import parse_choice
from llmrec.tasks.direct import candidate_labels
from llmrec.tasks.parsing import first_line_keys, parse_number, parse_ranking
from llmrec.tasks.rating import expected_rating, find_scale
from llmrec.types import Item, Ranking, Request
from tests.facts import Facts, raises

TITLES = (
    *("Toy Story (1995)", "Heat", "M*A*S*H", "A Bug's Life", "Plan 9 from Outer Space"),
    *("Alien", "Aliens", "I, Robot", "M"),
)
LABELS = candidate_labels(len(TITLES))
MARKS = (
    *(". ", ") ", ", ", "\n", "[", "]", '"', "{", "}", ":"),
    *("- ", "1", "2.", "**", "the ", "and ", "-", "/", " out of "),
)
NUMBERS = ("4", "5/5", "4.5", "four", "★", "٤", "½")
NOISE = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from([*TITLES, *LABELS, *HOSTILE.values(), *MARKS, *NUMBERS]), max_size=15).map("".join),
)


def letters(text: str) -> str:
    return "".join(LABELS[index] for index in parse_ranking(text, LABELS, TITLES))


@pytest.mark.parametrize(("text", "read"), [
    ("B", "B"), (" B. ", "B"), ("b, a, c", "BAC"), ("B > A > C", "BAC"), ("B\nA\nC", "BAC"),
    ("1. B) Heat\n2. A) Toy Story (1995)", "BA"), ("1) **B** - Heat\n2) **A**", "BA"),
    ("- Heat\n- toy story 1995\n", "BA"), ('["B", "A", "C"]', "BAC"),
    ('```json\n["Heat", "A Bug\'s Life"]\n```', "BD"),
    ('[{"label": "B", "title": "Heat"}, {"rank": 2, "title": "Alien"}]', "BF"), ("Heat, Alien, Aliens", "BFG"),
    ("I would pick B because it is quiet.", "B"),
    ("I think the user would like Heat the most, followed by M*A*S*H.", "BC"), ("B, B, A, B", "BA"),
    ("B: Vitamin C\nA: Toy Story", "BA"), ("1. Vitamin C\n2. B) Heat", "B"), ("A. Heat\nB. Alien", "BF"),
    ("Z, Q, B", "B"), ("(B)", "B"), ("Answer: B", "B"), ("My ranking:\nB, A, C", "BAC"), ("Ｂ, Ａ", "BA"), ("", ""),
    ("I am not sure.", ""), ("A user likes many things.", ""), ("[1, 2, 3]", ""), ("Gattaca; X-Men; AC/DC", ""),
])  # fmt: skip
def test_rankings_of_letters(text: str, read: str) -> None:
    assert letters(text) == read


@pytest.mark.parametrize(("text", "read"), [
    ("07, 12, 3", [6, 11, 2]), ("1. 07) Film 07\n2. 12) Film 12", [6, 11]), ("99, 5", [4]), ("[7, 12]", [6, 11]),
    ('["film 07", "Film 30"]', [6, 29]),
])  # fmt: skip
def test_rankings_of_numbers(text: str, read: list[int]) -> None:
    labels, titles = candidate_labels(30), [f"Film {n:02d}" for n in range(1, 31)]
    assert parse_ranking(text, labels, titles) == read


@pytest.mark.parametrize(("text", "read"), [
    ("选B。", "B"), ("B가 좋습니다", "B"), ("我推荐《霸王别姬》。", "A"), ("می‌خواهم زنده بمانم", "C"),
    ("میخواهم زنده بمانم", "C"),    ("👨\u200d👩 FAMILY\u00ad", "D"), ("Ärzte Betrieb", ""),
])  # fmt: skip
def test_rankings_in_other_scripts(text: str, read: str) -> None:
    titles = ["霸王别姬", "Сталкер", "میخواهم زنده بمانم", "👨👩 Family"]
    assert "".join("ABCD"[index] for index in parse_ranking(text, "ABCD", titles)) == read


@given(st.permutations(range(len(TITLES))), st.sampled_from([", ", "\n", " > ", "; ", " "]), st.booleans())
def test_reads_labels_and_titles_in_any_order(order: list[int], between: str, as_title: bool) -> None:
    if as_title:
        # "M" alone is read as a label, and titles that only a space separates may be joined with a neighbour.
        order = [index for index in order if TITLES[index] != "M"]
        between = "\n" if between == " " else between
    text = between.join(TITLES[index] if as_title else LABELS[index] for index in order)
    assert parse_ranking(text, LABELS, TITLES) == order


@given(NOISE)
def test_readers_accept_any_text(text: str) -> None:
    order = parse_ranking(text, LABELS, TITLES)
    assert len(set(order)) == len(order) and all(0 <= index < len(TITLES) for index in order)
    value = parse_number(text, 1.0, 5.0)
    assert value is None or 1.0 <= value <= 5.0
    assert all(isinstance(key, str) for key in first_line_keys(text))
    choice = parse_choice(text, ("Yes", "No"))
    assert choice is None or ("yes", "no")[choice] in text.casefold()
    for task, template in parsers():
        answer = task.parse(text, REQUEST, template=template)
        assert answer is None or answer.request_id == "r"
        if isinstance(answer, Ranking):
            assert answer.items and set(answer.items) <= set(REQUEST.candidates or ())
            assert list(answer.scores) == sorted(answer.scores, reverse=True)


@cache
def parsers() -> list[tuple[Any, str]]:
    families = ("rating", "sequential", "direct", "explanation")
    return [(make_task(family), next(iter(load_templates(family)))) for family in families]


REQUEST = Request(id="r", user_id="u00", candidates=tuple(f"i{i:02d}" for i in range(20)), item="i01")


def test_long_texts_are_read_in_linear_time() -> None:
    for piece in ("A ", ", ", "[", "A", "((A", "9", "1. "):
        text = piece * 30_000
        parse_ranking(text, LABELS, TITLES)
        parse_number(text, 1, 5)
        list(first_line_keys(text))
    assert letters("A " * 50_000) == "A"


@pytest.mark.parametrize(("text", "value"), [
    ("4", 4), ("4,5", 4.5), (" 4 stars", 4), ("4/5", 4), ("4 out of 5", 4), ("8/10", None), ("Four stars.", 4),
    ("**5**", 5), ("４", 4), ("٤", 4), ("4½", 4.5), ("★★★", 3), ("6", None), ("-3", None), ("", None),
    ("it is one of the best", None), ("9" * 400, None), ("user4", None),
])  # fmt: skip
def test_numbers(text: str, value: float | None) -> None:
    assert parse_number(text, 1.0, 5.0) == value


def test_expected() -> None:
    assert expected_rating([1, 5], [math.log(0.25), math.log(0.75)]) == pytest.approx(4.0)
    assert expected_rating([1, 2, 3], [-1000.0, -1000.0, -1000.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError):
        expected_rating([1, 2], [0.0])


def scaled(ratings: list[float], scale: tuple[float, float] | None) -> tuple[str, ...]:
    base = make_dataset(hostile=False)
    rng = random.Random(0)
    column = pl.Series("rating", [rng.choice(ratings) for _ in range(base.interactions.height)])
    data = Dataset(
        name="x", noun="x", interactions=base.interactions.with_columns(column), items=base.items, rating_scale=scale
    )
    return find_scale(make_split(data)).labels


def test_scales() -> None:
    assert scaled([2.0, 3.0], (1, 5)) == ("1", "2", "3", "4", "5")
    half = scaled([0.5, 4.0, 4.5], (0.5, 5))
    assert half == ("0.5", "1.0", "1.5", "2.0", "2.5", "3.0", "3.5", "4.0", "4.5", "5.0")
    assert scaled([2.0, 4.0], None) == ("2", "3", "4")
    assert scaled([-9.7, 9.2], (-10, 10))[:2] == ("-10.0", "-9.5")
    assert len(scaled([0.3, 99.2], (0, 100))) == 101
    with raises(DataError, Facts("too-large", column="rating")):
        scaled([1.0, 1000.0], None)


def test_parses_every_rendered_title() -> None:
    task = make_task("sequential")
    request = Request(id="w", user_id="u00")
    for item, text in zip(task.catalogue, task.continuations(request, template="next-title"), strict=True):
        for written in (text, f'"{text}"', text.upper(), f"{text}\n", f"  {text}  \nand more"):
            answer = task.parse(written, request, template="next-title")
            assert isinstance(answer, Ranking) and item in answer.items
    assert task.parse("No such film", request, template="next-title") is None
    few = Request(id="f", user_id="u00", candidates=("i10", "i11"))
    assert task.parse("Film #12!", few, template="next-title") is None
    assert task.parse("1. film 11", few, template="next-title").items == ("i11",)


def test_parses_every_label() -> None:
    task = make_task("direct")
    for count in (2, 20, 26, 27, 100):
        pool = tuple(sorted(task._data.dataset.items))[: min(count, 60)]
        request = Request(id="d", user_id="u00", candidates=pool)
        labels = task.continuations(request, template="shortlist")
        for item, label in zip(pool, labels, strict=True):
            assert task.parse(label, request, template="shortlist").items == (item,)
        assert task.parse(", ".join(labels), request, template="shortlist").items == pool


@given(st.text(min_size=1, max_size=40))
def test_title_key_is_stable(title: str) -> None:
    key = title_key(title)
    assert title_key(key) == key or not any(c.isalnum() for c in title)
    assert title_key(f"  {title}  ") == key


def test_items_of_equal_title_tie() -> None:
    base = make_dataset(hostile=False)
    items = {**base.items, "i02": Item(item_id="i02", title="Twice"), "i03": Item(item_id="i03", title="twice!")}
    data = Dataset(name="x", noun="films", interactions=base.interactions, items=items, rating_scale=(1, 5))
    answer = make_task("sequential", make_split(data)).parse(
        "Twice", Request(id="q", user_id="u00"), template="continue-list"
    )
    assert answer.items == ("i02", "i03") and answer.scores == (1.0, 1.0)
