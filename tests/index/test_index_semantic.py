"""Semantic codes: texts, repair of equal codes, and extension."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
from catalogues import trained
from numpy.typing import NDArray

from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.errors import DataError, RecipeError
from llmrec.index.semantic import encode_vectors, nearest_codes
from llmrec.index.table import ItemIndex, build_item_index, item_token, level_token
from llmrec.recipe.schema import IndexSection, Split
from llmrec.types import Item
from tests.facts import Facts, raises

REPAIRS = ("extra_level", "last_level")


def hashed(texts: Sequence[str], dim: int = 12) -> NDArray[np.float32]:
    """Return random vectors that are equal for equal texts."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
    return np.stack([np.random.default_rng(seed).normal(size=dim) for seed in seeds]).astype(np.float32)


def titled(titles: Sequence[str], times: Sequence[int] | None = None) -> SplitDataset:
    """Items with these titles; ``times`` are their numbers of training interactions."""
    items = {f"i{n:03d}": Item(item_id=f"i{n:03d}", title=title) for n, title in enumerate(titles)}
    rows = [
        (f"u{user}", item)
        for item, often in zip(items, times or [1] * len(items), strict=True)
        for user in range(often)
    ]
    return trained(rows, items)


def index_of(
    data: SplitDataset, *, embed: Any = hashed, seed: int = 0, item_token: bool = False, **semantic: Any
) -> ItemIndex:
    section = {"scheme": "semantic", "item_token": item_token, "semantic": {"levels": 2, "codes": 8} | semantic}
    return build_item_index(IndexSection.model_validate(section), data, seed=seed, embed=embed)


@pytest.mark.parametrize(("repair", "balance"), [("extra_level", 0.0), ("last_level", 2.0)])
def test_fifty_equal_texts_get_fifty_codes(repair: str, balance: float) -> None:
    data = titled([f"text {n}" for n in range(20)] + ["the same"] * 50)
    codes = index_of(data, repair=repair, balance=balance, levels=3, codes=64).codes
    assert len({*codes.values()}) == 70
    assert {len(pieces) for pieces in codes.values()} == {4 if repair == "extra_level" else 3}


def test_equal_codes_are_numbered_by_training_popularity() -> None:
    data = titled(["a", "a", "a", "b"], times=[1, 3, 2, 1])
    index = index_of(data, balance=0)
    first = index.codes["i000"][:2]
    assert [index.codes[f"i00{n}"] for n in range(3)] == [(*first, level_token(2, n)) for n in (2, 0, 1)]
    assert index.codes["i003"][2] == level_token(2, 0)
    assert index.figures["collisions"] == 0.75 and index.figures["largest_bucket"] == 3


def test_equal_popularity_is_ordered_by_a_seeded_hash() -> None:
    data = titled(["a"] * 12)
    orders = {tuple(index_of(data, seed=seed, balance=0).codes.values()) for seed in range(4)}
    assert len(orders) == 4


def test_tokens_are_the_grid_and_the_needed_counts() -> None:
    index = index_of(titled(["a", "a", "b"]), balance=0, codes=3)
    assert index.tokens == ("<a_0>", "<a_1>", "<a_2>", "<b_0>", "<b_1>", "<b_2>", "<c_0>", "<c_1>")
    assert index_of(titled(["a", "b"]), repair="last_level", codes=2).tokens == ("<a_0>", "<a_1>", "<b_0>", "<b_1>")


def test_last_level_repair_minimizes_total_distance() -> None:
    data = titled([f"t{n}" for n in range(30)] + ["t1", "t1", "t2"])
    options = {"levels": 2, "codes": 16, "balance": 0}
    counted, moved = index_of(data, **options), index_of(data, repair="last_level", **options)
    vectors = hashed([item.title for item in data.dataset.items.values()])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    first, last = moved.arrays["codebooks"]
    groups: dict[str, list[str]] = {}
    for item, pieces in moved.codes.items():
        assert pieces[0] == counted.codes[item][0]
        groups.setdefault(pieces[0], []).append(item)
    for piece, items in groups.items():
        rest = vectors[[int(item[1:]) for item in items]] - first[int(piece[3:-1])]
        costs = np.square(rest[:, None] - last).sum(2)
        chosen = [int(moved.codes[item][1][3:-1]) for item in items]
        total = costs[np.arange(len(items)), chosen].sum()
        assert len({*chosen}) == len(chosen)
        # No swap of two items, and no move to a free code, reduces the cost.
        for a in range(len(items)):
            free = [c for c in range(16) if c not in chosen]
            assert costs[a, chosen[a]] <= costs[a, free].min() + 1e-5
            for b in range(a):
                changed = total - costs[a, chosen[a]] - costs[b, chosen[b]] + costs[a, chosen[b]] + costs[b, chosen[a]]
                assert total <= changed + 1e-5
    assert 0 < moved.figures["moved"] < 0.5


