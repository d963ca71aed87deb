"""Data never become control tokens: 500 payloads, in every field, through every template and tokenizer family.

``LLMREC_EXHAUSTIVE=1`` runs all combinations of payloads, tokenizers and templates instead of a share.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from forging_cases import (
    COUNT,
    FAMILIES,
    USERS,
    asking,
    cases,
    dataset,
    halves,
    ordinary_titles,
    payloads,
    prompt,
    rows,
    same_places,
    scaffold,
    shown,
)
from tokenizer_families import FAMILIES as TOKENIZERS
from tokenizer_families import all_tokens, tokenizer_of

import llmrec
from llmrec import guard
from llmrec.backends.encode import Encoder
from llmrec.guard import clean, control_tokens, neutralise
from llmrec.models.load import load_tokenizer, resolve_model_folder
from llmrec.recipe.schema import ModelSection
from llmrec.types import Message, Prompt, Role, Segment
from tests.facts import Facts, raises

EXHAUSTIVE = bool(os.environ.get("LLMREC_EXHAUSTIVE"))
PACKAGE = Path(llmrec.__file__).parent
NAMES = [
    *((family.name, family.name) for family in TOKENIZERS),
    ("tiny", "tiny"),
    pytest.param("smollm2", "smollm2", marks=pytest.mark.model),
]
Question = tuple[Prompt, tuple[str, ...]]


_ENCODERS: dict[str, Encoder] = {}


@pytest.fixture
def encoder(request: pytest.FixtureRequest) -> Encoder:
    name = request.param
    if name not in _ENCODERS:
        _ENCODERS[name] = Encoder(_tokenizer(name, request), max_length=10**9)
    return _ENCODERS[name]


def _tokenizer(name: str, request: pytest.FixtureRequest) -> Any:
    if name == "tiny":
        folder = str(request.getfixturevalue("llama_folder"))
        return load_tokenizer(folder, ModelSection(name=folder))
    if name == "smollm2":
        return load_tokenizer(resolve_model_folder(ModelSection()), ModelSection())
    return tokenizer_of(name)


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Return all added tokens except white space, words, symbols and the unknown token, without using Encoder."""
    unknown = tokenizer.unk_token
    if unknown in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token):
        unknown = None
    return frozenset(
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if len(token.content.strip()) > 1
        and (token.special or (token.content[0] in "<[|" and token.content[-1] in ">]|"))
        and token.content != unknown
    )


def marks(tokenizer: Any, ids: Any) -> tuple[int, ...]:
    known = control_ids_of(tokenizer)
    return tuple(number for number in ids if number in known)


_KNOWN: dict[int, frozenset[int]] = {}


def control_ids_of(tokenizer: Any) -> frozenset[int]:
    if id(tokenizer) not in _KNOWN:
        _KNOWN[id(tokenizer)] = control_ids(tokenizer)
    return _KNOWN[id(tokenizer)]


every_tokenizer = pytest.mark.parametrize(("encoder", "name"), NAMES, indirect=["encoder"])
every_template = [(family, name) for family in FAMILIES for name in asking(family)]


def _messages(roles: tuple[Role, ...], text: str) -> tuple[Message, ...]:
    return tuple(Message(role, (Segment("text", "Say "), Segment("item", text))) for role in roles)


# --------------------------------------------------------------------------- the payloads


def test_payloads_contain_every_control_token() -> None:
    assert len(payloads()) == len(set(payloads())) == COUNT == 500
    assert set(all_tokens()) <= set(payloads())


@every_tokenizer
def test_each_payload_in_a_conversation(encoder: Encoder, name: str) -> None:
    """Payloads are the text of each role, the start of an answer, and a candidate."""
    roles: tuple[Role, ...] = ("system", "user", "assistant", "user")
    tokenizer = encoder.tokenizer
    expected = marks(tokenizer, encoder.chat(_messages(roles, "x")))
    for text in payloads():
        for data in (clean(text, 2000), text):
            assert marks(tokenizer, encoder.chat(_messages(roles, data))) == expected, repr(text)
            assert not marks(tokenizer, encoder.piece(data)), repr(text)


@every_tokenizer
def test_token_split_over_two_segments(encoder: Encoder, name: str) -> None:
    roles: tuple[Role, ...] = ("user",)
    expected = marks(encoder.tokenizer, encoder.chat(_messages(roles, "x")))
    for left, right in halves():
        for between in ("", " ", "\n", "\u200b"):
            both = (Segment("item", left), Segment("text", between), Segment("item", right))
            ids = encoder.chat((Message("user", both),))
            assert marks(encoder.tokenizer, ids) == expected, (left, between, right)
        ids = encoder.prompt(Prompt(messages=_messages(roles, left), answer_prefix=(Segment("item", right),)))
        assert marks(encoder.tokenizer, ids) == expected, (left, right)


# --------------------------------------------------------------------------- through the templates


