"""Diagnostics of an index: values by hand, and consistency for any index."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.errors import DataError
from llmrec.index.diagnostics import Depth, RangeSummary, diagnose, example_items, largest_code_groups, nearest_items
from llmrec.index.table import ItemIndex, item_token, level_token
from tests.facts import Facts, raises

TOKENS = (*(level_token(0, n) for n in range(3)), *(level_token(1, n) for n in range(4)))


def index_of(*codes: tuple[int, ...], **more: object) -> ItemIndex:
    """Return an index of items i0, i1, ...; each number is a token of its level."""
    pieces = {f"i{n}": tuple(level_token(level, n) for level, n in enumerate(code)) for n, code in enumerate(codes)}
    tokens = sorted({*TOKENS, *(piece for code in pieces.values() for piece in code)})
    return ItemIndex("semantic", pieces, tokens=tuple(tokens), **more)  # type: ignore[arg-type]


FOUR = index_of((0, 0), (0, 1), (0, 2), (1, 0), figures={"collisions": 0.5})
TITLES = {"i0": "Alien", "i1": "Aliens", "i2": "Heat", "i3": ""}


def test_levels_by_hand() -> None:
    a, b = diagnose(FOUR).levels
    assert (a.name, a.used, a.available, a.counts) == ("a", 2, 3, (3, 1))
    assert a.perplexity == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert (b.name, b.used, b.available, b.counts) == ("b", 3, 4, (2, 1, 1))
    assert b.perplexity == pytest.approx(2**1.5)
    assert (a.share, b.share) == (0.75, 0.5)
    assert (a.perplexity_trained, a.untrained) == (None, None)


def test_levels_weighted_by_training_interactions_by_hand() -> None:
    a, b = diagnose(FOUR, {"i0": 6, "i1": 2}).levels
    assert (a.perplexity_trained, a.untrained) == (1.0, 1)
    assert b.perplexity_trained == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert b.untrained == 1
    assert [level.perplexity_trained for level in diagnose(FOUR, {}).levels] == [0.0, 0.0]


def test_prefixes_by_hand() -> None:
    result = diagnose(FOUR)
    assert result.depths == (
        Depth(length=0, prefixes=1, fan_out=2.0, most_fan_out=2, items=4.0, most_items=4),
        Depth(length=1, prefixes=2, fan_out=2.0, most_fan_out=3, items=2.0, most_items=3),
    )
    assert (result.bucket, result.duplicates, result.begun, result.collisions) == (3, 0, 0, 0.5)
    assert result.pieces == RangeSummary(least=2, mean=2.0, most=2)
    assert result.characters is None and result.first_words is None and not result.hybrid


def test_codes_of_several_lengths_by_hand() -> None:
    result = diagnose(index_of((0,), (0, 1), (1, 0, 0), (1, 0, 1), (2,)))
    assert result.begun == 1
    assert result.pieces == RangeSummary(least=1, mean=2.0, most=3)
    assert [(d.prefixes, d.items, d.most_fan_out) for d in result.depths] == [(1, 5.0, 3), (2, 1.5, 1), (1, 2.0, 2)]
    assert result.bucket == 2


def test_one_token_an_item() -> None:
    tokens = tuple(item_token(n) for n in range(5))
    result = diagnose(ItemIndex("token", {f"i{n}": (piece,) for n, piece in enumerate(tokens)}, tokens=tokens))
    (level,) = result.levels
    assert (level.name, level.counts, result.bucket) == ("item", (1,) * 5, None)
    assert level.perplexity == pytest.approx(5)
    assert [depth.length for depth in result.depths] == [0]


def test_item_token_level_is_last() -> None:
    tokens = (item_token(0), item_token(1), level_token(1, 0), level_token(0, 0))
    codes = {f"i{n}": (level_token(0, 0), level_token(1, 0), item_token(n)) for n in range(2)}
    result = diagnose(ItemIndex("category", codes, tokens=tokens, settings={"item_token": True}))
    assert [level.name for level in result.levels] == ["a", "b", "item"] and result.hybrid


def test_text_codes_have_characters_and_first_words() -> None:
    codes = {"i0": ("The Rock",), "i1": ("The Rocks",), "i2": ("Heat",), "i3": ("A Rock",)}
    result = diagnose(ItemIndex("title", codes, figures={"collisions": 0.25}))
    assert (result.levels, result.depths, result.pieces, result.bucket, result.tokens) == ((), (), None, None, 0)
    assert result.characters == RangeSummary(least=4, mean=6.75, most=9)
    first = result.first_words
    assert first is not None and (first.different, first.common, first.items) == (3, "The", 2)
    assert result.begun == 1
    assert diagnose(ItemIndex("random", {"i0": ("1001",), "i1": ("1002",)})).first_words is None


def test_counts_duplicates() -> None:
    codes = {"i0": (level_token(0, 0),), "i1": (level_token(0, 1),)}
    index = ItemIndex("external", codes, tokens=(level_token(0, 0), level_token(0, 1)))
    # The index itself rejects duplicates.
    codes["i1"] = codes["i0"]
    assert diagnose(index).duplicates == 1


def test_neighbours_are_the_largest_groups() -> None:
    groups = largest_code_groups(FOUR, TITLES, members=2, counts={"i2": 5, "i1": 1})
    (group,) = groups
    assert (group.length, group.prefix, group.size) == (1, "<a_0>", 3)
    assert [entry.title for entry in group.entries] == ["Heat", "Aliens"]
    assert largest_code_groups(FOUR, TITLES, prefixes=0) == ()


def test_neighbours_of_numbers_are_ranges() -> None:
    numbers = ItemIndex("sequential", {f"i{n}": (str(1000 - n),) for n in range(10)})
    groups = largest_code_groups(numbers, {"i9": "First"}, prefixes=2, members=3)
    assert [group.prefix for group in groups] == ["991–993", "998–1000"]
    assert [entry.title for entry in groups[0].entries] == ["First", "i8", "i7"]
    assert [len(group.entries) for group in largest_code_groups(numbers, {}, members=99)] == [10]
    assert largest_code_groups(ItemIndex("title", {"i0": ("Heat",), "i1": ("12",)}), {}) == ()


def test_prefixes_name_their_categories() -> None:
    codes = {f"i{n}": (level_token(0, n // 4), level_token(1, n // 2 % 2), item_token(n % 2)) for n in range(8)}
    tokens = tuple(sorted({piece for code in codes.values() for piece in code}))
    index = ItemIndex("category", codes, tokens, {"names": [["Tools"], ["Saws", "Drills"]]})
    assert [group.said for group in largest_code_groups(index, {})] == [
        *("Tools", "no category"),
        *("Tools > Saws", "Tools > Drills", "no category > Saws", "no category > Drills"),
    ]
    assert {group.said for group in largest_code_groups(FOUR, TITLES)} == {""}


def test_nearest_items_share_the_longest_prefix() -> None:
    index = index_of((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2))
    assert [entry.item for entry in nearest_items(index, "i0", {})] == ["i1", "i4"]
    assert [entry.item for entry in nearest_items(index, "i0", {}, most=1)] == ["i1"]
    assert [entry.item for entry in nearest_items(index, "i2", {})] == ["i0", "i1", "i4"]
    assert nearest_items(index, "i3", {}) == ()
    with raises(DataError, Facts("unknown-name", says="'i9'")):
        nearest_items(index, "i9", {})


def test_examples_are_requested_items_and_evenly_spaced_ones() -> None:
    index = index_of(*((n // 4, n % 4) for n in range(10)))
    assert [entry.item for entry in example_items(index, {}, 3, ["i7"])] == ["i7", "i0", "i4"]
    assert [entry.item for entry in example_items(index, TITLES, 99)] == [f"i{n}" for n in range(10)]
    assert [entry.title for entry in example_items(index, TITLES, 1, ["i1", "i3"])] == ["Aliens", "i3"]
    with raises(DataError, Facts("unknown-name", says="did you mean 'i9'")):
        example_items(index, {}, 3, ["i99"])


codes_of = st.sets(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=40)


@given(codes_of, st.randoms())
def test_diagnosis_of_any_index_is_consistent(codes: set[tuple[int, ...]], dice: object) -> None:
    order = sorted(codes)
    index = index_of(*order)
    result = diagnose(index, {"i0": 1})
    paths = list(index.codes.values())
    for number, level in enumerate(result.levels):
        assert sum(level.counts) == sum(len(path) > number for path in paths)
        assert level.used <= level.available
        assert bool(level.used) <= level.perplexity <= level.used + 1e-9
        assert level.untrained is not None and 0 <= level.untrained <= level.used
    for before, after in pairwise(result.depths):
        assert after.most_items <= before.most_items
        assert after.prefixes <= before.prefixes * before.fan_out + 1e-9
    for depth in result.depths:
        longer = {path[: depth.length + 1] for path in paths if len(path) > depth.length}
        assert depth.prefixes * depth.fan_out == pytest.approx(len(longer))
        assert depth.prefixes * depth.items == pytest.approx(sum(len(path) > depth.length for path in paths))
    begins = sum(any(b[: len(a)] == a for b in paths if a != b) for a in paths)
    assert (result.begun, result.duplicates) == (begins, 0)
    dice.shuffle(order)  # type: ignore[attr-defined]
    stored = json.loads(json.dumps(diagnose(index).as_json()))
    assert (
        stored == json.loads(json.dumps(diagnose(index_of(*order)).as_json())) and "counts" not in stored["levels"][0]
    )
