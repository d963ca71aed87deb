"""Writes the report folder of a run: an HTML page, a Markdown page, a CSV and a LaTeX table.

The HTML page is one file that loads nothing: its plots are inline SVG. Its Content-Security-Policy allows no script and
only a style with a nonce; the nonce is a hash of the data, so no title or model output can contain it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmrec.durable import check_not_link, replace_atomically
from llmrec.report import index_summary
from llmrec.report.audit import AuditLine, LeakError, audit_command, check_leaks, read_audit_lines
from llmrec.report.render import render_html_page, render_latex, render_leak_pages, render_markdown_page
from llmrec.report.results import failure_reasons, parse_results, read_results_json, rewrite_advice
from llmrec.report.table import csv_text

PAGES = {"html": "index.html", "markdown": "report.md", "csv": "table.csv", "latex": "table.tex"}
"""The files of a report that contain figures."""


def write_report(run_dir: Path) -> dict[str, Path]:
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
    content, audit = read_results_json(run_dir), read_audit_lines(run_dir)
    try:
        check_leaks(run_dir, audit or ())
    except LeakError:
        _write_leak_pages(run_dir, audit or ())
        raise
    results = parse_results(content, source=str(run_dir / "results.json"), fix=rewrite_advice(run_dir))
    reasons, fix = failure_reasons(run_dir, results), audit_command(run_dir)
    index_line = index_summary.describe_run_index(run_dir)
    pages = _prepare_page_paths(run_dir)
    _write_if_changed(pages["csv"], csv_text(results).encode())
    _write_if_changed(pages["latex"], render_latex(results).encode())
    _write_if_changed(pages["markdown"], render_markdown_page(results, reasons, audit, fix=fix).encode())
    near = index_summary.read_neighbours(run_dir) if index_line else ()
    page = render_html_page(results, reasons, audit, fix=fix, item_index=index_line, neighbours=near)
    _write_if_changed(pages["html"], page.encode())
    return pages


def _write_leak_pages(run_dir: Path, audit: Sequence[AuditLine]) -> None:
    """Write the pages of a run with a leak, which describe the leak and show no results."""
    pages = _prepare_page_paths(run_dir)
    for kind in ("csv", "latex"):
        pages[kind].unlink(missing_ok=True)
    for kind, text in render_leak_pages(run_dir.resolve().name, audit).items():
        _write_if_changed(pages[kind], text.encode())


def _prepare_page_paths(run_dir: Path) -> dict[str, Path]:
    """Make the report folder, and return the paths of its files."""
    folder = run_dir / "report"
    check_not_link(folder)
    folder.mkdir(exist_ok=True)
    return {kind: folder / name for kind, name in PAGES.items()}


def _write_if_changed(path: Path, content: bytes) -> None:
    """Write a file atomically, unless it already has this content."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    with replace_atomically(path) as draft:
        draft.write_bytes(content)
