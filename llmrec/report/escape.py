"""Escapes untrusted text for pages, tables, plots, spreadsheets and LaTeX files.

Titles, reviews, model output, names in recipes and audit findings are untrusted. The template engine escapes HTML;
every other format has its function here or in `llmrec.display`.
"""

from __future__ import annotations

import re
from typing import Any

from llmrec.display import escape_hidden, single_line

# Characters that start code, emphasis, strike-through, maths or a table cell; a bracket only where it may close a link.
# The text that follows is unknown here.
_MARKDOWN = re.compile(r"[\\`*|~$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=[(\[:]|$)")
# Characters that start a list, rule, underlined heading or definition at the beginning of a line.
_BLOCK_START = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[-+=:]))")
_CODE_SPAN = re.compile(r"[A-Za-z0-9 ._:/@+=,|%-]+")
_HTML_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}

_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    # In braces, since ? and ! form a ligature with the next character.
    "|": r"\textbar{}", '"': r"{}\symbol{34}{}", "`": r"{}\symbol{96}{}", "·": r"\textperiodcentered{}", "–": "--",
    "\u2009": r"\,", "…": r"\dots{}",
    # A bracket or asterisk right after the end of a row would be parsed as its argument.
    "[": "{[}", "]": "{]}", "*": "{*}",
}  # fmt: skip
# Latin-1 letters that all TeX engines have in the default font encoding; the other four need another encoding.
_TEX_LETTERS = frozenset(map(chr, range(0xC0, 0x100))) - frozenset("ÐðÞþ×÷")


def without_surrogates(value: Any) -> Any:
    """Replace lone surrogates, which UTF-8 cannot encode, in all strings of a JSON value."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(entry) for key, entry in value.items()}
    return [without_surrogates(entry) for entry in value] if isinstance(value, list) else value


def escape_cell(text: str) -> str:
    """Return untrusted text as a Markdown table cell without markup, HTML and line breaks."""
    line = "".join(_HTML_ENTITIES.get(character, character) for character in single_line(text))
    line = _MARKDOWN.sub(lambda match: f"\\{match[0]}", line)
    return _BLOCK_START.sub(r"\1\\", line)


def code_span(text: str) -> str:
    """Return untrusted text as a Markdown code span, or as a table cell if a code span cannot contain it."""
    line = single_line(text)
    return f"`{line}`" if _CODE_SPAN.fullmatch(line) else escape_cell(line)


def fenced_yaml(text: str) -> str:
    """Return untrusted YAML as a fenced Markdown block, with a fence longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{escape_hidden(text.rstrip())}\n{fence}"


def escape_tex(text: str) -> str:
    """Return untrusted text as one line of LaTeX without commands, comments, maths or column separators.

    Letters beyond ASCII and Latin-1, which some engines and fonts lack, are written as ``[U+1F3AC]``.
    """
    # Two hyphens, quotation marks or commas would form a ligature.
    line = re.sub(r"(?<=-)(?=-)|(?<=')(?=')|(?<=,)(?=,)", "\x00", single_line(text))
    return "".join("{}" if character == "\x00" else _escape_tex_character(character) for character in line)


def _escape_tex_character(character: str) -> str:
    if character in _TEX:
        return _TEX[character]
    if character.isascii() or character in _TEX_LETTERS:
        return character
    return f"{{[}}U+{ord(character):04X}{{]}}"
