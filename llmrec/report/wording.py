"""Formats numbers and verdicts as text for HTML, Markdown and terminal output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmrec.display import escape_hidden, single_line
from llmrec.registry import is_family, is_lower_better
from llmrec.results import Comparison, Metric, Reads, Results, Row, Setting, Verdict, arm_name
from llmrec.tasks.family import family_of

USERS, SEEDS = 200, 3
"""The minimum number of users and of training seeds for a claim."""
DASH = "–"
UNDEFINED = "undefined"
NOT_EVALUATED = "not evaluated"
DETECTABLE_NOTE = (
    "Minimum detectable effect: the smallest true difference that the test would find with 80 % power. No significant "
    "difference does not mean that both are equal."
)
EXPLORATORY_NOTE = (
    "Exploratory comparisons were not planned. Their 95 % intervals are unadjusted, and they have no p-value and no "
    "verdict: use them to choose what to test next, not as evidence."
)
_VERDICT_WORDS: dict[Verdict, str] = {
    "shown": "significantly better",
    "contradicted": "significantly worse",
    "not shown": "no significant difference",
}
VERDICT_COLOURS: Mapping[Verdict, str] = {"shown": "green", "contradicted": "red", "not shown": "yellow"}
"""Colours of verdicts on a terminal, in addition to the words."""

INPUT_KINDS: Mapping[Reads | None, str] = {
    "events": "interactions only",
    "texts": "interactions and texts, pretrained encoder",
    "language model": "language model or fine-tuned text encoder",
    None: "",
}
"""The input of models; a claim for one kind compares with the best model of the kinds above it."""

# With a log weight of this or less, history items rank after all others.
_LAST_RANK_WEIGHT = -1e6

ENSEMBLE_FORMS: Mapping[str, str] = {
    "ranker": "gradient-boosted trees; weights are shares of the gain",
    "logit": "conditional logit model; weights are exponents",
    "ridge": "ridge regression",
    "pool": "linear combination of probabilities; weights are shares",
    "alone": "single member",
}
"""The forms of an ensemble; see `llmrec.ensembles.rankers`."""


def title(task: str) -> str:
    """Return the heading of a task."""
    return family_of(task).title if is_family(task) else task


def format_number(value: float | None, *, sign: bool = False) -> str:
    """Return a metric with three decimals, or one decimal from 10 on; a dash for None.

    With ``sign`` it is a difference or an end of its interval, and a nonzero value is never written as 0.
    """
    if value is None:
        return DASH
    digits = 3 if abs(value) < 10 else 1
    text = _format_signed(value, digits) if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


def format_figure(metric: Metric | None) -> str:
    """Return the value of a model as text: a dash if it is missing, a word if it is undefined."""
    return DASH if metric is None else UNDEFINED if metric.value is None else format_number(metric.value)


def describe_undefined(results: Results, task: str) -> list[str]:
    """Return sentences on the undefined values of a task, with their models and reasons."""
    rows = [row for row in results.rows if row.task == task]
    matches = [
        (label(row), name, entry.undefined)
        for row in rows
        for name, entry in row.metrics.items()
        if entry.value is None
    ]
    return undefined_lines(matches, len(rows), results.headline[task])


def undefined_lines(missing: Iterable[tuple[str, str, str]], rows: int, headline: str) -> list[str]:
    """Return sentences on the undefined values in a table, with reasons.

    Args:
        missing: Row, metric and reason of each; the reason is empty if unknown.
        rows: Number of rows of the table; a figure that is undefined in all of them names none.
        headline: The metric that rows are compared by.
    """
    grouped: dict[tuple[str, str], list[str]] = {}
    for row, metric, reason in missing:
        grouped.setdefault((metric, reason), []).append(row)
    lines = []
    for (metric, reason), named in grouped.items():
        of = f" of {join_words(named)}" if len(named) < rows else ""
        why = f": {reason}" if reason else ""
        more = " Models without a value are not compared." if metric == headline else ""
        lines.append(escape_hidden(f"{metric}{of} is {UNDEFINED}{why}.{more}"))
    return lines


def format_interval(low: float | None, high: float | None, *, sign: bool = False) -> str:
    """Return ``[low, high]``, or an empty text without an interval."""
    return "" if low is None or high is None else f"[{format_number(low, sign=sign)}, {format_number(high, sign=sign)}]"


def format_with_interval(value: float | None, low: float | None, high: float | None, *, sign: bool = False) -> str:
    """Return a number followed by its interval."""
    return f"{format_number(value, sign=sign)} {format_interval(low, high, sign=sign)}".rstrip()


def format_percentage(value: float | None) -> str:
    """Return a fraction as a percentage that is never rounded to 0 or 100."""
    if value is None:
        return DASH
    text = f"{100 * value:.1f}"
    if value < 1 and text == "100.0":
        return "> 99.9 %"
    return "< 0.1 %" if value > 0 and text == "0.0" else f"{text.removesuffix('.0')} %"


def format_verdict(verdict: Verdict | None) -> str:
    """Return the verdict of a comparison as shown in reports."""
    return "exploratory" if verdict is None else _VERDICT_WORDS[verdict]


def describe_outcome(entry: Comparison) -> str:
    """Return the verdict of a comparison, or the direction of its interval if it was not planned."""
    if entry.verdict is not None or entry.value is None or entry.low is None or entry.high is None:
        return format_verdict(entry.verdict)
    if entry.low <= 0 <= entry.high:
        return f"no significant difference ({format_verdict(None)})"
    return f"{'ahead' if (entry.value > 0) != is_lower_better(entry.metric) else 'behind'} ({format_verdict(None)})"


def describe_comparison(entry: Comparison, a: str, b: str) -> str:
    """Return a phrase on how two models compare, marked if the comparison was not planned.

    Args:
        entry: The comparison a - b.
        a: Name of the first row.
        b: Name of the second row.
    """
    text = describe_outcome(entry)
    if text.startswith("no "):
        return f"There is {text.replace(' difference', f' difference between {a} and {b}')}"
    if entry.verdict is not None:
        return f"{a} is {text} than {b}"
    side, _, rest = text.partition(" ")
    where = {"ahead": "ahead of", "behind": "behind"}
    return f"{a} is {where[side]} {b} on these users {rest}" if rest else f"{a} was compared with {b}, {text}"


def format_confidence_level(level: float | None) -> str:
    """Return the confidence level of an interval, such as ``98.3 %``; 95 % for exploratory ones."""
    return f"{100 * (0.95 if level is None else level):.4g} %"


def describe_history_weight(repeat: float | None) -> str:
    """Return how an ensemble treats history items; empty if they cannot be ranked.

    Args:
        repeat: The log weight.
    """
    if not repeat:
        return ""
    if repeat <= _LAST_RANK_WEIGHT:
        return "Seen items are ranked after all others."
    return f"Seen items get {repeat:+.2f} added to the log score."


def difference(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """Return a signed difference with its interval; a nonzero number is never rounded to 0."""
    if value is None or low is None or high is None:
        return DASH
    return f"{_format_signed(value, digits)} [{_format_signed(low, digits)}, {_format_signed(high, digits)}]"


def _format_signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text if value == 0 or float(text) != 0 else f"{value:+.1g}"


def format_p_value(value: float | None) -> str:
    """Return a p-value with three decimals."""
    if value is None:
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def format_count(value: float | None) -> str:
    """Return an integer with thin spaces between thousands."""
    return DASH if value is None else f"{value:,.0f}".replace(",", "\u2009")


def format_mean_count(value: float | None) -> str:
    """Return a mean of counts as text: one decimal below 100, otherwise an integer."""
    if value is None:
        return DASH
    return format_count(value) if value >= 99.95 else f"{value:.1f}".removesuffix(".0")


def describe_difference_sign(metrics: Sequence[str]) -> str:
    """Return a sentence on which sign of a difference a - b means that a is better."""
    turned = sorted({metric for metric in metrics if is_lower_better(metric)})
    if not turned:
        return "A positive difference means that a is better."
    return f"A positive difference means that a is better, except for {join_words(turned)}, where lower is better."


def format_duration(seconds: float | None) -> str:
    """Return seconds in the two largest units, such as ``6 min 1 s``."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    total = round(seconds)
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


