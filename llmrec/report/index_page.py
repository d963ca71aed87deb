"""Writes the HTML page about an item index: token usage, branching of codes, and groups of similar items.

Like the page of a run (`llmrec.report.page`) it is one file with escaped titles and codes, and its
Content-Security-Policy allows no script.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from llmrec.durable import check_not_link, write_text
from llmrec.index.diagnostics import CodedItem, CodeGroup, Diagnostics
from llmrec.report import index_plots, index_summary
from llmrec.report.render import html_environment, read_style_sheet


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexPage:
    """Content of the HTML page about an item index.

    Attributes:
        noun: Noun for its items, such as ``films``.
        seconds: Build time; None if not measured.
        run: Whether a run's report is in the same folder.
    """

    name: str
    data: str
    noun: str
    made: bool
    seed: int
    digest: str
    seconds: float | None
    found: Diagnostics
    groups: Sequence[CodeGroup]
    examples: Sequence[CodedItem]
    version: str
    run: bool = False


def write_index_page(content: IndexPage, path: Path) -> Path:
    """Write the page and return its path."""
    check_not_link(path.parent)
    write_text(path, render_index_page(content))
    return path


def render_index_page(content: IndexPage) -> str:
    """Render the page as HTML."""
    result = content.found
    nonce = hashlib.sha256(json.dumps(asdict(content)).encode()).hexdigest()[:32]
    return html_environment().get_template("index.html.j2").render(
        page=content, found=result, nonce=nonce, plotted=index_plots.draw_index_plots(result), style=read_style_sheet(),
        sentence=index_summary.scheme_sentence(result), figures=index_summary.key_figures(result),
        level_title=index_summary.level_title,
        groups={length: tuple(entry) for length, entry in groupby(content.groups, key=lambda group: group.length)},
    )  # fmt: skip
