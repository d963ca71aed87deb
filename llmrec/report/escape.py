"""Untrusted text on its way into a page, a table, a plot, a spreadsheet or a LaTeX file.

Titles, reviews, model output, names in recipes and what an audit found were written by others. HTML is escaped by the
template engine; every other form has its function here or in `llmrec.display`.
"""

from __future__ import annotations

import re
from typing import Any

from llmrec.display import flat as flat
from llmrec.display import short as short
from llmrec.display import visible as visible

# What opens code, emphasis, strike-through, maths or a cell; a bracket only where it would close a link. What
# follows the end of the text is not known here.
_MARKDOWN = re.compile(r"[\\`*|~$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=[(\[:]|$)")
# What opens a list, a rule, an underlined heading or a definition at the start of a line.
_BLOCK = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[-+=:]))")
_CODE = re.compile(r"[A-Za-z0-9 ._:/@+=,|%-]+")
_MARKED_UP = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}

_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    # Between braces, for ? and ! would form another mark with the second.
    "|": r"\textbar{}", '"': r"{}\symbol{34}{}", "`": r"{}\symbol{96}{}", "·": r"\textperiodcentered{}", "–": "--",
    "\u2009": r"\,", "…": r"\dots{}",
    # A bracket or a star right after the end of a row would be taken for an argument of it.
    "[": "{[}", "]": "{]}", "*": "{*}",
}  # fmt: skip
# Latin-1 letters that every TeX engine sets in its first font encoding; the four others need another one.
_TEX_LETTERS = frozenset(map(chr, range(0xC0, 0x100))) - frozenset("ÐðÞþ×÷")


def without_surrogates(value: Any) -> Any:
    """Replace lone surrogates, which no file can hold, in every string of a JSON value."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(entry) for key, entry in value.items()}
    return [without_surrogates(entry) for entry in value] if isinstance(value, list) else value


def cell(text: str) -> str:
    """Return untrusted text as one Markdown table cell: no markup, no HTML, no line breaks."""
    line = "".join(_MARKED_UP.get(character, character) for character in flat(text))
    line = _MARKDOWN.sub(lambda match: f"\\{match[0]}", line)
    return _BLOCK.sub(r"\1\\", line)


def code(text: str) -> str:
    """Return untrusted text as a Markdown code span, or as a cell if it holds what a span cannot."""
    line = flat(text)
    return f"`{line}`" if _CODE.fullmatch(line) else cell(line)


def fenced(text: str) -> str:
    """Return untrusted YAML as a fenced Markdown block, the fence longer than any in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{visible(text.rstrip())}\n{fence}"


def tex(text: str) -> str:
    """Return untrusted text as LaTeX that prints it: no command, no comment, no maths, no column, one line.

    Letters beyond ASCII and Latin-1, which not every engine and font can set, are written out as ``[U+1F3AC]``.
    """
    # Two hyphens, quotation marks or commas would be drawn as one other mark.
    line = re.sub(r"(?<=-)(?=-)|(?<=')(?=')|(?<=,)(?=,)", "\x00", flat(text))
    return "".join("{}" if character == "\x00" else _tex_of(character) for character in line)


def _tex_of(character: str) -> str:
    if character in _TEX:
        return _TEX[character]
    if character.isascii() or character in _TEX_LETTERS:
        return character
    return f"{{[}}U+{ord(character):04X}{{]}}"
