"""Keeps data text from posing as anything else: `clean` for lines and templates, `neutralise` for control tokens."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

TITLE_LIMIT = 300
TEXT_LIMIT = 1000

_BRACKETS = "<>[]|{}｜＜＞⟨⟩«»【】〈〉《》"
_ANY_BRACKET = re.compile(f"[{re.escape(_BRACKETS)}]")
# Half a marker is broken too, so that two fields standing side by side cannot form a whole one.
_HALVES = (re.compile(r"([<＜])(?=[|｜])"), re.compile(r"([|｜])(?=[>＞])"))
# Control tokens of widespread tokenizers. The model at hand adds its own, but a text may be meant for another one.
_KNOWN = (
    *("<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<cls>", "<sep>", "<sop>", "<eop>"),
    *("[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "[BOS]", "[EOS]", "[gMASK]", "[sMASK]"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<think>", "</think>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<begin_of_text>", "<end_of_text>"),
    *("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "[im_start]", "[im_end]"),
)
_KNOWN_PATTERNS = (r"<extra_id_[0-9]+>", r"<unused_?[0-9]+>", r"<reserved_[0-9]+>", r"<0x[0-9A-Fa-f]{2}>")


@lru_cache(maxsize=65536)
def clean(text: str, limit: int = TITLE_LIMIT) -> str:
    """Return data text as one line.

    Line breaks and other white space become single spaces. Control, zero-width, bidirectional, surrogate and
    private-use characters are dropped. What is longer than ``limit`` characters is cut. Cleaning twice changes nothing.
    """
    if not text.isprintable():
        text = "".join(character for character in text if character.isspace() or _stays(character))
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit].rstrip()


def _stays(character: str) -> bool:
    if unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs"):
        return False
    return ord(character) & 0xFFFE != 0xFFFE and not 0xFDD0 <= ord(character) <= 0xFDEF


def neutralise(text: str, control: Sequence[str]) -> str:
    """Break every control token that a text spells out, by a space after its opening bracket.

    Args:
        text: Any text.
        control: The tokenizer's special and added tokens. Those without a bracket (some tokenizers add line breaks
            or runs of spaces) are ordinary text and stay; the ids are to be checked after tokenising.

    Returns:
        The text, unchanged where it spells out none of them. Doing it twice changes nothing.
    """
    if not _ANY_BRACKET.search(text):
        return text
    for half in _HALVES:
        text = half.sub(r"\1 ", text)
    pattern = _pattern(tuple(control))
    # A space that breaks one token may complete another which holds a space itself, so look again. Every round
    # lengthens a run of spaces, and no token has runs without end.
    while pattern.search(text):
        text = pattern.sub(_broken, text)
    return text


@lru_cache(maxsize=64)
def _pattern(control: tuple[str, ...]) -> re.Pattern[str]:
    words = {token.strip() for token in (*control, *_KNOWN)}
    words |= {word.replace("▁", " ").strip() for word in words}
    breakable = sorted((w for w in words if len(w) > 1 and _ANY_BRACKET.search(w)), key=lambda w: (-len(w), w))
    return re.compile("|".join((*map(re.escape, breakable), *_KNOWN_PATTERNS)))


def _broken(match: re.Match[str]) -> str:
    token = match.group()
    bracket = _ANY_BRACKET.search(token)
    at = bracket.end() if bracket and bracket.end() < len(token) else len(token) - 1
    return f"{token[:at]} {token[at:]}"
