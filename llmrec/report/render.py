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

from llmrec.display import short, visible
from llmrec.index.diagnostics import Group
from llmrec.registry import lower
from llmrec.report import breakdowns as slices
from llmrec.report import costs, escape, index_summary, marks, texts, wording
from llmrec.report import results as facts
from llmrec.report import summary as summaries
from llmrec.report.audit import VERDICT, AuditLine, audit_sentence, refusal
from llmrec.report.canvas import Canvas
from llmrec.report.charts import pictures
from llmrec.report.plots import plots
from llmrec.results import Results, arm_name

_HERE = Path(__file__).resolve().parent
Reasons = Mapping[str, Mapping[str, int]]
"""Counts of failures by row id and reason."""
_FIGURES: dict[str, Callable[..., str]] = {
    "number": wording.number, "share": wording.share, "count": wording.count, "rough": wording.rough,
    "p": wording.p_value, "duration": wording.duration, "history_worth": wording.history_worth,
}  # fmt: skip


def html_page(
    results: Results,
    reasons: Reasons,
    audit: Sequence[AuditLine] | None,
    *,
    fix: str,
    item_index: str = "",
    neighbours: Sequence[Group] = (),
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
    return environment().get_template("page.html.j2").render(
        **_view(results, reasons, audit, fix), nonce=hashlib.sha256("".join(parts).encode()).hexdigest()[:32],
        plotted={name: pictures(plot) for name, plot in plots(results).items()}, style=style(),
        item_index=item_index, index_page=index_summary.PAGE, neighbours=neighbours,
    )  # fmt: skip


def markdown_page(results: Results, reasons: Reasons, audit: Sequence[AuditLine] | None, *, fix: str) -> str:
    """Render the Markdown page: like the HTML page without plots, example prompts and raw answers; see `html_page`."""
    return markdown_engine().get_template("report.md.j2").render(**_view(results, reasons, audit, fix))


def latex(results: Results) -> str:
    """Return a LaTeX table for each task, to be included in a paper.

    The only package needed is booktabs; the engine needs no Unicode fonts.
    """
    return _latex().get_template("table.tex.j2").render(results=results, signatures=facts.signatures(results))


def refused_pages(name: str, audit: Sequence[AuditLine]) -> dict[str, str]:
    """Return the HTML and Markdown pages of a run with a leak."""
    view = {
        "name": name, "verdict": VERDICT, "advice": refusal(audit), "audit": audit, "audited": audit_sentence(audit),
        "mend": "", "nonce": hashlib.sha256(repr(audit).encode()).hexdigest()[:32], "style": style(),
    }  # fmt: skip
    engines = {"html": environment(), "markdown": markdown_engine()}
    names = {"html": "refused.html.j2", "markdown": "refused.md.j2"}
    return {kind: engine.get_template(names[kind]).render(view) for kind, engine in engines.items()}


def picture(canvas: Canvas, name: str) -> str:
    """Return a plot as a standalone SVG file with its styles."""
    rules = style().splitlines()
    colours = rules[: rules.index("* { box-sizing: border-box; }")]
    look = "\n".join([*colours, *(line for line in rules if line.startswith(".plot ") and " svg " not in line)])
    return environment().get_template("picture.svg.j2").render(picture=canvas, name=name, style=look)


def style() -> str:
    """Return the CSS of the pages."""
    return (_HERE / "style.css").read_text("utf-8")


def _view(results: Results, reasons: Reasons, audit: Sequence[AuditLine] | None, fix: str) -> dict[str, object]:
    """Return the template variables of the HTML and Markdown pages."""
    verdicts = {task: wording.verdict(results, task) for task in results.tasks}
    headlines = {task: summaries.headline(results, task) for task in results.tasks}
    return {
        "results": results, "reasons": reasons, "verdicts": verdicts, "summary": summaries.summary(results),
        "headlines": headlines, "question": summaries.question(results, headlines.values()),
        "answers": {task: summaries.sentence(result) for task, result in headlines.items()},
        "winner": {task: wording.winner_sentence(result) for task, result in verdicts.items()},
        "tuning": {task: wording.tuning_sentence(result, results.rows) for task, result in verdicts.items()},
        "signatures": facts.signatures(results), "arms": costs.cost_by_arm(results), "made": facts.made_data(results),
        "audit": audit, "audited": audit_sentence(audit) if audit is not None else "", "mend": fix,
    }  # fmt: skip


# --------------------------------------------------------------------------- template engines


@functools.cache
def environment() -> ImmutableSandboxedEnvironment:
    """Return the HTML template engine, which shows control characters as escapes."""
    result = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: visible(value) if type(value) is str else value,
    )  # fmt: skip
    return _filled(result)