def short_template(row: Setting) -> str:
    """Return the name of a template without its task."""
    return (row.template or "").rpartition("/")[2]


def label(row: Setting) -> str:
    """Return the label of a model, such as ``fine-tuned · likelihood · continue-list``."""
    return single_line(row.label)


def short_names(rows: Sequence[Row]) -> dict[str, str]:
    """Return short names of models by id: the method, with parameters only if several models share the method.

    A single parameter is given if it distinguishes all rows of the method.
    """
    result: dict[str, str] = {}
    for row in rows:
        alike = [entry for entry in rows if (entry.arm, entry.method) == (row.arm, row.method)]
        if row.arm != "baseline":
            result[row.id] = label(row)
        elif len(alike) == 1:
            result[row.id] = single_line(row.method)
        else:
            settings = [dict.fromkeys(_baseline_parameters(entry)) for entry in alike]
            names = sorted({one.partition("=")[0] for entry in settings for one in entry})
            columns = [
                [next((one for one in entry if one.startswith(f"{name}=")), "") for entry in settings] for name in names
            ]
            apart = next((entry for entry in columns if len({*entry}) == len(alike)), None)
            value = "" if apart is None else apart[alike.index(row)]
            result[row.id] = single_line(
                row.predictor if apart is None else f"{row.method}({value})" if value else row.method
            )
    return result