def test_rejects_more_equal_items_than_codes() -> None:
    with raises(
        RecipeError, Facts("contradiction", column="index.semantic.repair", says=("9 items", "4 codes", "extra_level"))
    ):
        index_of(titled(["a"] * 9), repair="last_level", codes=4, balance=0)


def test_item_tokens_as_last_pieces() -> None:
    data = titled(["a", "a", "b"])
    index = index_of(data, item_token=True, balance=0)
    assert [pieces[2] for pieces in index.codes.values()] == [item_token(n) for n in range(3)]
    assert index.codes["i000"][:2] == index.codes["i001"][:2] != index.codes["i002"][:2]
    assert index.tokens[16:] == (item_token(0), item_token(1), item_token(2))


def test_planted_kinds_share_their_first_piece() -> None:
    kinds = np.eye(8, 16)

    def planted(texts: Sequence[str]) -> NDArray[np.float32]:
        return (kinds[[int(text.split()[1]) for text in texts]] + 0.05 * hashed(texts, 16)).astype(np.float32)

    data = titled([f"kind {n % 8} number {n}" for n in range(160)])
    index = index_of(data, embed=planted, levels=3, codes=8)
    first = [pieces[0] for pieces in index.codes.values()]
    assert all(first[n] == first[n % 8] for n in range(160)) and len({*first}) == 8
    assert index.figures["perplexity_1"] == pytest.approx(8)
    assert 0 < index.figures["mse"] < 0.1


def test_encoder_gets_titles_and_fields() -> None:
    seen: list[str] = []

    def listening(texts: Sequence[str]) -> NDArray[np.float32]:
        seen[:] = texts
        return hashed(texts)

    items = {
        "b": Item(item_id="b", title=" Lip\nBalm ", fields={"brand": "Nivea", "categories": "Skin > Lips"}),
        "a": Item(item_id="a", title="", fields={"brand": "", "categories": ""}),
        "c": Item(item_id="c", title="Soap"),
    }
    frame = pl.DataFrame({"user_id": ["u", "u", "u"], "item_id": ["a", "b", "c"], "timestamp": [1, 2, 3]})
    data = split_dataset(Dataset("t", "things", frame, items), Split(), seed=0)
    index_of(data, embed=listening)
    assert seen == ["a", "Lip Balm. brand: Nivea. categories: Skin > Lips", "Soap"]
    index = index_of(data, embed=listening, fields=("categories",))
    assert seen == ["a", "Lip Balm. categories: Skin > Lips", "Soap"]
    index.extend({"d": Item(item_id="d", title="Oil", fields={"brand": "X", "categories": "Hair"})}, embed=listening)
    assert seen == ["Oil. categories: Hair"]
    with raises(
        RecipeError,
        Facts("unknown-name", column="index.semantic.fields", says="'category' (did you mean 'categories'?)"),
    ):
        index_of(data, fields=("category",))


@pytest.mark.parametrize(
    ("embed", "facts"),
    [
        (None, Facts("missing-value", column="embed")),
        (lambda texts: hashed(texts)[:1], Facts("defect", says="(1, 12) for 3 texts")),
        (lambda texts: hashed(texts)[0], Facts("defect", says="(12,) for 3 texts")),
        (lambda texts: hashed(texts) * np.array([[1], [np.nan], [1]]), Facts("defect", says="'b'")),
    ],
)
def test_rejects_unusable_vectors(embed: Any, facts: Facts) -> None:
    with raises(DataError, facts):
        index_of(titled(["a", "b", "c"]), embed=embed)


