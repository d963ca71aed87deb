"""Titles and numbers by hand."""

from __future__ import annotations

import polars as pl
import pytest

from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split
from llmrec.index.numbers import user_order
from llmrec.index.table import ItemIndex, build
from llmrec.index.titles import title_key
from llmrec.recipe.schema import IndexSection, Split
from llmrec.types import Item


def titled(*titles: str, **fields: tuple[str, ...]) -> SplitDataset:
    items = {
        f"i{n}": Item(item_id=f"i{n}", title=title, fields={name: values[n] for name, values in fields.items()})
        for n, title in enumerate(titles)
    }
    rows = pl.DataFrame({"user_id": ["u"] * len(items), "item_id": list(items), "timestamp": range(len(items))})
    return split(Dataset("titled", "things", rows, items), Split(), seed=0)


def codes(data: SplitDataset, **section: object) -> list[str]:
    index = build(IndexSection.model_validate(section), data, seed=0)
    return [index.encode(item) for item in data.dataset.items]


def test_titles_of_one_item_stay_as_they_are() -> None:
    assert codes(titled("Heat", "Fargo", "  Alien\n3 ")) == ["Heat", "Fargo", "Alien 3"]


def test_a_shared_title_gets_the_first_field_that_tells_all_apart() -> None:
    data = titled("Taboo", "Taboo", "Heat", kind=("game", "game", "film"), year=("1990", "2004", "1995"))
    assert codes(data) == ["Taboo (1990)", "Taboo (2004)", "Heat"]


def test_where_no_field_tells_them_apart_they_are_counted() -> None:
    assert codes(titled("Heat", "heat!", "HEAT", "Heat (2)")) == ["Heat", "heat! (3)", "HEAT (4)", "Heat (2)"]


def test_a_title_cannot_spell_out_an_item_token() -> None:
    data = titled("Heat <a_1>", "<item_7>", "ends <a_")
    assert codes(data) == ["Heat < a_1>", "< item_7>", "ends < a_"]
    assert codes(titled("", "x", "y")) == ["i0", "x", "y"]


def test_an_extension_is_told_apart_from_what_is_known() -> None:
    index = build(IndexSection(), titled("Heat", "Fargo", "Jaws"), seed=0)
    more = index.extend({"new": Item(item_id="new", title="HEAT"), "other": Item(item_id="other", title="Rocky")})
    assert more.encode("new") == "HEAT (2)" and more.encode("other") == "Rocky"


# --------------------------------------------------------------------------- numbers


def histories(*sequences: str) -> SplitDataset:
    """One user a word, one item a letter; the last two letters are held out."""
    rows = [
        (f"u{user}", letter, float(time)) for user, word in enumerate(sequences) for time, letter in enumerate(word)
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = {letter: Item(item_id=letter, title=letter) for letter in sorted(set("".join(sequences)))}
    return split(Dataset("letters", "letters", frame, items), Split(), seed=0)


def numbered(data: SplitDataset, **section: object) -> str:
    """Return the items in the order of their numbers."""
    index = build(IndexSection.model_validate({"scheme": "sequential", **section}), data, seed=0)
    assert sorted(int(index.encode(item)) for item in index.codes) == list(range(1001, 1001 + len(index.codes)))
    return "".join(sorted(index.codes, key=lambda item: int(index.encode(item))))


def test_numbers_follow_training_histories_and_what_is_only_held_out_comes_last() -> None:
    data = histories("cabxy", "dazbc", "eabcdexz")
    # Training: cab, daz, eabcde; x and y are held out everywhere, z is trained on by the second user.
    assert numbered(data)[:6] == "cabdze" and set(numbered(data)[6:]) == {"x", "y"}
    assert numbered(data, order="longest")[:6] == "eabcdz"
    assert numbered(data, order="shortest")[:6] == "cabdze"


def test_the_length_that_orders_users_is_that_of_training() -> None:
    # u1 has fewer training events than u0, and as many in all, since one of its items stands twice at the end.
    assert user_order({"u2": ["a"], "u10": ["b"], "u1": ["c", "d"]}, "user", 0) == ["u1", "u2", "u10"]
    assert user_order({"u2": ["a"], "u10": ["b"], "u1": ["c", "d"]}, "shortest", 0) == ["u2", "u10", "u1"]
    assert user_order({"u2": ["a"], "u10": ["b"], "u1": ["c", "d"]}, "longest", 0) == ["u1", "u2", "u10"]


def test_random_numbers_are_no_order() -> None:
    data = histories(*("abcdefghij" for _ in range(3)))
    index = build(IndexSection(scheme="random", first=5), data, seed=0)
    assert sorted(int(index.encode(item)) for item in "abcdefghij") == list(range(5, 15))
    assert [index.encode(item) for item in "abcdefghij"] != [str(n) for n in range(5, 15)]


def test_an_extension_gets_the_next_numbers() -> None:
    index = build(IndexSection(scheme="random"), histories("abcd"), seed=0)
    one = index.extend({"x": Item(item_id="x", title="x")})
    two = one.extend({"y": Item(item_id="y", title="y")})
    assert (one.encode("x"), two.encode("y")) == ("1005", "1006")


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"scheme": "external"}, "requires a file of codes; set the key"),
        ({"scheme": "random", "path": "x.csv"}, "only the scheme 'external' reads a file"),
        ({"scheme": "random", "item_token": True}, "not supported by the scheme"),
    ],
)
def test_settings_that_do_not_fit_are_refused(section: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        IndexSection.model_validate(section)


def test_a_key_is_the_same_for_titles_that_differ_in_case_or_punctuation() -> None:
    assert title_key("L'Oréal - Paris!") == title_key("l oréal paris") != title_key("loreal paris")
    assert ItemIndex("title", {"i": ("A  B",)}).decode("A B") == "i"
