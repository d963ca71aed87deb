"""Writes the report folder of a run: an HTML page, a Markdown page, a CSV and a LaTeX table.

The HTML page is one file that loads nothing: its plots are inline SVG. Its Content-Security-Policy allows no script and
only a style with a nonce; the nonce is a hash of the data, so no title or model output can contain it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmrec.durable import refuse_link, replacing
from llmrec.report import index_summary
from llmrec.report.audit import AuditLine, LeakError, audit_lines, how_to_audit, refuse_leaks
from llmrec.report.render import html_page, latex, markdown_page, refused_pages
from llmrec.report.results import content_of, failure_reasons, fix_for, results_of
from llmrec.report.table import csv_text

PAGES = {"html": "index.html", "markdown": "report.md", "csv": "table.csv", "latex": "table.tex"}
"""The files of a report that contain figures."""


def write(run_dir: Path) -> dict[str, Path]:
    """Write ``run_dir/report`` from the results, predictions and audit of a run.

    Each file is written to a temporary file and renamed, so a reader never sees an incomplete one.

    Args:
        run_dir: The run folder.

    Returns:
        The written files under ``html``, ``markdown``, ``csv`` and ``latex``.

    Raises:
        DataError: If results or predictions are missing, or one of the three files cannot be read.
        LeakError: If the run leaks. The two pages then say so without any figure, and tables of an earlier call are
            removed.
        LlmrecError: If a table would mix rows of different protocols, or a task has no baseline.
    """
    content, audit = content_of(run_dir), audit_lines(run_dir)
    try:
        refuse_leaks(run_dir, audit or ())
    except LeakError:
        _refuse(run_dir, audit or ())
        raise
    results = results_of(content, source=str(run_dir / "results.json"), fix=fix_for(run_dir))
    reasons, fix, index_line = failure_reasons(run_dir, results), how_to_audit(run_dir), index_summary.line(run_dir)
    pages = _pages(run_dir)
    _put(pages["csv"], csv_text(results).encode())
    _put(pages["latex"], latex(results).encode())
    _put(pages["markdown"], markdown_page(results, reasons, audit, fix=fix).encode())
    near = index_summary.neighbours(run_dir) if index_line else ()
    page = html_page(results, reasons, audit, fix=fix, item_index=index_line, neighbours=near)
    _put(pages["html"], page.encode())
    return pages


def _refuse(run_dir: Path, audit: Sequence[AuditLine]) -> None:
    """Write the pages of a run with a leak, which describe the leak and show no results."""
    pages = _pages(run_dir)
    for kind in ("csv", "latex"):
        pages[kind].unlink(missing_ok=True)
    for kind, text in refused_pages(run_dir.resolve().name, audit).items():
        _put(pages[kind], text.encode())


def _pages(run_dir: Path) -> dict[str, Path]:
    """Make the report folder, and return the paths of its files."""
    folder = run_dir / "report"
    refuse_link(folder)
    folder.mkdir(exist_ok=True)
    return {kind: folder / name for kind, name in PAGES.items()}


def _put(path: Path, content: bytes) -> None:
    """Write a file atomically, unless it already has this content."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    with replacing(path) as draft:
        draft.write_bytes(content)
