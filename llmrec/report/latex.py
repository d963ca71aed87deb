"""The tables as LaTeX: booktabs, one table a task, to be included in a paper.

Text that others wrote passes `escape.tex`, so a title can neither run a command nor break a row. The file needs no
package but booktabs, and no engine with Unicode fonts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmrec.report.escape import tex
from llmrec.report.marks import Mark, best_baseline, has_marks, legend, marks, rule, word
from llmrec.report.records import Comparison, Metric, Results, Row, lower
from llmrec.report.results import signatures
from llmrec.report.wording import DASH, UNDEFINED, label, number, title, undefined

_HEAD = r"""% Tables of one run, written by llmrec. In the preamble: \usepackage{booktabs}
% Small print under a figure is its 95 % interval. Letters that not every engine can set stand as [U+XXXX].
"""
_NONE = "--"


def latex(results: Results) -> str:
    """Return one table environment a task, in the order of the report."""
    return "\n".join([_HEAD, *(_table(results, task, place) for place, task in enumerate(results.tasks, 1))])


def _table(results: Results, task: str, place: int) -> str:
    names = results.metrics(task)
    marked = marks(results, task) if has_marks(results, task) else None
    claims = [r"\shortstack[l]{Beats\\zero-shot}", r"\shortstack[l]{Beats best\\baseline}"] if marked else []
    header = ["Row", tex(names[0]), *claims, *map(tex, names[1:]), "$n$"]
    columns = "l" + "r" + "l" * len(claims) + "r" * len(names)
    best = {name: results.best(task, name) for name in names}
    rows = results.standings(task)
    models = [_row(row, names, best, marked) for row in rows if row.arm != "baseline"]
    controls = [_row(row, names, best, marked) for row in rows if row.arm == "baseline"]
    groups = [group for group in (models, controls) if group]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\footnotesize",
            r"\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{_caption(results, task)}}}",
            rf"\label{{tab:llmrec-{place}}}",
            rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"\toprule",
            f"{' & '.join(header)} \\\\",
            *(line for group in groups for line in (r"\midrule\addlinespace[3pt]", *group)),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _line(cells: Sequence[str]) -> str:
    # Room below, for figures stand on their intervals.
    return f"{' & '.join(cells)} \\\\[3pt]"


def _row(row: Row, names: Sequence[str], best: Mapping[str, float | None], marked: Mapping[str, Mark] | None) -> str:
    first, *others = (_figure(row.metrics.get(name), best[name]) for name in names)
    claims = []
    if marked is not None:
        mark = marked.get(row.id)
        claims = [_claim(mark.zero_shot if mark else None), _claim(mark.baseline if mark else None)]
    return _line([tex(label(row)), first, *claims, *others, str(row.n)])


def _claim(comparison: Comparison | None) -> str:
    said = word(comparison)
    return _NONE if said == DASH else said


def _figure(metric: Metric | None, best: float | None) -> str:
    """Return a figure above its interval; the best of a column is bold."""
    if metric is None or metric.value is None:
        return _NONE if metric is None else UNDEFINED
    value = rf"\textbf{{{_number(metric.value)}}}" if metric.value == best else _number(metric.value)
    if metric.low is None or metric.high is None:
        return value
    # In braces, since a bracket after \\ would be taken for its argument.
    return rf"\shortstack[r]{{{value}\\{{\tiny [{_number(metric.low)}, {_number(metric.high)}]}}}}"


def _number(value: float) -> str:
    return number(value).replace("−", "$-$")


def _caption(results: Results, task: str) -> str:
    """Say what was measured, on what, how rows are ordered and marked, and under which signatures."""
    metric, data = results.headline[task], results.data_of(task)
    sizes = sorted({row.n for row in results.rows if row.task == task})
    requests = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    where = f" on {data.name} ({data.users} users, {data.items} {data.noun}), split {data.split}" if data else ""
    made = ", made data" if data and data.made else ""
    control = best_baseline(results, task)
    parts = [
        f"{title(task)}{where}{made}; {requests} requests, seed {results.seed}.",
        f"Ordered by {metric} ({'lower' if lower(metric) else 'higher'} is better); language models first, then "
        "baselines; 95 % intervals under the figures; best of a column in bold.",
        f"{legend(results, task)} {rule(results)}" if has_marks(results, task) else "",
        f"Best baseline: {label(control)}." if control and not has_marks(results, task) else "",
        *undefined(results, task),
        results.detectable.get(task, ""),
        f"Candidates: {_digest(results, task)}." if _digest(results, task) else "",
    ]
    said = " ".join(tex(part) for part in parts if part)
    protocols = "; ".join(
        rf"{tex(', '.join(names))}: \texttt{{{_breakable(protocol)}}}"
        for protocol, names in signatures(results)[task].items()
    )
    return f"{said} Signatures: {protocols}."


def _digest(results: Results, task: str) -> str:
    return next((row.candidates[:12] for row in results.rows if row.task == task and row.candidates), "")


def _breakable(signature: str) -> str:
    """Return a signature that may break after each of its parts."""
    return tex(signature).replace(r"\textbar{}", r"\textbar{}\allowbreak{}")
