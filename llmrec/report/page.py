"""Writes a run's report folder: one HTML page, its scripts, a Markdown page, a CSV and a LaTeX table.

The page loads nothing from any network. Its Content-Security-Policy admits only scripts and styles that carry a
nonce, and the nonce is a hash over the data, so that no title or model output can contain it.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmrec.durable import refuse_link, replacing
from llmrec.report import costs, marks, positions, slices, texts, wording
from llmrec.report import index_summary as index_words
from llmrec.report import marks as templates
from llmrec.report import results as facts
from llmrec.report.audit import (
    VERDICT,
    AuditLine,
    LeakError,
    audit_lines,
    audit_sentence,
    how_to_audit,
    refusal,
    refuse_leaks,
)
from llmrec.report.escape import cell, page_json, visible
from llmrec.report.latex import latex
from llmrec.report.markdown import audit_markdown, markdown_page
from llmrec.report.plots import plots
from llmrec.report.records import Results, lower
from llmrec.report.results import Made, content_of, failure_reasons, mend_for, results_of
from llmrec.report.table import csv_text

_HERE = Path(__file__).resolve().parent
PAGES = {"html": "index.html", "markdown": "report.md", "csv": "table.csv", "latex": "table.tex"}
"""The files of a report that hold figures."""


def write(run_dir: Path, made: Made | None = None) -> dict[str, Path]:
    """Write ``run_dir/report`` from ``results.json``, ``predictions.parquet`` and ``audit.json`` of a run.

    Each file is written beside its place and moved there, so a reader never sees half of one.

    Args:
        run_dir: The run folder.
        made: What the three files hold; None: they are read.

    Returns:
        The written files under ``html``, ``markdown``, ``csv`` and ``latex``.

    Raises:
        DataError: If one of the first two files is missing, or one of the three cannot be read.
        LeakError: If the run leaks. The two pages then say so and hold no figure; tables that an earlier call wrote are
            removed.
        LlmrecError: If rows of different protocols, or a task without a baseline, would stand in one table.
    """
    run_dir = Path(run_dir)
    if made is None:
        content, audit, predictions = content_of(run_dir), audit_lines(run_dir), None
    else:
        content, audit, predictions = made.results, made.audit, made.predictions
    try:
        refuse_leaks(run_dir, audit or ())
    except LeakError:
        _refuse(run_dir, audit or ())
        raise
    results = results_of(content, source=str(run_dir / "results.json"), mend=mend_for(run_dir))
    reasons, mend = failure_reasons(run_dir, results, predictions), how_to_audit(run_dir)
    told = index_words.line(run_dir) if made is None or made.item_index is None else made.item_index
    folder = run_dir / "report"
    refuse_link(folder)
    folder.mkdir(exist_ok=True)
    pages = {kind: folder / name for kind, name in PAGES.items()}
    inline_styles = put_scripts(folder)
    _put(pages["csv"], csv_text(results).encode())
    _put(pages["latex"], latex(results).encode())
    _put(pages["markdown"], markdown_page(results, reasons, audit, mend=mend).encode())
    page = html_page(results, reasons, audit, mend=mend, inline_styles=inline_styles, item_index=told)
    _put(pages["html"], page.encode())
    return pages


def _refuse(run_dir: Path, audit: Sequence[AuditLine]) -> None:
    """Write the pages of a run that leaks: what leaks stands at their head, and there is no figure."""
    refuse_link(run_dir / "report")
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    for kind in ("csv", "latex"):
        (folder / PAGES[kind]).unlink(missing_ok=True)
    name, said = run_dir.resolve().name, refusal(audit)
    parts = [f"# {cell(name)}", f"**{cell(VERDICT)}** {cell(said)}", "## Audit", *audit_markdown(audit, "")]
    _put(folder / PAGES["markdown"], ("\n\n".join(parts) + "\n").encode())
    page = environment().get_template("refused.html.j2").render(
        name=name, verdict=VERDICT, advice=said, audit=audit, audited=audit_sentence(audit), mend="",
        nonce=hashlib.sha256(repr(audit).encode()).hexdigest()[:32], style=(_HERE / "style.css").read_text("utf-8"),
    )  # fmt: skip
    _put(folder / PAGES["html"], page.encode())


def put_scripts(folder: Path) -> list[str]:
    """Write the scripts of a page beside it; return the ids of the empty style elements that its head must hold."""
    plotly = files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    _put(folder / "plotly.min.js", plotly)
    _put(folder / "report.js", (_HERE / "report.js").read_bytes())
    return _inline_styles(plotly)


def _put(path: Path, content: bytes) -> None:
    """Write a file in one step, unless it is there already."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    with replacing(path) as draft:
        draft.write_bytes(content)