def test_rejects_bound_below_an_even_share() -> None:
    with raises(RecipeError, Facts("bad-value", column="index.semantic.balance", says="0.5")):
        index_of(titled(["a", "b", "c"]), balance=0.5)


@pytest.mark.parametrize("options", [{}, {"repair": "last_level"}, {"item_token": True}, {"quantizer": "rqvae"}])
def test_extension_keeps_known_codes(options: dict[str, Any]) -> None:
    if options.get("quantizer"):
        options = options | {"rqvae": {"hidden": (8,), "dim": 4, "epochs": 3}}
    index = index_of(titled([f"t{n}" for n in range(40)]), codes=16, **options)
    new = {f"n{n:02d}": Item(item_id=f"n{n:02d}", title=f"t{n % 45}") for n in range(90)}
    more = index.extend(new, embed=hashed)
    assert all(more.codes[item] == pieces for item, pieces in index.codes.items())
    assert len({*more.codes.values()}) == 130 and {len(p) for p in more.codes.values()} == {len(index.codes["i000"])}
    fresh = more.tokens[len(index.tokens) :]
    assert fresh == (tuple(item_token(n) for n in range(40, 130)) if options.get("item_token") else ())
    # One item at a time gives the same codes.
    single = index
    for name, item in new.items():
        single = single.extend({name: item}, embed=hashed)
    assert single.codes == more.codes


def test_extension_takes_the_next_count_and_then_the_nearest_code_with_room() -> None:
    index = index_of(titled(["a", "a", "a", "b", "c", "d"]), balance=0, codes=4)
    prefix = index.codes["i003"][:2]
    new = {f"n{n}": Item(item_id=f"n{n}", title="b") for n in range(3)}
    more = index.extend(new, embed=hashed)
    assert [more.codes[f"n{n}"] for n in range(2)] == [(*prefix, level_token(2, n)) for n in (1, 2)]
    # All counter tokens of this code are in use; the first token is kept.
    assert more.codes["n2"][0] == prefix[0] and more.codes["n2"][1] != prefix[1]
    x = hashed(["b"])
    x /= np.linalg.norm(x)
    first, last = index.arrays["codebooks"]
    rest = x[0] - first[int(prefix[0][3:-1])]
    by_distance = [level_token(1, int(n)) for n in np.argsort(np.square(rest - last).sum(1))]
    assert by_distance[0] == prefix[1]
    full = [piece for piece in by_distance if sum(c[:2] == (prefix[0], piece) for c in index.codes.values()) == 3]
    assert more.codes["n2"][1] == next(piece for piece in by_distance[1:] if piece not in full)


@pytest.mark.parametrize("repair", REPAIRS)
def test_rejects_extension_of_a_full_index(repair: str) -> None:
    index = index_of(titled(["a", "b", "c", "d"]), repair=repair, codes=2, levels=2, balance=2)
    new = {f"n{n:02d}": Item(item_id=f"n{n:02d}", title=str(n)) for n in range(16)}
    with raises(DataError, Facts("exhausted", says="item 'n")):
        index.extend(new, embed=hashed)


def test_rejects_extension_with_another_encoder() -> None:
    index = index_of(titled(["a", "b", "c"]))
    new = {"n": Item(item_id="n", title="b")}
    with raises(
        DataError,
        Facts("mismatch", column="index.semantic.encoder", says=("12 dimensions", "returns 5", "'all-MiniLM-L6-v2'")),
    ):
        index.extend(new, embed=lambda texts: hashed(texts, 5))
    with raises(DataError, Facts("missing-value", column="embed")):
        index.extend(new)


def test_rqvae_quantizes_encoded_vectors() -> None:
    data = titled([f"t{n}" for n in range(60)])
    index = index_of(data, quantizer="rqvae", rqvae={"hidden": (8,), "dim": 4, "epochs": 5}, codes=6)
    x = hashed([f"t{n}" for n in range(60)])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    weights = {name: array for name, array in index.arrays.items() if name != "codebooks"}
    codes = nearest_codes(encode_vectors(weights, x), index.arrays["codebooks"])
    assert index.arrays["codebooks"].shape == (2, 6, 4) and weights["encoder.0.weight"].shape == (8, 12)
    assert [pieces[:2] for pieces in index.codes.values()] == [
        (level_token(0, a), level_token(1, b)) for a, b in codes.tolist()
    ]