def _users(tokenizer_name: str, family: str, template: str, fill: str) -> range:
    """Return the users of a tokenizer and template. Over all tokenizers, every task has every user in both fills."""
    names = [family.name for family in TOKENIZERS] + ["tiny", "smollm2"]
    known = list(asking(family))
    one, other = names.index(tokenizer_name), known.index(template)
    if EXHAUSTIVE:
        return range(USERS)
    if (one + other) % 2 == (fill == "full"):
        return range(0)
    share = len(TOKENIZERS) * len(known) // 2
    return range((one * len(known) + other) // 2 % share, USERS, share)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_task_shows_every_payload(family: str) -> None:
    built = [each.name for each in TOKENIZERS]
    for fill in ("full", "split"):
        seen = {user for name in built for template in asking(family) for user in _users(name, family, template, fill)}
        assert seen == set(range(USERS))
    titled = {number for name in asking(family) for number in shown(family, name, "full")}
    everything = {number for number in range(COUNT) if clean(payloads()[number])}
    # A prompt about a review shows one item and one text, without a history.
    assert titled == everything if family not in ("review", "stars") else len(titled & everything) > USERS
    held = dataset("full").dataset
    assert set(held.interactions["text"]) >= {text for text in payloads() if clean(text)}
    assert len(held.users) == len(cases(family, "full")) == USERS and len(held.items) == COUNT


def _compare(encoder: Encoder, hostile: Question, plain: Question) -> None:
    """Compare a hostile and a harmless prompt of a user: ids, text and candidates."""
    tokenizer = encoder.tokenizer
    control = [tokenizer.convert_ids_to_tokens(i) for i in control_ids_of(tokenizer)]
    ids, written = encoder.prompt(hostile[0]), encoder.text(hostile[0])
    expected = marks(tokenizer, encoder.prompt(plain[0]))
    assert marks(tokenizer, ids) == expected, written
    assert marks(tokenizer, tokenizer.encode(written, add_special_tokens=False)) == expected, written
    assert same_places(scaffold(written, control), scaffold(encoder.text(plain[0]), control)), written
    for closed in (False, True):
        tails = encoder.continuations(hostile[0], ids, hostile[1], closed=closed)
        others = encoder.continuations(plain[0], ids, plain[1], closed=closed)
        assert [marks(tokenizer, tail) for tail in tails] == [marks(tokenizer, tail) for tail in others], written


@every_tokenizer
@pytest.mark.parametrize("fill", ["full", "split"])
def test_templates_write_the_same_control_tokens_for_hostile_data(encoder: Encoder, name: str, fill: str) -> None:
    for number, (family, template) in enumerate(every_template):
        for shots in (0, 2) if EXHAUSTIVE else (2 * (number % 2),):
            for user in _users(name, family, template, fill):
                hostile = prompt(family, template, fill, shots, user)
                _compare(encoder, hostile, prompt(family, template, "harmless", shots, user))


@every_tokenizer
@pytest.mark.parametrize("family", FAMILIES)
def test_training_rows_have_the_control_tokens_of_harmless_rows(encoder: Encoder, name: str, family: str) -> None:
    count = 400 if EXHAUSTIVE else 12
    for fill in ("full", "split"):
        for hostile, plain in zip(rows(family, fill, count), rows(family, "harmless", count), strict=True):
            assert hostile.template == plain.template
            row = encoder.row(hostile)
            assert marks(encoder.tokenizer, row.ids) == marks(encoder.tokenizer, encoder.row(plain).ids), hostile
            learned = [i for i in row.labels if i >= 0]
            assert set(marks(encoder.tokenizer, learned)) <= {encoder.end_id}


# --------------------------------------------------------------------------- which tokens are control


def test_control_tokens_among_added_tokens() -> None:
    """Tags of chat formats are control tokens; line breaks, spaces, words and symbols are text."""
    qwen, gemma, odd = (Encoder(tokenizer_of(name), max_length=999) for name in ("qwen", "gemma", "odd"))
    assert {"<think>", "</think>", "<tool_call>", "<|fim_prefix|>"} <= set(qwen.control)
    assert {"<table>", "[multimodal]", "<unused7>", "<start_of_turn>"} <= set(gemma.control)
    assert not any(not token.strip("\n ▁") for token in gemma.control)
    assert {"Human:", "eng_Latn", "<tool>", "|||X|||", "<用户>"} <= set(odd.control)
    assert not {"\n\n", "    ", "\t", "ordinary", "=>", "!!"} & set(odd.control)
    for encoder in (qwen, gemma, odd):
        assert not marks(encoder.tokenizer, encoder.piece("an <b>ordinary</b> =>    line!! <think>\n\n"))


def test_white_space_tokens_are_kept() -> None:
    gemma = Encoder(tokenizer_of("gemma"), max_length=999)
    assert gemma.tokenizer.convert_tokens_to_ids("\n\n") in gemma.chat(_messages(("user",), "a\n\nb"))


@pytest.mark.parametrize("name", ["bert", "t5", "llama-2", "odd"])
def test_unknown_letters_are_accepted(name: str) -> None:
    """They are encoded as a special token."""
    encoder = Encoder(tokenizer_of(name), max_length=999)
    for title in ("千と千尋の神隠し", "Amélie 👍", "Сталкер"):
        assert encoder.piece(title)
        assert encoder.chat(_messages(("user",), title))


def test_rejects_control_token_that_is_a_word() -> None:
    tokenizer = tokenizer_of("qwen").__class__(tokenizer_object=tokenizer_of("qwen").backend_tokenizer, eos_token="END")
    encoder = Encoder(tokenizer, max_length=999)
    assert neutralise("THE END", encoder.control) == "THE END"
    with raises(llmrec.errors.BackendError, Facts("unsafe", says="'THE END'")):
        encoder.piece("THE END")


# --------------------------------------------------------------------------- ordinary text


def test_ordinary_titles_are_unchanged() -> None:
    """At least 99.9 % of titles, with the control tokens of all families at once."""
    control = tuple(
        dict.fromkeys(t for family in TOKENIZERS for t in Encoder(tokenizer_of(family.name), max_length=9).control)
    )
    changed = [
        title for title in ordinary_titles(10_000) if neutralise(clean(title), control) != " ".join(title.split())
    ]
    assert len(changed) <= 10, changed


def test_invisible_joiners_are_removed() -> None:
    assert clean("👨\u200d👩\u200d👧 Family") == "👨👩👧 Family"
    assert clean("می\u200cخواهم") == "میخواهم"
    assert clean("❤️ 👍🏽") == "❤️ 👍🏽"


@pytest.mark.parametrize(
    "part",
    [
        "<", "<|", "<|im_", "<|im_end|>", "<unused1", "<s>", "＜ｓ＞", "<\u0301s\u0301>", " ", "《千》<", "\u200b", "|",
        "[INST", "<extra_id_", ">>QUESTION", "a",
    ],
    ids=lambda text: text.encode("unicode_escape").decode(),
)  # fmt: skip
def test_neutralising_takes_few_rounds(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = part * (200_000 // len(part))
    rounds: list[int] = []
    breaks = guard._break_positions

    def counted(seen: str, control: Any) -> list[int]:
        rounds.append(len(seen))
        return breaks(seen, control)

    monkeypatch.setattr(guard, "_break_positions", counted)
    control = ("<|im_start|>", "<|im_end|>", "[INST]", *(f"<unused{n}>" for n in range(6000)))
    broken = neutralise(text, control)
    assert len(rounds) <= 3 and max(rounds, default=0) <= 2 * len(text)
    assert len(clean(text, 1000)) <= 1000
    assert neutralise(broken, control) == broken


# --------------------------------------------------------------------------- all text passes the guard

# The others write the example of a model card, encode words for embeddings or new tokens, or create a tokenizer.
TOKENISING = {
    *("backends/encode.py", "exports/card.py", "exports/card_facts.py"),
    *("models/text_encoder.py", "models/item_tokens.py", "models/load.py"),
}
CALLS = re.compile(
    r"(?<!def )\b(?:apply_chat_template|(?:batch_)?encode_plus|encode_batch|build_inputs_with_special_tokens)\("
    r"|(?<!def )\btokenize\(|tokenizer\.(?:encode|__call__|prepare_for_model)\(|(?<!def )\b_?[Tt]okenizer\("
)


def test_only_the_encoder_tokenises_text() -> None:
    calling = {
        name
        for file in PACKAGE.rglob("*.py")
        if CALLS.search(file.read_text(encoding="utf-8")) and (name := file.relative_to(PACKAGE).as_posix())
    }
    assert "backends/encode.py" in calling and calling <= TOKENISING, calling - TOKENISING


# All but the first two add an answer or texts to a written prompt, check it, or send a fixed one.
PROMPTING = {
    *("prompts/template.py", "prompts/values.py", "tasks/rows.py", "backends/encode.py", "backends/server/probe.py"),
    *("pipeline/leaks.py", "strategies/rounds.py", "train/reward/rewards.py"),
}


def test_only_known_modules_write_prompts() -> None:
    made = re.compile(r"(?<![\w.])(?:Segment|Message)\(")
    writing = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if file.name != "types.py" and made.search(file.read_text(encoding="utf-8"))
    }
    assert "prompts/template.py" in writing and writing <= PROMPTING, writing - PROMPTING


def test_engines_get_token_ids_instead_of_text() -> None:
    asked = re.compile(r"\.chat\(|\.completions\b")
    sending = {
        file.relative_to(PACKAGE).as_posix()
        for file in (PACKAGE / "backends").rglob("*.py")
        if asked.search(file.read_text(encoding="utf-8"))
    }
    assert sending <= {"backends/encode.py"}, sending


def test_control_tokens_of_any_tokenizer() -> None:
    for family in TOKENIZERS:
        tokenizer = tokenizer_of(family.name)
        control = control_tokens(tokenizer.all_special_tokens, tokenizer.added_tokens_decoder.values())
        assert set(control_ids_of(tokenizer)) <= set(tokenizer.convert_tokens_to_ids(list(control)))