def _inline_styles(plotly: bytes) -> list[str]:
    """Return ids of style elements that plotly.js would add, which the page's policy forbids unless they exist."""
    marked = re.findall(rb'getElementById\("([0-9a-f]{64})"\)', plotly)
    return ["plotly.js-style-global", *(name.decode() for name in marked)]


# --------------------------------------------------------------------------- HTML


def html_page(
    results: Results,
    reasons: Mapping[str, Mapping[str, int]],
    audit: Sequence[AuditLine] | None,
    *,
    mend: str,
    inline_styles: Sequence[str],
    item_index: str = "",
) -> str:
    """Render the page.

    Args:
        results: Checked results.
        reasons: Row id to failure reason to count.
        audit: Lines of the audit; None where there was none.
        mend: The command that makes the audit.
        inline_styles: Ids of empty style elements to put in the head.
        item_index: A line on the run's index, whose page stands beside this one; empty where there is none.
    """
    drawn = plots(results)
    parts = [results.model_dump_json(), *(line.model_dump_json() for line in audit or ()), repr(reasons), mend]
    parts.append(item_index)
    verdicts = {task: wording.verdict(results, task) for task in results.tasks}
    return environment().get_template("page.html.j2").render(
        results=results, reasons=reasons, nonce=hashlib.sha256("".join(parts).encode()).hexdigest()[:32],
        data=page_json(drawn), plotted=frozenset(drawn), style=(_HERE / "style.css").read_text("utf-8"),
        inline_styles=inline_styles, verdicts=verdicts, summary=wording.summary(results),
        winner={task: wording.winner_sentence(found) for task, found in verdicts.items()},
        tuning={task: wording.tuning_sentence(found, results.rows) for task, found in verdicts.items()},
        signatures=facts.signatures(results), arms=costs.cost_by_arm(results), made=facts.made_data(results),
        audit=audit, audited=audit_sentence(audit) if audit is not None else "", mend=mend,
        item_index=item_index, index_page=index_words.PAGE,
    )  # fmt: skip


@functools.cache
def environment() -> ImmutableSandboxedEnvironment:
    """Return the template engine with everything that the templates call."""
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.globals.update(
        interval=wording.interval, favours=wording.favours, detectable=wording.DETECTABLE, dash=wording.DASH,
        signs=marks.SIGNS, marks_of=marks.marks, legend_of=marks.legend, rule_of=marks.rule,
        spreads=templates.spreads, singles=templates.singles, single=templates.SINGLE,
        position_rows=positions.shown_rows, bands=positions.bands, position_says=positions.sentences,
        trend_words=positions.trend_words, slice_table=slices.slice_table, cost_by_row=costs.cost_by_row,
        text_tasks=texts.text_tasks, samples=texts.samples, answered=texts.answered, asked_by=texts.asked_by,
        about_choice=texts.about_choice, who=texts.who, open_texts=texts.OPEN, undefined_of=wording.undefined,
    )  # fmt: skip
    environment.filters.update(
        number=wording.number, share=wording.share, count=wording.count, rough=wording.rough, p=wording.p_value,
        duration=wording.duration, label=wording.label, title_of=wording.title, short_template=wording.short_template,
        clip=facts.clip, answer=facts.answer, dump=facts.dump, is_lower=lower, figure=wording.figure,
    )  # fmt: skip
    return environment


def _shown(value: object) -> object:
    """Write out control characters in every plain string that enters the page; finished markup stays as it is."""
    return visible(value) if type(value) is str else value
