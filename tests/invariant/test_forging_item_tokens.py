"""Only codes produce item tokens; titles, fields, reviews and profiles cannot."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.encode import Encoder
from llmrec.data.dataset import Dataset
from llmrec.data.split import split_dataset
from llmrec.guard import break_item_tokens, is_item_token
from llmrec.index.table import ItemIndex, item_token, level_token, user_token
from llmrec.models.item_tokens import add_item_tokens
from llmrec.prompts.template import Template, load_templates
from llmrec.recipe.schema import SequentialSection, Split
from llmrec.tasks.sequential import SequentialTask
from llmrec.types import Code, Item, Request
from tests.conftest import make_tokenizer
from tests.tasks.making import make

TOKENS = (
    *(level_token(level, n) for level in range(3) for n in range(4)),
    *(name(n) for name in (item_token, user_token) for n in range(4)),
)
SPELT = (
    "<a_1>", "x<a_1>y", "<a_1><b_2>", "< <a_1>", "<item_3>", "<A_1>", "＜a_1＞", "<\u200ba_1>", "<a\u0301_1>", "<a_1",
    "<", "<a", "<a_", "<item", "<item_", "<it", "a_1>", "_1>", "1>", "<<a_1>>", "<a_1 >", "≮a_1>",
    "<user_3>", "<USER_3>", "<us", "<use", "<user", "<user_", "ser_3>", "er_3>", "_3>",
)  # fmt: skip


@pytest.fixture(scope="module", name="encoder")
def _encoder() -> Encoder:
    tokenizer = make_tokenizer()
    add_item_tokens(tokenizer, TOKENS)
    return Encoder(tokenizer, max_length=10**6)


def ids_of(encoder: Encoder) -> set[int]:
    return {int(i) for i in encoder.tokenizer.convert_tokens_to_ids(list(TOKENS))}


def rendered(encoder: Encoder, template: Template, values: dict[str, object]) -> list[int]:
    return [*encoder.chat(template.turns(values)), *encoder.piece(template.answer(values))]


@pytest.mark.parametrize("text", SPELT)
def test_data_never_becomes_an_item_token(text: str, encoder: Encoder) -> None:
    template = Template(
        family="x", name="x", version=1, use="seen", shape="chat", user="{{ a }}{{ b }} and {{ a }}", target="{{ b }}"
    )
    for first in SPELT:
        ids = rendered(encoder, template, {"a": first, "b": text})
        assert not ids_of(encoder) & set(ids), (first, text)


@given(
    st.lists(
        st.sampled_from([*SPELT, "<", ">", "_", "a", "1", "item", "user", " ", "\u0301", "\u200b", "｜"]), max_size=8
    )
)
def test_adjacent_values_never_form_an_item_token(parts: list[str]) -> None:
    for cut in range(len(parts) + 1):
        one, two = break_item_tokens("".join(parts[:cut])), break_item_tokens("".join(parts[cut:]))
        joined = one + two
        assert not any(name in joined for name in TOKENS)
        assert break_item_tokens(one) == one


def test_code_is_written_as_its_tokens(encoder: Encoder) -> None:
    template = Template(
        family="x", name="x", version=1, use="seen", shape="chat", user="{{ a }}", target="{{ item.code }}"
    )
    ids = rendered(encoder, template, {"a": "<a_1>", "item": {"code": Code("<a_1><b_2>"), "title": "<c_3>"}})
    expected = encoder.tokenizer.convert_tokens_to_ids(["<a_1>", "<b_2>"])
    assert [i for i in ids if i in ids_of(encoder)] == expected
    # Plain data with the same text is not a code.
    plain = rendered(encoder, template, {"a": "x", "item": {"code": "<a_1><b_2>", "title": ""}})
    assert not ids_of(encoder) & set(plain)


def test_ordinary_titles_are_unchanged() -> None:
    for title in ("I <3 you", "a < b > c", "<b>bold</b>", "5 > 3", "Heat (1995)", "<3", "x <- y"):
        assert break_item_tokens(title) == title


@pytest.mark.parametrize("name", ["continue-codes", "next-code", "profile-list"])
def test_task_writes_only_its_codes(name: str, encoder: Encoder) -> None:
    """Titles, fields and profiles contain tokens as text, and the same prompt has real codes."""
    items = {f"i{n}": Item(item_id=f"i{n}", title=f"{SPELT[n]} {n}", fields={"kind": SPELT[-n]}) for n in range(8)}
    rows = [(f"u{u}", f"i{(u + n) % 8}", float(n)) for u in range(4) for n in range(6)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    users = {f"u{u}": {"about": f"likes <a_{u}> and <item_{u}>"} for u in range(4)}
    data = split_dataset(Dataset("forged", "<a_1> things", frame, items, users), Split(), seed=0)
    codes = {f"i{n}": (level_token(0, n % 4), level_token(1, n // 4)) for n in range(8)}
    index = ItemIndex("x", codes, tokens=TOKENS)
    task = make(SequentialTask, data, SequentialSection(), load_templates("sequential"), seed=0, index=index)
    known: list[Any] = [encoder.tokenizer.convert_tokens_to_ids(list(codes[f"i{n}"])) for n in range(8)]
    for case in task.cases("test"):
        request = Request(
            id=case.request.id, user_id=case.request.user_id, history=case.request.history, context={"profile": "<b_2>"}
        )
        prompt = task.prompt(request, template=name)
        shown = [i for i in encoder.prompt(prompt) if i in ids_of(encoder)]
        coded = load_templates("sequential")[name].writes_codes
        expected = [i for event in request.history for i in known[int(event.item_id[1:])]] if coded else []
        assert shown == expected
        for item, text in zip(task.catalogue, task.continuations(request, template=name), strict=True):
            tail = [i for i in encoder.continuation(prompt, text, closed=True) if i in ids_of(encoder)]
            assert tail == (known[int(item[1:])] if coded else [])


def test_pattern_matches_tokens_of_indexes() -> None:
    assert all(map(is_item_token, TOKENS))
    assert not any(map(is_item_token, ("<a>", "<a_>", "<_1>", "a_1", "<ab_1>", "<items_1>", "<|a_1|>", "<a_1> ", "")))
