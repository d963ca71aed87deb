"""Titles and numbers as codes, by hand."""

from __future__ import annotations

import polars as pl
import pytest

from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.index.numbers import sort_users
from llmrec.index.table import ItemIndex, build_item_index
from llmrec.index.titles import title_key
from llmrec.recipe.schema import IndexSection, Split
from llmrec.types import Item


def titled(*titles: str, **fields: tuple[str, ...]) -> SplitDataset:
    items = {
        f"i{n}": Item(item_id=f"i{n}", title=title, fields={name: values[n] for name, values in fields.items()})
        for n, title in enumerate(titles)
    }
    rows = pl.DataFrame({"user_id": ["u"] * len(items), "item_id": list(items), "timestamp": range(len(items))})
    return split_dataset(Dataset("titled", "things", rows, items), Split(), seed=0)


def codes(data: SplitDataset, **section: object) -> list[str]:
    index = build_item_index(IndexSection.model_validate(section), data, seed=0)
    return [index.encode(item) for item in data.dataset.items]


def test_unique_titles_are_kept() -> None:
    assert codes(titled("Heat", "Fargo", "  Alien\n3 ")) == ["Heat", "Fargo", "Alien 3"]


def test_equal_titles_get_the_first_distinguishing_field() -> None:
    data = titled("Taboo", "Taboo", "Heat", kind=("game", "game", "film"), year=("1990", "2004", "1995"))
    assert codes(data) == ["Taboo (1990)", "Taboo (2004)", "Heat"]


def test_equal_titles_without_fields_are_numbered() -> None:
    assert codes(titled("Heat", "heat!", "HEAT", "Heat (2)")) == ["Heat", "heat! (3)", "HEAT (4)", "Heat (2)"]


def test_a_title_cannot_spell_out_an_item_token() -> None:
    data = titled("Heat <a_1>", "<item_7>", "ends <a_")
    assert codes(data) == ["Heat < a_1>", "< item_7>", "ends < a_"]
    assert codes(titled("", "x", "y")) == ["i0", "x", "y"]


def test_extension_differs_from_known_titles() -> None:
    index = build_item_index(IndexSection(), titled("Heat", "Fargo", "Jaws"), seed=0)
    more = index.extend({"new": Item(item_id="new", title="HEAT"), "other": Item(item_id="other", title="Rocky")})
    assert more.encode("new") == "HEAT (2)" and more.encode("other") == "Rocky"


def histories(*sequences: str) -> SplitDataset:
    """One user per word, one item per letter; the last two letters are held out."""
    rows = [
        (f"u{user}", letter, float(time)) for user, word in enumerate(sequences) for time, letter in enumerate(word)
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = {letter: Item(item_id=letter, title=letter) for letter in sorted(set("".join(sequences)))}
    return split_dataset(Dataset("letters", "letters", frame, items), Split(), seed=0)


def numbered(data: SplitDataset, **section: object) -> str:
    """Return the items in the order of their numbers."""
    index = build_item_index(IndexSection.model_validate({"scheme": "sequential", **section}), data, seed=0)
    assert sorted(int(index.encode(item)) for item in index.codes) == list(range(1001, 1001 + len(index.codes)))
    return "".join(sorted(index.codes, key=lambda item: int(index.encode(item))))


def test_numbers_follow_training_histories() -> None:
    data = histories("cabxy", "dazbc", "eabcdexz")
    # Training: cab, daz, eabcde; x and y are always held out, z is in the second user's training part.
    assert numbered(data)[:6] == "cabdze" and set(numbered(data)[6:]) == {"x", "y"}
    assert numbered(data, order="longest")[:6] == "eabcdz"
    assert numbered(data, order="shortest")[:6] == "cabdze"


def test_order_of_users() -> None:
    histories = {"u2": ["a"], "u10": ["b"], "u1": ["c", "d"]}
    assert sort_users(histories, "user", 0) == ["u1", "u2", "u10"]
    assert sort_users(histories, "shortest", 0) == ["u2", "u10", "u1"]
    assert sort_users(histories, "longest", 0) == ["u1", "u2", "u10"]


def test_random_numbers_are_shuffled() -> None:
    data = histories(*("abcdefghij" for _ in range(3)))
    index = build_item_index(IndexSection(scheme="random", first=5), data, seed=0)
    assert sorted(int(index.encode(item)) for item in "abcdefghij") == list(range(5, 15))
    assert [index.encode(item) for item in "abcdefghij"] != [str(n) for n in range(5, 15)]


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"scheme": "external"}, "requires a file of codes; set the key"),
        ({"scheme": "random", "path": "x.csv"}, "only the scheme 'external' reads a file"),
        ({"scheme": "random", "item_token": True}, "not supported by the scheme"),
    ],
)
def test_rejects_contradicting_options(section: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        IndexSection.model_validate(section)


def test_title_key_ignores_case_and_punctuation() -> None:
    assert title_key("L'Oréal - Paris!") == title_key("l oréal paris") != title_key("loreal paris")
    assert ItemIndex("title", {"i": ("A  B",)}).decode("A B") == "i"
