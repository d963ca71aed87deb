"""Writes the page of an item index: how its codes are used, how they branch, and which items stand together.

It is made like the page of a run (`llmrec.report.page`): one file, in which titles and codes are escaped, and whose
policy admits no script.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from llmrec.durable import refuse_link, replacing
from llmrec.index.diagnostics import Diagnostics, Entry, Group
from llmrec.report import index_plots, index_summary
from llmrec.report.render import environment, style


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
    """Write the page and return its path."""
    refuse_link(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = html_page(content)
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def html_page(content: IndexPage) -> str:
    """Render the page."""
    result = content.found
    nonce = hashlib.sha256(json.dumps(asdict(content)).encode()).hexdigest()[:32]
    return environment().get_template("index.html.j2").render(
        page=content, found=result, nonce=nonce, plotted=index_plots.pictures(result), style=style(),
        sentence=index_summary.sentence(result), figures=index_summary.key_figures(result),
        level_title=index_summary.level_title,
        groups={length: tuple(entry) for length, entry in groupby(content.groups, key=lambda group: group.length)},
    )  # fmt: skip
