"""Protects prompts from injection by data: `clean` for lines and template syntax, `neutralise` for control tokens.

A tokenizer may normalise text before it matches its added tokens: full-width letters become ASCII, accents and
invisible characters are removed, capitals become lower case. So tokens are matched in a *view* of the text with all
these normalisations, and a space is inserted into the text where the view has a token.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Protocol, TypeAlias

TITLE_LIMIT = 300
TEXT_LIMIT = 1000

# Longer texts are not cached, because a catalogue of long reviews would fill the memory.
_MAX_CACHED_CHARACTERS = 2000
# Maximum number of combining marks on a letter; a text with more may be cut anywhere.
_MAX_MARKS = 32
# a flag is a pair of these characters
_FLAGS = "".join(map(chr, range(0x1F1E6, 0x1F200)))
# A token is broken at its start, so the rest of a long token is not compared.
_MAX_COMPARED_CHARACTERS = 64

_BRACKETS = "<>[]|{}⟨⟩«»【】〈〉《》"
# Characters that compatibility normalisation turns into an ASCII bracket.
_LOOKALIKES = "≮≯︷︸﹇﹈﹛﹜﹤﹥＜＞［］｛｜｝"
_ANY_BRACKET = re.compile(f"[{re.escape(_BRACKETS + _LOOKALIKES)}]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
# Half a marker is broken too, so that two adjacent fields cannot form a complete one.
_HALF_MARKERS = re.compile(r"(?<=[<＜])(?=[|｜])|(?<=[|｜])(?=[>＞])")
# Control tokens of common tokenizers. The current model adds its own, but a text may target another model.
_KNOWN_TOKENS = (
    *("<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<cls>", "<sep>", "<sop>", "<eop>", "<eod>"),
    *("[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "[BOS]", "[EOS]", "[gMASK]", "[sMASK]"),
    *("<BOS_TOKEN>", "<EOS_TOKEN>", "<EOP_TOKEN>", "<MASK_TOKEN>", "<PAD>", "<UNK>", "<CLS>", "<SEP>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[ARGS]"),
    *("[TOOL_CONTENT]", "[CALL_ID]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
    *("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<think>", "</think>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<begin_of_text>", "<end_of_text>"),
    *("<tools>", "</tools>", "<tool_calls>", "</tool_calls>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "[im_start]", "[im_end]"),
)
_KNOWN_PATTERNS = (
    *(r"<extra_id_[0-9]+>", r"<unused_?[0-9]+>", r"<reserved_[0-9]+>", r"<SPECIAL_[0-9]+>", r"<0x[0-9A-Fa-f]{2}>"),
    *(r"\[control_[0-9]+\]", r"\[unused[0-9]+\]", r"\[UNUSED_TOKEN_[0-9]+\]", r"\|\|\|[A-Z_]+\|\|\|"),
    r">>(?:TITLE|ABSTRACT|INTRODUCTION|SUMMARY|COMMENT|ANSWER|QUESTION|DOMAIN|PREFIX|SUFFIX|MIDDLE)<<",
)


# Tokens that an item index adds to a vocabulary: `<a_12>` for a code, `<item_12>` for an item, `<user_12>` for a user.
_ITEM_TOKEN = re.compile(r"<(?:[a-z]|item|user)_[0-9]+>")
# Such a token in a text, or its beginning at the end of a text, which the following text could complete.
_ITEM_TOKEN_START = re.compile(
    r"<(?=(?:[a-z]|item|user)_[0-9]+>|\Z|(?:[a-z]|it|ite|item|us|use|user)(?:_[0-9]*)?\s*\Z)"
)


class AddedToken(Protocol):
    """A token that a tokenizer adds to the vocabulary of its model."""

    content: str
    special: bool


# --------------------------------------------------------------------------- one line


def clean(text: str, limit: int = TITLE_LIMIT) -> str:
    """Return a data text on one line.

    Line breaks and other white space become single spaces. Control, zero-width, bidirectional, surrogate and
    private-use characters are dropped. Text longer than ``limit`` characters is cut, but never between a letter and
    its marks, an emoji and its skin tone, or the halves of a flag. The operation is idempotent.
    """
    return _clean_cached(text, limit) if len(text) <= _MAX_CACHED_CHARACTERS else _clean(text, limit)


def _clean(text: str, limit: int) -> str:
    if not text.isprintable():
        text = "".join(character for character in text if character.isspace() or _is_kept(character))
    line = " ".join(text.split())
    return shorten_at_grapheme(line, limit)


def shorten_at_grapheme(text: str, limit: int) -> str:
    """Return the first ``limit`` characters of a text, or slightly fewer to keep grapheme clusters whole."""
    if len(text) <= limit:
        return text
    least = max(limit - _MAX_MARKS, 1)
    return text[: next((at for at in range(limit, least - 1, -1) if not _continues_grapheme(text, at)), limit)].rstrip()


def _continues_grapheme(line: str, at: int) -> bool:
    """Whether a character continues the previous grapheme cluster (UAX 29)."""
    here, before = ord(line[at]), ord(line[at - 1])
    if unicodedata.category(line[at]).startswith("M") or 0x1F3FB <= here <= 0x1F3FF or 0x200D in (here, before):
        return True
    if 0x1160 <= here <= 0x11FF:  # a vowel or final consonant of a decomposed Korean syllable
        return 0x1100 <= before <= 0x11FF
    flags = line[:at]
    return line[at] in _FLAGS and (len(flags) - len(flags.rstrip(_FLAGS))) % 2 == 1


_clean_cached = lru_cache(maxsize=65536)(_clean)


@cache
def _is_kept(character: str) -> bool:
    if unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs"):
        return False
    return ord(character) & 0xFFFE != 0xFFFE and not 0xFDD0 <= ord(character) <= 0xFDEF


# --------------------------------------------------------------------------- control tokens


def control_tokens(special: Iterable[str], added: Iterable[AddedToken]) -> tuple[str, ...]:
    """Return the tokens of a tokenizer that data texts must not contain.

    These are the special tokens and further added tokens in brackets, such as ``<think>`` or ``<tool_call>``, which
    have a meaning in chat formats. Other added tokens are ordinary text: line breaks, runs of spaces, words. So is a
    token of one character, which texts cannot avoid.

    Args:
        special: The tokenizer's special tokens.
        added: All tokens that it adds to its model's vocabulary.
    """
    names = {*special, *(token.content for token in added if token.special or _is_bracketed(token.content.strip()))}
    return tuple(sorted(name for name in names if len(name.strip()) > 1 and not is_item_token(name)))


def is_item_token(text: str) -> bool:
    """Whether a text is a token of an item index, such as ``<a_12>``, ``<item_12>`` or ``<user_12>``."""
    return _ITEM_TOKEN.fullmatch(text) is not None


def break_item_tokens(text: str) -> str:
    """Break item tokens in a text by a space after the bracket, including an incomplete token at its end.

    Tokens are found in any case, in compatibility letters, and with accents or invisible characters among their
    letters. The operation is idempotent.
    """
    if not _ANY_BRACKET.search(text):
        return text
    origins = _source_indices(text, _folded_view)
    positions = sorted({origins[match.start()] + 1 for match in _ITEM_TOKEN_START.finditer(_folded_view(text))})
    return " ".join(text[start:end] for start, end in zip([0, *positions], [*positions, len(text)], strict=True))


def _is_bracketed(token: str) -> bool:
    brackets = bool(_ANY_BRACKET.match(token) and _ANY_BRACKET.match(token[-1]))
    return brackets and any(character.isalnum() for character in token)


def neutralise(text: str, control: Sequence[str]) -> str:
    """Break control tokens in a text by a space after the opening bracket.

    The beginning of a token at the end of the text is broken too: the chat template's next text could complete it.
    Tokens of ``control`` are found in any case, in compatibility letters, and with accents or invisible characters
    among their letters; those of other common tokenizers are found too, but not in another case.

    Args:
        text: Any text.
        control: The tokenizer's `control_tokens`. Tokens of letters only are ordinary words and unchanged, so the ids
            must be checked after tokenisation.

    Returns:
        The text, unchanged if it contains none of them. The operation is idempotent.
    """
    tokens = _compile_control_tokens(tuple(control))
    if tokens.bracketed and not _ANY_BRACKET.search(text):
        return text
    text = _HALF_MARKERS.sub(" ", text)
    # A space that breaks one token may complete another that contains a space, so repeat. Each round lengthens a run
    # of spaces, and tokens have finite runs, so the loop ends.
    while positions := _break_positions(text, tokens):
        text = " ".join(text[start:end] for start, end in zip([0, *positions], [*positions, len(text)], strict=True))
    return text


@dataclass(frozen=True)
class _ControlTokens:
    """The control tokens of a tokenizer: ASCII tokens, other tokens, and whether all of them contain a bracket.

    Each has a pattern for whole tokens, and one for the beginning of a token at the end of a text.
    """

    plain: re.Pattern[str] | None
    plain_end: re.Pattern[str] | None
    other: re.Pattern[str] | None
    other_end: re.Pattern[str] | None
    bracketed: bool


@lru_cache(maxsize=64)
def _compile_control_tokens(control: tuple[str, ...]) -> _ControlTokens:
    folded = {_folded_view(token).strip() for token in control}
    words = {word for word in folded if len(word) > 1 and not word.isalpha()}
    plain = {word for word in words if word.isascii()}
    return _ControlTokens(
        plain=_any_word_pattern(plain),
        plain_end=_incomplete_word_pattern(plain),
        other=_any_word_pattern(words - plain),
        other_end=_incomplete_word_pattern(words - plain),
        bracketed=all(_ANY_BRACKET.search(word) for word in words),
    )


def _any_word_pattern(words: Iterable[str], *patterns: str) -> re.Pattern[str] | None:
    """Return a pattern for any of the words, which is fast even for thousands of words."""
    branches = [result for result in (_trie_pattern(_build_trie(words)), *patterns) if result]
    return re.compile("|".join(branches)) if branches else None


def _incomplete_word_pattern(words: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern for an incomplete word at the end of a text."""
    starts = {word[:length] for word in words for length in range(2, min(len(word), _MAX_COMPARED_CHARACTERS))}
    starts = {start for start in starts if _ANY_BRACKET.search(start) and any(map(str.isalnum, start))}
    starts = {start for start in starts if not start[-1].isspace()}
    return re.compile(rf"{_trie_pattern(_build_trie(starts))}(?=\s*\Z)") if starts else None


