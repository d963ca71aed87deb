"""Renders results as HTML, Markdown and LaTeX, with templates that escape all untrusted text.

Every plain string that a template prints counts as untrusted and is escaped for the output format. Finished markup (the
output of macros, and of the filters marked so here) is printed unchanged; it must not be concatenated with text in an
expression, which would escape that text for HTML only.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jinja2 import FileSystemLoader, StrictUndefined, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from llmrec.display import escape_hidden, shorten_line
from llmrec.index.diagnostics import CodeGroup
from llmrec.registry import is_lower_better
from llmrec.report import breakdowns as slices
from llmrec.report import costs, escape, index_summary, marks, texts, wording
from llmrec.report import results as facts
from llmrec.report import summary as summaries
from llmrec.report.audit import LEAK_VERDICT, AuditLine, audit_sentence, describe_leaks
from llmrec.report.canvas import Canvas
from llmrec.report.charts import draw_wide_and_narrow
from llmrec.report.plots import report_plots
from llmrec.results import Results, arm_name

_HERE = Path(__file__).resolve().parent
Reasons = Mapping[str, Mapping[str, int]]
"""Counts of failures by row id and reason."""
_NUMBER_FILTERS: dict[str, Callable[..., str]] = {
    "number": wording.format_number, "share": wording.format_percentage, "count": wording.format_count,
    "rough": wording.format_mean_count,
    "p": wording.format_p_value, "duration": wording.format_duration, "history_worth": wording.describe_history_weight,
}  # fmt: skip


def render_html_page(
    results: Results,
    reasons: Reasons,
    audit: Sequence[AuditLine] | None,
    *,
    fix: str,
    item_index: str = "",
    neighbours: Sequence[CodeGroup] = (),
) -> str:
    """Render the HTML page of a run.

    Args:
        results: Checked results.
        reasons: Row id to failure reason to count.
        audit: Lines of the audit; None without one.
        fix: The command that audits the run.
        item_index: A line on the run's index, whose page is in the same folder; empty without an index.
        neighbours: Groups of similar items of that index.
    """
    parts = [results.model_dump_json(), *(line.model_dump_json() for line in audit or ()), repr(reasons), fix]
    parts += [item_index, repr(neighbours)]
    return html_environment().get_template("page.html.j2").render(
        **_template_variables(results, reasons, audit, fix),
        nonce=hashlib.sha256("".join(parts).encode()).hexdigest()[:32],
        plotted={name: draw_wide_and_narrow(plot) for name, plot in report_plots(results).items()},
        style=read_style_sheet(),
        item_index=item_index, index_page=index_summary.PAGE, neighbours=neighbours,
    )  # fmt: skip


def render_markdown_page(results: Results, reasons: Reasons, audit: Sequence[AuditLine] | None, *, fix: str) -> str:
    """Render the Markdown page: like that of `render_html_page`, without plots, example prompts and raw answers."""
    return (
        markdown_environment().get_template("report.md.j2").render(**_template_variables(results, reasons, audit, fix))
    )


def render_latex(results: Results) -> str:
    """Return a LaTeX table for each task, to be included in a paper.

    The only package needed is booktabs; the engine needs no Unicode fonts.
    """
    return (
        _latex_environment()
        .get_template("table.tex.j2")
        .render(results=results, signatures=facts.protocols_by_task(results))
    )


def render_leak_pages(name: str, audit: Sequence[AuditLine]) -> dict[str, str]:
    """Return the HTML and Markdown pages of a run with a leak."""
    view = {
        "name": name, "verdict": LEAK_VERDICT, "advice": describe_leaks(audit), "audit": audit,
        "audited": audit_sentence(audit),
        "mend": "", "nonce": hashlib.sha256(repr(audit).encode()).hexdigest()[:32], "style": read_style_sheet(),
    }  # fmt: skip
    engines = {"html": html_environment(), "markdown": markdown_environment()}
    names = {"html": "refused.html.j2", "markdown": "refused.md.j2"}
    return {kind: engine.get_template(names[kind]).render(view) for kind, engine in engines.items()}


def render_svg(canvas: Canvas, name: str) -> str:
    """Return a plot as a standalone SVG file with its styles."""
    rules = read_style_sheet().splitlines()
    colours = rules[: rules.index("* { box-sizing: border-box; }")]
    look = "\n".join([*colours, *(line for line in rules if line.startswith(".plot ") and " svg " not in line)])
    return html_environment().get_template("picture.svg.j2").render(picture=canvas, name=name, style=look)


def read_style_sheet() -> str:
    """Return the CSS of the pages."""
    return (_HERE / "style.css").read_text("utf-8")


def _template_variables(
    results: Results, reasons: Reasons, audit: Sequence[AuditLine] | None, fix: str
) -> dict[str, object]:
    """Return the template variables of the HTML and Markdown pages."""
    verdicts = {task: wording.verdict(results, task) for task in results.tasks}
    headlines = {task: summaries.headline(results, task) for task in results.tasks}
    return {
        "results": results, "reasons": reasons, "verdicts": verdicts, "summary": summaries.summary_paragraph(results),
        "headlines": headlines, "question": summaries.report_question(results, headlines.values()),
        "answers": {task: summaries.headline_sentence(result) for task, result in headlines.items()},
        "winner": {task: wording.winner_sentence(result) for task, result in verdicts.items()},
        "tuning": {task: wording.tuning_sentence(result, results.rows) for task, result in verdicts.items()},
        "signatures": facts.protocols_by_task(results), "arms": costs.cost_by_arm(results),
        "made": facts.synthetic_data_names(results),
        "audit": audit, "audited": audit_sentence(audit) if audit is not None else "", "mend": fix,
    }  # fmt: skip


# --------------------------------------------------------------------------- template engines


@functools.cache
def html_environment() -> ImmutableSandboxedEnvironment:
    """Return the HTML template engine, which shows control characters as escapes."""
    result = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: escape_hidden(value) if type(value) is str else value,
    )  # fmt: skip
    return _add_template_functions(result)


@functools.cache
def markdown_environment(folder: Path = _HERE) -> ImmutableSandboxedEnvironment:
    """Return the Markdown template engine, which escapes all plain strings with `escape_cell`.

    Args:
        folder: The template folder.
    """
    result = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, finalize=_escaping_finalizer(escape.escape_cell),
    )  # fmt: skip
    _add_template_functions(result)
    result.globals.update(
        interval=_wrap_as_markup(wording.format_interval), ranged=_wrap_as_markup(wording.format_with_interval)
    )
    result.filters.update({name: _wrap_as_markup(write) for name, write in _NUMBER_FILTERS.items()})
    result.filters.update(
        code=_wrap_as_markup(escape.code_span), fenced=_wrap_as_markup(escape.fenced_yaml), finished=Markup
    )
    return result


@functools.cache
def _latex_environment() -> ImmutableSandboxedEnvironment:
    # LaTeX uses braces, percent and hash signs, so the template delimiters differ.
    result = ImmutableSandboxedEnvironment(
        "<%", "%>", "<<", ">>", "<#", "#>", loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        finalize=_escaping_finalizer(escape.escape_tex),
    )  # fmt: skip
    _add_template_functions(result)
    result.filters.update(
        number=_wrap_as_markup(
            lambda value: escape.escape_tex(wording.format_number(value).replace("−", "-")).replace("-", "$-$")
        ),
        breakable=_wrap_as_markup(
            lambda text: escape.escape_tex(text).replace(r"\textbar{}", r"\textbar{}\allowbreak{}")
        ),
    )
    return result


def _escaping_finalizer(form: Callable[[str], str]) -> Callable[[object], object]:
    """Return a function that escapes printed values with ``form``."""

    def finalize(value: object) -> object:
        known = isinstance(value, Markup | Undefined | int | float)
        return value if known else Markup(form(str(value)))

    return finalize


def _wrap_as_markup(write: Callable[..., str]) -> Callable[..., Markup]:
    """Return a function whose result is inserted without escaping."""
    return lambda *args, **named: Markup(write(*args, **named))


def _add_template_functions(found: ImmutableSandboxedEnvironment) -> ImmutableSandboxedEnvironment:
    """Add the functions and filters of the templates to an engine."""
    found.globals.update(
        interval=wording.format_interval, favours=wording.describe_difference_sign,
        detectable=wording.DETECTABLE_NOTE, dash=wording.DASH,
        signs=marks.VERDICT_SIGNS, marks_of=marks.comparison_marks, has_marks=marks.has_marks,
        legend_of=marks.marks_legend,
        rule_of=marks.significance_rule, control_of=marks.best_baseline, planned_of=marks.planned_comparisons,
        exploratory_of=marks.exploratory_comparisons, exploratory_note=wording.EXPLORATORY_NOTE,
        spreads=marks.template_spreads, singles=marks.single_template_ids, single=marks.SINGLE_TEMPLATE,
        position_rows=slices.rows_with_positions, bands=slices.position_bands,
        position_says=slices.position_bias_sentences,
        bias_words=slices.describe_bias, slice_table=slices.slice_table, cost_by_row=costs.cost_by_row,
        text_tasks=texts.tasks_with_texts, samples=texts.text_samples, answered=texts.models_with_texts,
        shown_in=texts.prompts_showing_fact,
        about_choice=texts.describe_sampling, who=texts.format_user, open_texts=texts.EXPANDED_REQUESTS,
        undefined_of=wording.describe_undefined,
        contribution_of=summaries.model_contribution, unweighed=summaries.has_zero_weight, rank_words=texts.format_rank,
        kind_words=wording.INPUT_KINDS, forms=wording.ENSEMBLE_FORMS, short=shorten_line,
        not_evaluated=wording.NOT_EVALUATED,
    )  # fmt: skip
    found.filters.update(_NUMBER_FILTERS)
    found.filters.update(
        label=wording.label, title_of=wording.title, short_template=wording.short_template,
        clip=facts.truncate_long_text,
        answer=facts.format_answer, dump=facts.format_yaml, is_lower=is_lower_better, figure=wording.format_figure,
        outcome=wording.format_verdict,
        outcome_of=wording.describe_outcome, coverage=wording.format_confidence_level, arm_name=arm_name,
    )  # fmt: skip
    return found