def _baseline_parameters(row: Row) -> list[str]:
    """Return the parameters in the name of a baseline, such as ``history=5``."""
    return row.predictor.partition("(")[2].removesuffix(")").split(", ")


def arm_label(arm: str, predictor: str) -> str:
    """Return the label shared by models that differ only in template, such as ``fine-tuned · likelihood``."""
    return single_line(f"{arm_name(arm)} · {predictor}")


# --------------------------------------------------------------------------- verdicts


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskVerdict:
    """The result of a task on its main metric, without ensembles that contain the language model.

    Attributes:
        best: The first row; None if no row has a value.
        rival: The best row of the other side: a baseline if a model is first, a model if a baseline is.
        lead: The comparison ``best - rival``, if it was computed.
        tuned: The comparison ``tuned - zero-shot``: the planned one, or else that of the best tuned row.
        joined: Whether an ensemble that contains the language model was excluded.
    """

    task: str
    metric: str
    best: Row | None
    rival: Row | None
    lead: Comparison | None
    tuned: Comparison | None
    joined: bool = False


def orient_comparison(comparison: Comparison, first: str) -> Comparison:
    """Return a comparison in the direction ``first - other``."""
    if comparison.a == first:
        return comparison
    turned: dict[Verdict | None, Verdict | None] = {"shown": "contradicted", "contradicted": "shown"}
    numbers = {"value": comparison.value, "low": comparison.high, "high": comparison.low}
    negative = {key: None if value is None else 0.0 - value for key, value in numbers.items()}
    sides = {"a": comparison.b, "b": comparison.a, "verdict": turned.get(comparison.verdict, comparison.verdict)}
    return comparison.model_copy(update={**negative, **sides})


def is_single_language_model(row: Row) -> bool:
    """Whether a model is a single language model, not an ensemble that contains one."""
    return row.arm != "baseline" and row.fusion is None


def rows_with_value(results: Results, task: str) -> list[Row]:
    """Return the models of a task that have a value of the main metric, best first."""
    metric = results.headline[task]
    return [row for row in results.standings(task) if metric in row.metrics and row.metrics[metric].value is not None]