# A trie: the continuations of each letter; the empty string marks the end of a word.
_Trie: TypeAlias = "dict[str, _Trie]"


def _build_trie(words: Iterable[str]) -> _Trie:
    """Build the trie of words."""
    tree: _Trie = {}
    for word in words:
        node = tree
        for letter in word[:_MAX_COMPARED_CHARACTERS]:
            node = node.setdefault(letter, {})
        node[""] = {}
    return tree


def _trie_pattern(node: _Trie) -> str:
    parts = [re.escape(letter) + _trie_pattern(below) for letter, below in sorted(node.items()) if letter]
    if not parts or (len(parts) == 1 and "" not in node):
        return "".join(parts)
    return f"(?:{'|'.join(parts)})" + ("?" if "" in node else "")


_KNOWN_TOKEN_PATTERN = _any_word_pattern(_KNOWN_TOKENS, *_KNOWN_PATTERNS)


def _break_positions(text: str, tokens: _ControlTokens) -> list[int]:
    """Return the sorted positions at which spaces must be inserted to break the tokens of a text."""
    positions = set()
    for pattern, end, view in (
        (_KNOWN_TOKEN_PATTERN, None, _ascii_view),
        (tokens.plain, tokens.plain_end, _lower_ascii_view),
        (tokens.other, tokens.other_end, _folded_view),
    ):
        seen = view(text) if pattern else ""
        result = list(pattern.finditer(seen)) if pattern else []
        if end and (beginning := end.search(seen, max(0, len(seen.rstrip()) - _MAX_COMPARED_CHARACTERS))):
            result.append(beginning)
        if result:
            origins = _source_indices(text, view)
            positions |= {_break_position(match, origins) for match in result}
    return sorted(position for position in positions if position is not None)


