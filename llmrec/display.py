"""Short representations of objects: a few lines in a console, a table in a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

# Control characters except tab and line feed, and characters that change the text direction.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SHOWN = 20
"""The maximum number of rows of a table in a representation."""
# Maximum number of lines of a text, and of characters of a cell.
_LINES, _CELL = 30, 80

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
        return as_text(self._summary())

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        return as_html(self._summary())


def as_text(found: Summary) -> str:
    """Format a summary as lines of text without control characters."""
    lines = [_cell(found.title)]
    lines += aligned([(_cell(name), _cell(value)) for name, value in found.facts.items()])
    rows, more = _first(found.rows, SHOWN)
    if rows:
        lines += aligned([[_cell(item) for item in row] for row in (found.header, *rows)])
    lines += [f"  ... {more} more rows"] * (more > 0)
    text, more = _first(visible(found.text).splitlines(), _LINES)
    lines += [f"  {line}".rstrip() for line in text]
    return "\n".join([*lines, *([f"  ... {more} more lines"] if more else [])])


def as_html(found: Summary) -> str:
    """Format a summary as an HTML fragment with all texts escaped."""
    rows, more = _first(found.rows, SHOWN)
    parts = [f"<p><strong>{_escaped(found.title)}</strong></p>"]
    if found.facts:
        facts = (f"<tr><th>{_escaped(name)}</th>{_cells('td', [value])}</tr>" for name, value in found.facts.items())
        parts.append(f"<table><tbody>{''.join(facts)}</tbody></table>")
    if rows:
        body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
        head = f"<thead><tr>{_cells('th', found.header)}</tr></thead>"
        parts.append(f"<table>{head}<tbody>{body}</tbody></table>")
    parts += [f"<p>... {more} more rows</p>"] * (more > 0)
    text, more = _first(visible(found.text).splitlines(), _LINES)
    if text:
        shown = "\n".join([*text, *([f"... {more} more lines"] if more else [])])
        parts.append(f"<pre>{html.escape(shown)}</pre>")
    return f"<div>{''.join(parts)}</div>"


def visible(text: str) -> str:
    """Escape control and text-direction characters in a text, as in ``[U+001B]``."""
    return _HIDDEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


def flat(text: str) -> str:
    """Return a text on one line, with hidden characters escaped."""
    return " ".join(visible(text).split())


def short(text: str, longest: int = 120) -> str:
    """Return untrusted text as one line, truncated if it is long."""
    return shortened(flat(text), longest)


def shortened(text: str, limit: int) -> str:
    """Return a text truncated to a maximum length."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return the first names, separated by commas, and the number of the remaining names."""
    results = list(names)
    return ", ".join(results[:most]) + (f" and {len(results) - most} more" if len(results) > most else "")


def _first(rows: Sequence[_Row], most: int) -> tuple[Sequence[_Row], int]:
    return rows[:most], max(0, len(rows) - most)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as aligned columns."""
    if not rows:
        return []
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _cell(text: str) -> str:
    return short(text, _CELL)


def _cells(tag: str, cells: Iterable[str]) -> str:
    return "".join(f"<{tag}>{_escaped(cell)}</{tag}>" for cell in cells)


def _escaped(text: str) -> str:
    return html.escape(_cell(text))
