"""Short representations of objects: a few lines in a console, a table in a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

# Control characters except tab and line feed, and characters that change the text direction.
_HIDDEN_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_ROWS = 20
"""The maximum number of rows of a table in a representation."""
# Maximum number of lines of a text, and of characters of a cell.
_MAX_LINES, _MAX_CELL_CHARACTERS = 30, 80

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Summary:
    """The title, values, table and text that a notebook or terminal shows for an object.

    Attributes:
        title: One line.
        facts: Values by name.
        header: The columns of the table.
        rows: Its rows; after the first 20 only their number is shown.
        text: Formatted lines; after the first 30 only their number is shown.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text: str = ""


class Displayed:
    """Base class of objects that define `_summary` to be displayed. It must precede other base classes."""

    def _summary(self) -> Summary:
        """Return the title, values and table that a notebook or terminal shows for this object."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return format_summary_text(self._summary())

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        return format_summary_html(self._summary())


def format_summary_text(found: Summary) -> str:
    """Format a summary as lines of text without control characters."""
    lines = [_format_cell(found.title)]
    lines += align_columns([(_format_cell(name), _format_cell(value)) for name, value in found.facts.items()])
    rows, more = _first_rows(found.rows, MAX_ROWS)
    if rows:
        lines += align_columns([[_format_cell(item) for item in row] for row in (found.header, *rows)])
    lines += [f"  ... {more} more rows"] * (more > 0)
    text, more = _first_rows(escape_hidden(found.text).splitlines(), _MAX_LINES)
    lines += [f"  {line}".rstrip() for line in text]
    return "\n".join([*lines, *([f"  ... {more} more lines"] if more else [])])


def format_summary_html(found: Summary) -> str:
    """Format a summary as an HTML fragment with all texts escaped."""
    rows, more = _first_rows(found.rows, MAX_ROWS)
    parts = [f"<p><strong>{_escape_cell(found.title)}</strong></p>"]
    if found.facts:
        facts = (
            f"<tr><th>{_escape_cell(name)}</th>{_html_cells('td', [value])}</tr>" for name, value in found.facts.items()
        )
        parts.append(f"<table><tbody>{''.join(facts)}</tbody></table>")
    if rows:
        body = "".join(f"<tr>{_html_cells('td', row)}</tr>" for row in rows)
        head = f"<thead><tr>{_html_cells('th', found.header)}</tr></thead>"
        parts.append(f"<table>{head}<tbody>{body}</tbody></table>")
    parts += [f"<p>... {more} more rows</p>"] * (more > 0)
    text, more = _first_rows(escape_hidden(found.text).splitlines(), _MAX_LINES)
    if text:
        shown = "\n".join([*text, *([f"... {more} more lines"] if more else [])])
        parts.append(f"<pre>{html.escape(shown)}</pre>")
    return f"<div>{''.join(parts)}</div>"


def escape_hidden(text: str) -> str:
    """Escape control and text-direction characters in a text, as in ``[U+001B]``."""
    return _HIDDEN_CHARACTERS.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


def single_line(text: str) -> str:
    """Return a text on one line, with hidden characters escaped."""
    return " ".join(escape_hidden(text).split())


def shorten_line(text: str, longest: int = 120) -> str:
    """Return untrusted text as one line, truncated if it is long."""
    return shorten_text(single_line(text), longest)


def shorten_text(text: str, limit: int) -> str:
    """Return a text truncated to a maximum length."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def format_name_list(names: Iterable[str], most: int = 8) -> str:
    """Return the first names, separated by commas, and the number of the remaining names."""
    results = list(names)
    return ", ".join(results[:most]) + (f" and {len(results) - most} more" if len(results) > most else "")


def _first_rows(rows: Sequence[_Row], most: int) -> tuple[Sequence[_Row], int]:
    return rows[:most], max(0, len(rows) - most)


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as aligned columns."""
    if not rows:
        return []
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _format_cell(text: str) -> str:
    return shorten_line(text, _MAX_CELL_CHARACTERS)


def _html_cells(tag: str, cells: Iterable[str]) -> str:
    return "".join(f"<{tag}>{_escape_cell(cell)}</{tag}>" for cell in cells)


def _escape_cell(text: str) -> str:
    return html.escape(_format_cell(text))