def _break_position(match: re.Match[str], origins: Sequence[int]) -> int | None:
    """Return the index at which a space must be inserted to break up a special token."""
    start, end = match.span()
    bracket = _ANY_BRACKET.search(match.group())
    preferred = start + bracket.end() if bracket and bracket.end() < end - start else end - 1
    free = (at for at in (*range(preferred, end), *range(start + 1, preferred)) if origins[at] != origins[at - 1])
    return next((origins[at] for at in free), None)


def _ascii_view(text: str) -> str:
    """Return the ASCII characters of a text after compatibility decomposition."""
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text).replace("▁", " ").encode("ascii", "ignore").decode("ascii")
    return _CONTROL.sub("", text)


def _lower_ascii_view(text: str) -> str:
    return _ascii_view(text).lower()


def _folded_view(text: str) -> str:
    """Return the case-folded compatibility decomposition of a text, without accents and invisible characters."""
    folded = unicodedata.normalize("NFKD", text).replace("▁", " ").casefold()
    return "".join(character for character in folded if _is_visible(character))


@cache
def _is_visible(character: str) -> bool:
    return character in "\n\t" or (character != "\ufffd" and unicodedata.category(character)[0] not in "MC")


@cache
def _view_length(character: str, view: Callable[[str], str]) -> int:
    return len(view(character))


def _source_indices(text: str, view: Callable[[str], str]) -> Sequence[int]:
    """Return, for each character of a converted text, the index of its source character."""
    if text.isascii() and not _CONTROL.search(text):
        return range(len(text))
    return [index for index, character in enumerate(text) for _ in range(_view_length(character, view))]
