"""Numbers as tokens of a fixed number of digits, and tokens of users, as P5 and OpenP5 use them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmrec.errors import DataError
from llmrec.guard import is_item_token
from llmrec.index.numbers import user_tokens
from llmrec.index.table import ItemIndex, build_item_index, item_token, user_token
from llmrec.pipeline.indexing import build_index
from llmrec.recipe.schema import IndexSection
from llmrec.types import Code, Item
from tests.facts import Facts, raises
from tests.index.test_index_plain import histories


def test_numbers_are_split_into_tokens_of_digits() -> None:
    data = histories("abcxy", "bcdxz", "aedxy")
    text = build_item_index(IndexSection(scheme="sequential"), data, seed=0)
    cut = build_item_index(IndexSection(scheme="sequential", digits=2), data, seed=0)
    assert text.codes["a"] == ("1001",) and cut.codes["a"] == ("<a_10>", "<b_1>")
    for item, (number,) in text.codes.items():
        assert cut.codes[item] == (f"<a_{int(number[:2])}>", f"<b_{int(number[2:])}>")
        assert isinstance(cut.encode(item), Code) and not isinstance(text.encode(item), Code)
        assert cut.decode(cut.encode(item)) == item
    assert len(cut.tokens) == 200
    thirds = build_item_index(IndexSection(scheme="random", digits=3, first=998), data, seed=0)
    # Numbers from 998 to 1005: the longest has four digits, so each has two tokens, the first with leading zeros.
    assert {pieces[0] for pieces in thirds.codes.values()} == {"<a_0>", "<a_1>"}
    assert {len(pieces) for pieces in thirds.codes.values()} == {2}


def test_extension_takes_the_next_numbers_until_none_is_left() -> None:
    data = histories("abcxy", "bcdxz", "aedxy")
    index = build_item_index(IndexSection(scheme="random", digits=1, first=1), data, seed=0)
    assert len(index.codes) == 8 and index.tokens == tuple(f"<a_{n}>" for n in range(10))
    one = index.extend({"new": Item(item_id="new", title="new")})
    assert one.codes["new"] == ("<a_9>",) and one.tokens == index.tokens
    with raises(DataError, Facts("exhausted", says=("1 more items, numbered from 10", "1 tokens of 1 digits"))):
        one.extend({"newer": Item(item_id="newer", title="newer")})


def test_digits_need_a_scheme_with_numbers() -> None:
    with pytest.raises(ValidationError, match=r"index\.digits: the scheme 'token' has no numbers"):
        IndexSection(scheme="token", digits=2)


def test_training_users_have_tokens_that_are_saved(tmp_path: Path) -> None:
    data = histories("abcxy", "bcdxz", "aedxy")
    plain = build_index(IndexSection(scheme="token"), data, seed=0)
    index = build_index(IndexSection(scheme="token", ids="tokens"), data, seed=0)
    users = set(data.train["user_id"].to_list())
    assert set(index.users) == users and plain.users == {}
    assert sorted(index.users.values()) == sorted(user_token(n) for n in range(len(users)))
    assert index.vocabulary == (*index.tokens, *index.users.values()) and index.codes == plain.codes
    assert index.digest != plain.digest
    index.save(tmp_path / "index")
    again = ItemIndex.load(tmp_path / "index")
    assert again.users == index.users and again.digest == index.digest
    more = again.extend({"new": Item(item_id="new", title="new")})
    assert more.users == index.users and more.writes_ids and not plain.writes_ids
    numbered = build_index(IndexSection(scheme="random", ids="codes"), data, seed=0)
    assert numbered.writes_ids and not numbered.users and not numbered.vocabulary


def test_user_tokens_do_not_depend_on_order() -> None:
    assert user_tokens(["u2", "u1", "u3"], 0) == user_tokens(["u3", "u2", "u1"], 0)
    many = [f"u{n}" for n in range(50)]
    assert user_tokens(many, 0) != user_tokens(many, 1)
    assert all(map(is_item_token, user_tokens(many, 0).values()))


def test_reads_folders_without_users(tmp_path: Path) -> None:
    index = ItemIndex("token", {"a": (item_token(0),)}, tokens=(item_token(0),))
    index.save(tmp_path / "index")
    file = tmp_path / "index" / "index.json"
    content = json.loads(file.read_text())
    assert content.pop("users") == {} and content.pop("writes_ids") is False
    file.write_text(json.dumps(content))
    assert ItemIndex.load(tmp_path / "index").digest == index.digest


def test_rejects_duplicate_user_tokens() -> None:
    index = ItemIndex("token", {"a": (item_token(0),)}, tokens=(item_token(0),))
    for users in ({"u": user_token(0), "v": user_token(0)}, {"u": item_token(0)}):
        with raises(DataError, Facts("duplicate")):
            replace(index, users=users)
    with raises(DataError, Facts("bad-value", says=("'u'", "<a_12>"))):
        replace(index, users={"u": "u"})
