"""Codes from category paths: tokens by rank, unique last tokens, and extension along known paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from catalogues import check_codes, trained

from llmrec.data.split import SplitDataset
from llmrec.errors import DataError, RecipeError
from llmrec.index.table import ItemIndex, build_item_index, item_token
from llmrec.recipe.schema import IndexSection
from llmrec.types import Item
from tests.facts import Facts, raises

FILED = {
    "lamp": "Home > Light > Lamps",
    "torch": "Home > Light",
    "bulb": "Home > Light",
    "sofa": "Home > Seats",
    "ball": "Sport",
    "odd": "",
    "odder": " > ",
}


def item(name: str, **fields: str) -> Item:
    return Item(item_id=name, title=name, fields=fields)


def catalogue(items: Mapping[str, Item], train: list[tuple[str, str]] | None = None) -> SplitDataset:
    return trained([("u", name) for name in items] if train is None else train, items)


def filed_catalogue(values: Mapping[str, str] = FILED, train: list[tuple[str, str]] | None = None) -> SplitDataset:
    return catalogue({name: item(name, categories=value, brand="none") for name, value in values.items()}, train)


def build_index(data: SplitDataset, *, seed: int = 0, item_token: bool = False, **options: Any) -> ItemIndex:
    section = {"scheme": "category", "item_token": item_token, "category": options}
    index = build_item_index(IndexSection.model_validate(section), data, seed=seed)
    check_codes(index)
    return index


def paths(index: ItemIndex) -> dict[str, str]:
    return {name: "".join(pieces[:-1]) for name, pieces in index.codes.items()}


def test_a_token_is_the_rank_of_a_category_at_its_level() -> None:
    index = build_index(filed_catalogue())
    # Home holds four items and Sport one; Light three and Seats one. Items without a category get the last
    # token of the first level.
    assert paths(index) == {
        "lamp": "<a_0><b_0><c_0>",
        "torch": "<a_0><b_0>",
        "bulb": "<a_0><b_0>",
        "sofa": "<a_0><b_1>",
        "ball": "<a_1>",
        "odd": "<a_2>",
        "odder": "<a_2>",
    }
    assert index.settings["names"] == [["Home", "Sport"], ["Light", "Seats"], ["Lamps"]]
    assert index.tokens == ("<a_0>", "<a_1>", "<a_2>", "<b_0>", "<b_1>", "<c_0>", "<item_0>", "<item_1>")
    assert index.figures == {"paths": 5, "largest_path": 2, "depth": 3, "unfiled": 2}


def test_equally_frequent_categories_are_ranked_by_name() -> None:
    index = build_index(filed_catalogue({"x": "b", "y": "a", "z": "c", "w": "c"}))
    assert index.settings["names"] == [["c", "a", "b"]]


def test_levels_limit_the_path() -> None:
    assert {len(pieces) for pieces in build_index(filed_catalogue(), levels=1).codes.values()} == {2}
    assert build_index(filed_catalogue(), levels=1).settings["names"] == [["Home", "Sport"]]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"x": "A, b > C | d", "y": "A, b"}, [["A, b"], ["C | d"]]),
        ({"x": "A, b|C", "y": "A, b"}, [["A, b"], ["C"]]),
        ({"x": "Animation, Children's, Comedy", "y": "Comedy"}, [["Animation", "Comedy"], ["Children's"], ["Comedy"]]),
        ({"x": "Comedy / Drama", "y": "War"}, [["Comedy / Drama", "War"]]),
    ],
)
def test_separator_is_detected(values: dict[str, str], names: list[list[str]]) -> None:
    assert build_index(filed_catalogue(values)).settings["names"] == names


def test_separator_and_fields_are_options() -> None:
    data = catalogue({"x": item("x", shelf="3/4", brand="Acme"), "y": item("y", shelf="3/5", brand="Bolt")})
    assert build_index(data, separator="/").settings["names"] == [["3"], ["4", "5"]]
    both = build_index(data, separator="/", fields=("brand", "shelf"))
    assert both.settings["names"] == [["Acme", "Bolt"], ["3"], ["4", "5"]]
    assert build_index(data, fields=("brand",)).settings["names"] == [["Acme", "Bolt"]]


def test_rejects_missing_fields() -> None:
    with raises(DataError, Facts("missing-column", "toy", column="data.columns.fields")):
        build_index(catalogue({"x": item("x")}))
    with raises(
        RecipeError,
        Facts(
            "unknown-name",
            column="index.category.fields",
            says=("did you mean 'categories'", "the fields are categories, brand"),
        ),
    ):
        build_index(filed_catalogue(), fields=("catgories",))


def test_items_of_a_path_are_ordered_by_training_interactions() -> None:
    values = dict.fromkeys("abcdef", "Same > Path")
    train = [("u0", "c"), ("u1", "c"), ("u2", "c"), ("u0", "e"), ("u1", "e"), ("u0", "a")]
    index = build_index(filed_catalogue(values, train))
    assert [index.codes[name][-1] for name in "cea"] == [item_token(n) for n in range(3)]
    assert {index.codes[name][-1] for name in "bdf"} == {item_token(n) for n in range(3, 6)}
    orders = {
        tuple(build_index(filed_catalogue(values, train), seed=seed).codes[name][-1] for name in "bdf")
        for seed in range(8)
    }
    assert len(orders) > 1


def test_item_tokens_are_unique() -> None:
    plain, with_item_tokens = build_index(filed_catalogue()), build_index(filed_catalogue(), item_token=True)
    assert paths(plain) == paths(with_item_tokens)
    assert sorted(pieces[-1] for pieces in with_item_tokens.codes.values()) == [
        item_token(n) for n in range(len(FILED))
    ]
    assert with_item_tokens.tokens[-len(FILED) :] == tuple(item_token(n) for n in range(len(FILED)))


def test_new_items_get_the_known_part_of_their_path() -> None:
    index = build_index(filed_catalogue())
    new = {
        "sun": item("sun", categories="Home > Light > Lamps > Desk"),
        "bench": item("bench", categories="Home > Seats > Wood"),
        "disc": item("disc", categories="Sport > Frisbee > Lamps"),
        "beam": item("beam", categories="Home > Seats > Lamps"),
    }
    more = index.extend(new)
    check_codes(more)
    assert more.tokens == index.tokens
    assert {name: more.encode(name) for name in new} == {
        "sun": "<a_0><b_0><c_0><item_1>",
        "bench": "<a_0><b_1><item_1>",
        "disc": "<a_1><item_1>",
        "beam": "<a_0><b_1><c_0><item_0>",
    }


def test_full_path_falls_back_to_a_shorter_one() -> None:
    index = build_index(filed_catalogue())
    # Both codes of "Home > Light" are in use, but none of "Home" or of the empty path.
    new = {f"n{n}": item(f"n{n}", categories="Home > Light") for n in range(6)}
    more = index.extend(new)
    check_codes(more)
    lengths = sorted(len(more.codes[name]) for name in new)
    assert lengths == [1, 1, 2, 2, 3, 3]
    assert more.tokens[: len(index.tokens)] == index.tokens
    assert more.tokens[len(index.tokens) :] == ("<item_2>", "<item_3>")
    assert all(more.codes[name] == pieces for name, pieces in index.codes.items())


def test_unknown_category_is_no_category() -> None:
    index = build_index(filed_catalogue({"x": "A", "y": "A", "z": "A", "w": ""}))
    more = index.extend({"n": item("n", categories="Z > A"), "m": item("m")})
    assert {more.encode("n"), more.encode("m")} == {"<a_1><item_1>", "<a_1><item_2>"}
    assert more.tokens == index.tokens


def test_new_items_with_item_tokens_keep_their_path() -> None:
    index = build_index(filed_catalogue(), item_token=True)
    new = {f"n{n}": item(f"n{n}", categories="Home > Light") for n in range(3)}
    one = index.extend({"n0": new["n0"]})
    two = one.extend(new)
    check_codes(two)
    assert {"".join(two.codes[name][:-1]) for name in new} == {"<a_0><b_0>"}
    assert len({*two.tokens}) == len(two.tokens) == len(index.tokens) + 3
