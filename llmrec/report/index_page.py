"""Writes the page of an item index: how its codes are used, how they branch, and which items stand together.

It is made like the page of a run (`llmrec.report.page`): titles and codes are escaped, and its policy admits no script
but its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, TypedDict

from llmrec.durable import refuse_link, replacing
from llmrec.index.diagnostics import Depth, Diagnostics, Entry, Group, Level
from llmrec.report import index_summary
from llmrec.report.escape import flat, page_json, plain
from llmrec.report.page import put_scripts
from llmrec.report.render import environment, style

_LONGEST = 120  # characters of a title or code; the rest says little more


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexPage:
    """What the page shows.

    Attributes:
        name: Of the recipe.
        data: Name of the data.
        noun: What its items are called.
        made: Whether the data was made up, not collected.
        seed: Of the recipe.
        digest: Of the index.
        seconds: Time that building it took; None where that was not measured.
        found: Figures.
        groups: Items that stand together.
        examples: Items with their codes.
        version: Of llmrec.
        run: Whether a run's report stands beside the page.
    """

    name: str
    data: str
    noun: str
    made: bool
    seed: int
    digest: str
    seconds: float | None
    found: Diagnostics
    groups: Sequence[Group]
    examples: Sequence[Entry]
    version: str
    run: bool = False


def write(content: IndexPage, path: Path) -> Path:
    """Write the page, with its scripts beside it, and return its path."""
    refuse_link(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = html_page(content, inline_styles=put_scripts(path.parent))
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def html_page(content: IndexPage, *, inline_styles: Sequence[str]) -> str:
    """Render the page; the ids are those of empty style elements to put in the head."""
    found = content.found
    drawn = plots(found)
    nonce = hashlib.sha256(json.dumps(asdict(content)).encode()).hexdigest()[:32]
    return environment().get_template("index.html.j2").render(
        page=content, found=found, nonce=nonce, data=page_json(drawn), plotted=frozenset(drawn),
        style=style(), inline_styles=inline_styles,
        sentence=index_summary.sentence(found), figures=index_summary.key_figures(found),
        level_title=index_summary.level_title,
        groups={length: tuple(each) for length, each in groupby(content.groups, key=lambda group: group.length)},
        short=short,
    )  # fmt: skip


def short(text: str, longest: int = _LONGEST) -> str:
    """Return untrusted text as one line, cut where it would swamp the others."""
    line = flat(text)
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


class Usage(TypedDict):
    """How often each token of a level is used, and how often each would be if all were alike."""

    title: str
    counts: list[int]
    available: int
    even: float
    items: int


class Branching(TypedDict):
    """What follows a prefix, by its length."""

    title: str
    x: list[int]
    mean: list[float]
    most: list[int]


class Plot(TypedDict):
    """Panels of one kind, side by side."""

    kind: Literal["usage", "branching"]
    panels: list[Usage] | list[Branching]


def plots(found: Diagnostics) -> dict[str, Plot]:
    """Return every plot's data by the id of the element that holds it."""
    panels = [_panel(level, found.items) for level in found.levels if level.counts and level.counts[0] > 1]
    drawn: dict[str, Plot] = {}
    if panels:
        drawn["usage"] = {"kind": "usage", "panels": panels}
    if len(found.depths) > 1:
        drawn["branching"] = {"kind": "branching", "panels": _branching(found.depths)}
    return drawn


def _panel(level: Level, items: int) -> Usage:
    return {
        "title": plain(f"items of each {index_summary.level_title(level)}"),
        "counts": list(level.counts),
        "available": level.available,
        "even": sum(level.counts) / level.available,
        "items": items,
    }


def _branching(depths: Sequence[Depth]) -> list[Branching]:
    """Return what follows prefixes and what stands under them, by the length of the prefix."""
    lengths = [depth.length for depth in depths]
    return [
        {
            "title": "items under a prefix",
            "x": lengths,
            "mean": [depth.items for depth in depths],
            "most": [depth.most_items for depth in depths],
        },
        {
            "title": "tokens that may follow a prefix",
            "x": lengths,
            "mean": [depth.fan_out for depth in depths],
            "most": [depth.most_fan_out for depth in depths],
        },
    ]
