"""What every index scheme guarantees: unique codes, no use of held-out data, and stable codes of known items."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from catalogues import embed, other_held_out, synthetic, trained
from hypothesis import given
from hypothesis import strategies as st

from llmrec.errors import DataError, ErrorKind
from llmrec.guard import is_item_token
from llmrec.index.table import ItemIndex, build_item_index, level_token
from llmrec.index.titles import title_key
from llmrec.recipe.schema import IndexSection
from llmrec.registry import INDEXES
from llmrec.types import Code, Item
from tests.facts import Facts, raises

SECTIONS: dict[str, dict[str, Any]] = {
    "title": {"scheme": "title"},
    "random": {"scheme": "random"},
    "sequential": {"scheme": "sequential"},
    "token": {"scheme": "token"},
    "collaborative": {"scheme": "collaborative", "collaborative": {"clusters": 3, "leaf": 6}},
    "collaborative-token": {"scheme": "collaborative", "item_token": True, "collaborative": {"clusters": 3, "leaf": 6}},
    "semantic": {"scheme": "semantic", "semantic": {"levels": 2, "codes": 5}},
    "semantic-last": {"scheme": "semantic", "semantic": {"levels": 2, "codes": 12, "repair": "last_level"}},
    "category": {"scheme": "category"},
}
# Their codes depend on the seed.
SEEDED = ("random", "token", "semantic", "semantic-last")
NEW = {
    "n1": Item(item_id="n1", title="Thing 3", fields={"categories": "Tools > Hand > Saws"}),
    "n2": Item(item_id="n2", title="A new thing", fields={"categories": "Music > Vinyl"}),
    "n3": Item(item_id="n3", title="Thing 3", fields={"categories": ""}),
}


def new_index(name: str, *, seed: int = 0, shuffle: int | None = None) -> ItemIndex:
    return build_item_index(
        IndexSection.model_validate(SECTIONS[name]), synthetic(shuffle=shuffle), seed=seed, embed=embed
    )


@cache
def index_of(name: str) -> ItemIndex:
    return new_index(name)


@pytest.fixture(params=SECTIONS, name="name")
def _name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_scheme_of_the_registry_is_tested() -> None:
    assert {section["scheme"] for section in SECTIONS.values()} == {*INDEXES} - {"external"}


def test_codes_are_unique_and_prefix_free(name: str) -> None:
    data, index = synthetic(), index_of(name)
    assert index.codes.keys() == data.dataset.items.keys()
    texts = [index.encode(item) for item in index.codes]
    assert len(set(texts)) == len(texts) == len(index.codes)
    assert all(index.decode(text) == item for item, text in zip(index.codes, texts, strict=True))
    assert index.decode("no such code") is None and index.decode("") is None
    if index.tokens:
        paths = sorted(index.codes.values())
        assert all(b[: len(a)] != a for a, b in pairwise(paths))
    ended = sorted("".join(pieces) + "\n" for pieces in index.codes.values())
    assert not any(b.startswith(a) for a, b in pairwise(ended))
    assert len(set(index.tokens)) == len(index.tokens)
    for item, pieces in index.codes.items():
        assert all(is_item_token(piece) for piece in pieces) == bool(index.tokens)
        assert set(pieces) <= set(index.tokens) or not index.tokens
        assert isinstance(index.encode(item), Code) == bool(index.tokens)


def test_codes_depend_on_data_and_seed_only(name: str) -> None:
    assert index_of(name).digest == new_index(name).digest == new_index(name, shuffle=5).digest
    if name in SEEDED:
        assert new_index(name, seed=1).codes != index_of(name).codes


def test_codes_ignore_held_out_interactions(name: str) -> None:
    section, data = IndexSection.model_validate(SECTIONS[name]), synthetic()
    other = other_held_out(data)
    assert other.test["item_id"].to_list() != data.test["item_id"].to_list()
    assert build_item_index(section, other, seed=0, embed=embed).digest == index_of(name).digest


def test_extension_keeps_known_codes(name: str) -> None:
    index = index_of(name)
    more = index.extend(NEW, embed=embed)
    assert more.codes.keys() == index.codes.keys() | NEW.keys()
    assert all(more.codes[item] == pieces for item, pieces in index.codes.items())
    assert all(more.decode(more.encode(item)) == item for item in NEW)
    assert more.tokens[: len(index.tokens)] == index.tokens
    if not (name.endswith("-token") or name == "token"):
        # A trained model has no tokens for new items.
        assert more.tokens == index.tokens
    again = more.extend({**NEW, "i001": Item(item_id="i001", title="another title")}, embed=embed)
    assert again is more or again.digest == more.digest


def test_saved_index_is_loaded_unchanged(name: str, tmp_path: Path) -> None:
    index = index_of(name)
    index.save(tmp_path / "index")
    loaded = ItemIndex.load(tmp_path / "index")
    assert loaded.digest == index.digest and loaded.figures == dict(index.figures)
    # The stored state suffices to extend the index.
    assert loaded.extend(NEW, embed=embed).codes == index.extend(NEW, embed=embed).codes
    # A pickle would run code when it is loaded.
    assert {file.suffix for file in (tmp_path / "index").iterdir()} <= {".json", ".safetensors"}
    index.save(tmp_path / "again")
    for file in (tmp_path / "index").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_decode_ignores_spaces_between_tokens() -> None:
    index = ItemIndex(
        "x", {"i": (level_token(0, 3), level_token(1, 12))}, tokens=(level_token(0, 3), level_token(1, 12))
    )
    assert index.encode("i") == "<a_3><b_12>"
    assert index.decode(" <a_3> <b_12>\n") == "i"
    assert index.decode("<a_3><b_1>") is None and index.decode("<a_3>") is None


@pytest.mark.parametrize(
    ("codes", "tokens", "kind", "says"),
    [
        ({"i": ("one  two",), "j": ("one two",)}, (), "duplicate", "'i' and 'j'"),
        ({"i": ("",)}, (), "bad-value", "item 'i'"),
        ({"i": ("a\nb",)}, (), "bad-value", "item 'i'"),
        ({"i": ("<a_1>",)}, ("<a_2>",), "bad-value", "'<a_1>' of item 'i'"),
        ({"i": ("<a_1>", "x")}, ("<a_1>",), "bad-value", "'<a_1>x' of item 'i'"),
        ({"i": ("x",)}, ("x",), "bad-value", ("'x'", "<a_12>")),
    ],
)
def test_rejects_ambiguous_codes(
    codes: dict[str, tuple[str, ...]], tokens: tuple[str, ...], kind: ErrorKind, says: str | tuple[str, ...]
) -> None:
    with raises(DataError, Facts(kind, says=says)):
        ItemIndex("x", codes, tokens=tokens)


def test_unknown_item_names_the_closest_one() -> None:
    with raises(DataError, Facts("unknown-name", says=("'i00' (did you mean 'i0", "extend()"))):
        index_of("random").encode("i00")


@pytest.mark.parametrize(
    ("content", "kind"),
    [("{", "damaged"), ('{"format": 9}', "wrong-format"), ('{"format": 1, "scheme": "x", "codes": 3}', "damaged")],
)
def test_rejects_damaged_or_foreign_files(tmp_path: Path, content: str, kind: ErrorKind) -> None:
    (tmp_path / "index.json").write_text(content, encoding="utf-8")
    with raises(DataError, Facts(kind, "index.json", says="build the index again")):
        ItemIndex.load(tmp_path)
    with raises(DataError, Facts("missing-file", "nowhere", says="`llmrec index`")):
        ItemIndex.load(tmp_path / "nowhere")


def test_rejects_stored_codes_without_tokens(tmp_path: Path) -> None:
    ItemIndex("external", {"i": ("<a_0>",)}, tokens=("<a_0>",)).save(tmp_path / "index")
    file = tmp_path / "index" / "index.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"codes": {"i": ["<a_1>"]}}), encoding="utf-8")
    with raises(DataError, Facts("bad-value", file, says="build the index again")):
        ItemIndex.load(tmp_path / "index")


@given(
    titles=st.lists(
        st.one_of(st.sampled_from(["Alien", "alien!", "Alien (2)", "", "<a_1>", "\u202e"]), st.text(max_size=12)),
        min_size=1,
        max_size=12,
    )
)
def test_any_titles_get_different_codes(titles: list[str]) -> None:
    items = {str(n): Item(item_id=str(n), title=title) for n, title in enumerate(titles)}
    index = build_item_index(IndexSection(), trained([], items), seed=0)
    assert len({title_key(index.encode(item)) for item in items}) == len(items)
    assert all(index.decode(index.encode(item)) == item for item in items)
    half = dict(list(items.items())[: len(items) // 2])
    rest = dict(list(items.items())[len(items) // 2 :])
    grown = ItemIndex("title", {}).extend(half).extend(rest)
    assert len({title_key(grown.encode(item)) for item in items}) == len(items)