def find_comparison(results: Results, first: Row | None, other: Row | None) -> Comparison | None:
    """Return the comparison ``first - other`` on the main metric, preferably a planned one."""
    if first is None or other is None:
        return None
    ends, key = {first.id, other.id}, (first.task, results.headline[first.task])
    matches = [
        orient_comparison(entry, first.id)
        for entry in results.comparisons
        if (entry.task, entry.metric) == key and {entry.a, entry.b} == ends
    ]
    return min(matches, key=lambda entry: entry.verdict is None, default=None)


def verdict(results: Results, task: str) -> TaskVerdict:
    """Return the result of a task: the best baseline and language model, and the effect of fine-tuning."""
    metric = results.headline[task]
    every = rows_with_value(results, task)
    rows = [row for row in every if row.arm == "baseline" or is_single_language_model(row)]
    best = rows[0] if rows else None
    rival = next((row for row in rows if best and (row.arm == "baseline") != (best.arm == "baseline")), None)
    headline = [entry for entry in results.comparisons if entry.task == task and entry.metric == metric]
    lead = find_comparison(results, best, rival)
    arms = {row.id: row.arm for row in results.rows}
    pairs = [
        orient_comparison(entry, entry.a if arms[entry.a] == "tuned" else entry.b)
        for entry in headline
        if {arms[entry.a], arms[entry.b]} == {"tuned", "zero-shot"}
        and not any(results.row(end).fusion for end in (entry.a, entry.b))
    ]
    order = {row.id: index for index, row in enumerate(results.standings(task))}
    pairs.sort(key=lambda entry: (entry.verdict is None, order[entry.a], order[entry.b]))
    tuned = pairs[0] if pairs else None
    joined = len(rows) < len(every)
    return TaskVerdict(task=task, metric=metric, best=best, rival=rival, lead=lead, tuned=tuned, joined=joined)


def winner_sentence(found: TaskVerdict) -> str:
    """Return a sentence on which model is best."""
    if found.best is None:
        return f"No model has a value for {found.metric}."
    score = found.best.metrics[found.metric]
    what = f"{found.metric} {format_with_interval(score.value, score.low, score.high)}"
    kind, other = ("baseline", "language model") if found.best.arm == "baseline" else ("language model", "baseline")
    start = f"The best model is a {kind}, {label(found.best)}, with {what}."
    if found.joined:
        start = f"Apart from ensembles that contain the language model: {start[0].lower()}{start[1:]}"
    if found.rival is None:
        return start
    reach = f" The best {other}, {label(found.rival)}, has {format_number(found.rival.metrics[found.metric].value)}"
    if found.lead is None:
        return f"{start}{reach}."
    return f"{start}{reach}. Difference: {format_metric_difference(found.lead)}, {format_verdict(found.lead.verdict)}."


def tuning_sentence(tally: TaskVerdict, rows: Sequence[Row]) -> str:
    """Return a sentence on the fine-tuned versus the zero-shot model, with interval and verdict."""
    if tally.tuned is None:
        tuned = any(row.task == tally.task and row.arm == "tuned" for row in rows)
        return "The fine-tuned model was not compared with zero-shot." if tuned else "This run has no fine-tuned model."
    what = {
        "shown": "Fine-tuning is significantly better than zero-shot",
        "not shown": "There is no significant difference between fine-tuned and zero-shot",
        "contradicted": "Fine-tuning is significantly worse than zero-shot",
        None: "Fine-tuned − zero-shot, exploratory",
    }[tally.tuned.verdict]
    return f"{what}: {format_metric_difference(tally.tuned)}."


def format_metric_difference(comparison: Comparison) -> str:
    """Return a difference with its metric and interval, and a note if lower is better."""
    text = f"{comparison.metric} {format_with_interval(comparison.value, comparison.low, comparison.high, sign=True)}"
    return f"{text} (lower is better)" if is_lower_better(comparison.metric) else text


def join_words(words: Sequence[str]) -> str:
    """Join words as ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"