@functools.cache
def markdown_engine(folder: Path = _HERE) -> ImmutableSandboxedEnvironment:
    """Return the Markdown template engine, which escapes all plain strings with `escape.cell`.

    Args:
        folder: The template folder.
    """
    result = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, finalize=_escaped(escape.cell),
    )  # fmt: skip
    _filled(result)
    result.globals.update(interval=_finished(wording.interval), ranged=_finished(wording.with_interval))
    result.filters.update({name: _finished(write) for name, write in _FIGURES.items()})
    result.filters.update(code=_finished(escape.code), fenced=_finished(escape.fenced), finished=Markup)
    return result


@functools.cache
def _latex() -> ImmutableSandboxedEnvironment:
    # LaTeX uses braces, percent and hash signs, so the template delimiters differ.
    result = ImmutableSandboxedEnvironment(
        "<%", "%>", "<<", ">>", "<#", "#>", loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=_escaped(escape.tex),
    )  # fmt: skip
    _filled(result)
    result.filters.update(
        number=_finished(lambda value: escape.tex(wording.number(value).replace("−", "-")).replace("-", "$-$")),
        breakable=_finished(lambda text: escape.tex(text).replace(r"\textbar{}", r"\textbar{}\allowbreak{}")),
    )
    return result


def _escaped(form: Callable[[str], str]) -> Callable[[object], object]:
    """Return a function that escapes printed values with ``form``."""

    def finalize(value: object) -> object:
        known = isinstance(value, Markup | Undefined | int | float)
        return value if known else Markup(form(str(value)))

    return finalize


def _finished(write: Callable[..., str]) -> Callable[..., Markup]:
    """Return a function whose result is inserted without escaping."""
    return lambda *args, **named: Markup(write(*args, **named))


def _filled(found: ImmutableSandboxedEnvironment) -> ImmutableSandboxedEnvironment:
    """Add the functions and filters of the templates to an engine."""
    found.globals.update(
        interval=wording.interval, favours=wording.favours, detectable=wording.DETECTABLE, dash=wording.DASH,
        signs=marks.SIGNS, marks_of=marks.marks, has_marks=marks.has_marks, legend_of=marks.legend,
        rule_of=marks.rule, control_of=marks.best_baseline, planned_of=marks.planned,
        exploratory_of=marks.exploratory, exploratory_note=wording.EXPLORATORY,
        spreads=marks.spreads, singles=marks.singles, single=marks.SINGLE,
        position_rows=slices.shown_rows, bands=slices.bands, position_says=slices.sentences,
        bias_words=slices.bias_words, slice_table=slices.slice_table, cost_by_row=costs.cost_by_row,
        text_tasks=texts.text_tasks, samples=texts.samples, answered=texts.answered, shown_in=texts.shown_in,
        about_choice=texts.about_choice, who=texts.who, open_texts=texts.OPEN, undefined_of=wording.undefined,
        contribution_of=summaries.contribution, unweighed=summaries.unweighed, rank_words=texts.rank_words,
        kind_words=wording.KINDS, forms=wording.FORMS, short=short, not_evaluated=wording.NOT_EVALUATED,
    )  # fmt: skip
    found.filters.update(_FIGURES)
    found.filters.update(
        label=wording.label, title_of=wording.title, short_template=wording.short_template, clip=facts.clip,
        answer=facts.answer, dump=facts.dump, is_lower=lower, figure=wording.figure, outcome=wording.outcome,
        outcome_of=wording.outcome_of, coverage=wording.coverage, arm_name=arm_name,
    )  # fmt: skip
    return found
