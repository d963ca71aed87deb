"""Numbers and verdicts in plain words, shared by the page, the Markdown and the console."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmrec.registry import TASKS
from llmrec.report.escape import flat, visible
from llmrec.results import Comparison, Metric, Results, Row, Verdict, lower
from llmrec.tasks.family import family_of

TRIVIAL = frozenset(
    {
        *("random", "popularity", "recent-popularity", "markov-1", "markov", "markov-cooccurrence"),
        *("global-mean", "user-mean", "item-mean", "frequent-text", "like-ratio"),
    }
)
"""Controls that only count: no neighbours, no factors, no weights."""
DASH = "–"
UNDEFINED = "undefined"
DETECTABLE = "Detectable: the smallest true difference that the comparison would show in 80 of 100 repetitions."


def title(task: str) -> str:
    """Return a task's heading."""
    return family_of(task).title if task in TASKS else task


def number(value: float | None, *, sign: bool = False) -> str:
    """Return a metric with three decimals, or one from 10 on; a dash where there is none."""
    if value is None:
        return DASH
    text = f"{value:{'+' if sign else ''}.{3 if abs(value) < 10 else 1}f}"
    return text.replace("-", "−")


def figure(metric: Metric | None) -> str:
    """Return a row's figure: a dash for a metric that it does not have, a word for one that is not defined."""
    return DASH if metric is None else UNDEFINED if metric.value is None else number(metric.value)


def undefined(results: Results, task: str) -> list[str]:
    """Say which figures of a task are not defined, of which rows and why."""
    rows = [row for row in results.rows if row.task == task]
    found = [
        (label(row), name, each.undefined) for row in rows for name, each in row.metrics.items() if each.value is None
    ]
    return undefined_lines(found, len(rows), results.headline[task])


def undefined_lines(found: Iterable[tuple[str, str, str]], rows: int, headline: str) -> list[str]:
    """Say which figures of a table are not defined, and why.

    Args:
        found: Row, metric and reason of each; the reason is empty in results that do not say.
        rows: How many rows the table has; a figure of all of them names none.
        headline: The metric that rows are compared by.
    """
    grouped: dict[tuple[str, str], list[str]] = {}
    for row, metric, reason in found:
        grouped.setdefault((metric, reason), []).append(row)
    lines = []
    for (metric, reason), named in grouped.items():
        of = f" of {listed(named)}" if len(named) < rows else ""
        why = f": {reason}" if reason else ""
        more = " Nothing is compared with what has no figure." if metric == headline else ""
        lines.append(visible(f"{metric}{of} is {UNDEFINED}{why}.{more}"))
    return lines


def interval(low: float | None, high: float | None, *, sign: bool = False) -> str:
    """Return ``[low, high]``, or an empty string where there is no interval."""
    return "" if low is None or high is None else f"[{number(low, sign=sign)}, {number(high, sign=sign)}]"


def with_interval(value: float | None, low: float | None, high: float | None, *, sign: bool = False) -> str:
    """Return a number followed by its interval."""
    return f"{number(value, sign=sign)} {interval(low, high, sign=sign)}".rstrip()


def share(value: float | None) -> str:
    """Return a fraction as a percentage that never rounds to 0 or 100 unless it is."""
    if value is None:
        return DASH
    text = f"{100 * value:.1f}"
    if value < 1 and text == "100.0":
        return "> 99.9 %"
    return "< 0.1 %" if value > 0 and text == "0.0" else f"{text.removesuffix('.0')} %"


def p_value(value: float | None) -> str:
    """Return a p value with three decimals."""
    if value is None:
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def count(value: float | None) -> str:
    """Return a whole number with thin spaces between thousands."""
    return DASH if value is None else f"{value:,.0f}".replace(",", "\u2009")


def rough(value: float | None) -> str:
    """Return a mean of counts: one decimal below 100, a whole number from there on."""
    if value is None:
        return DASH
    return count(value) if value >= 99.95 else f"{value:.1f}".removesuffix(".0")


def favours(metrics: Sequence[str]) -> str:
    """Say which sign of a difference a - b is in favour of a."""
    turned = sorted({metric for metric in metrics if lower(metric)})
    if not turned:
        return "A positive difference favours a."
    return f"A positive difference favours a, except for {listed(turned)}, where lower is better."


def duration(seconds: float | None) -> str:
    """Return seconds as the two largest units, such as ``6 min 1 s``."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def short_template(row: Row) -> str:
    """Return a template's name without its family."""
    return (row.template or "").rpartition("/")[2]


def label(row: Row) -> str:
    """Return what tells a row from its neighbours, such as ``tuned · likelihood · continue-list``."""
    parts = [row.predictor if row.arm == "baseline" else arm_label(row.arm, row.predictor)]
    if row.template:
        parts.append(short_template(row))
    return flat(" · ".join(parts))


def arm_label(arm: str, predictor: str) -> str:
    """Return what rows that differ only in their template share, such as ``tuned · likelihood``."""
    return flat(f"{arm} · {predictor}")


# --------------------------------------------------------------------------- verdicts


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskVerdict:
    """How one task came out on its headline metric.

    Attributes:
        best: The first row; None if no row has a value.
        rival: The best row of the other side: a baseline if a model is first, a model if a baseline is.
        lead: The comparison ``best - rival``, if it was computed.
        tuned: The comparison of the best tuned row with its zero-shot row, as ``tuned - zero-shot``.
        pairs: All comparisons of a tuned with a zero-shot row, in the same direction.
    """

    task: str
    metric: str
    best: Row | None
    rival: Row | None
    lead: Comparison | None
    tuned: Comparison | None
    pairs: tuple[Comparison, ...]

    @property
    def control(self) -> str:
        """What kind of baseline is first: ``trivial control``, ``classic baseline`` or nothing."""
        if self.best is None or self.best.arm != "baseline":
            return ""
        return "trivial control" if self.best.method in TRIVIAL else "classic baseline"


def facing(comparison: Comparison, first: str) -> Comparison:
    """Return a comparison as ``first - other``."""
    if comparison.a == first:
        return comparison
    turned: dict[Verdict, Verdict] = {"shown": "contradicted", "contradicted": "shown", "not shown": "not shown"}
    negative = {key: None if value is None else -value for key, value in _numbers(comparison).items()}
    return comparison.model_copy(
        update={
            "a": comparison.b,
            "b": comparison.a,
            "value": negative["value"],
            "low": negative["high"],
            "high": negative["low"],
            "verdict": turned[comparison.verdict],
        }
    )


def _numbers(comparison: Comparison) -> dict[str, float | None]:
    return {"value": comparison.value, "low": comparison.low, "high": comparison.high}


def verdict(results: Results, task: str) -> TaskVerdict:
    """Work out who is first on a task, and what tuning did."""
    metric = results.headline[task]
    rows = [row for row in results.standings(task) if metric in row.metrics and row.metrics[metric].value is not None]
    best = rows[0] if rows else None
    rival = next((row for row in rows if best and (row.arm == "baseline") != (best.arm == "baseline")), None)
    headline = [entry for entry in results.comparisons if entry.task == task and entry.metric == metric]
    ends = {best.id, rival.id} if best and rival else None
    lead = next((facing(entry, best.id) for entry in headline if best and {entry.a, entry.b} == ends), None)
    arms = {row.id: row.arm for row in results.rows}
    pairs = [
        facing(entry, entry.a if arms[entry.a] == "tuned" else entry.b)
        for entry in headline
        if {arms[entry.a], arms[entry.b]} == {"tuned", "zero-shot"}
    ]
    order = {row.id: place for place, row in enumerate(results.standings(task))}
    pairs.sort(key=lambda entry: (order[entry.a], order[entry.b]))
    tuned = pairs[0] if pairs else None
    return TaskVerdict(task=task, metric=metric, best=best, rival=rival, lead=lead, tuned=tuned, pairs=tuple(pairs))


def winner_sentence(found: TaskVerdict) -> str:
    """Say which row is first, and plainly so if it is a control."""
    if found.best is None:
        return f"No row has a value for {found.metric}."
    score = found.best.metrics[found.metric]
    what = f"{found.metric} {with_interval(score.value, score.low, score.high)}"
    if found.best.arm == "baseline":
        start = f"A {found.control} wins: {label(found.best)}, with {what}."
    else:
        start = f"A language-model row wins: {label(found.best)}, with {what}."
    if found.rival is None:
        return start
    other = "language-model row" if found.best.arm == "baseline" else "baseline"
    reach = f" The best {other}, {label(found.rival)}, reaches {number(found.rival.metrics[found.metric].value)}"
    if found.lead is None:
        return f"{start}{reach}."
    return f"{start}{reach}; the difference, {_difference(found.lead)}, is {_as_word(found.lead.verdict)}."


def tuning_sentence(found: TaskVerdict, rows: Sequence[Row]) -> str:
    """Say whether the tuned row beat its zero-shot row, with interval and verdict."""
    if found.tuned is None:
        tuned = any(row.task == found.task and row.arm == "tuned" for row in rows)
        return "No tuned row was compared with a zero-shot row." if tuned else "This run has no tuned row."
    change = f"{_difference(found.tuned)}, verdict: {found.tuned.verdict}"
    start = {
        "shown": "Tuning beat zero-shot",
        "not shown": "It is not shown that tuning beat zero-shot",
        "contradicted": "Tuning made it worse than zero-shot",
    }[found.tuned.verdict]
    shown = sum(entry.verdict == "shown" for entry in found.pairs)
    more = f" Over all {len(found.pairs)} pairs it is shown in {shown}." if len(found.pairs) > 1 else ""
    return f"{start}: {change}.{more}"


def _difference(comparison: Comparison) -> str:
    text = f"{comparison.metric} {with_interval(comparison.value, comparison.low, comparison.high, sign=True)}"
    return f"{text} (lower is better)" if lower(comparison.metric) else text


def _as_word(outcome: str) -> str:
    """Write a lead's verdict; the first row cannot be shown to be worse on the metric that made it first."""
    return {"shown": "shown", "not shown": "not shown to be more than chance", "contradicted": "contradicted"}[outcome]


def summary(results: Results) -> str:
    """Return the opening paragraph: what was run, what tuning did, and where a control is ahead."""
    verdicts = [verdict(results, task) for task in results.tasks]
    return " ".join((_what_ran(results), _tuning_tally(verdicts), _control_tally(verdicts)))


def _what_ran(results: Results) -> str:
    model = visible(results.model_name or "The model")
    main, training = results.data.get("main"), results.training
    where, how = "", "was not tuned"
    if main:
        size = f"{count(main.users)} users, {count(main.items)} {visible(main.noun)}"
        where = f" on {visible(main.name)} ({size})"
    if training:
        how = f"was tuned ({training.method}, {count(training.steps)} steps, {duration(training.seconds)})"
    several = "one task" if len(results.tasks) == 1 else f"{len(results.tasks)} tasks"
    return f"{model} {how} and measured{where} in {several}."


def _tuning_tally(verdicts: Sequence[TaskVerdict]) -> str:
    tested = [found for found in verdicts if found.tuned]
    if not tested:
        return "Tuned and zero-shot rows were not compared."
    groups = {
        name: [title(found.task) for found in tested if found.tuned and found.tuned.verdict == name]
        for name in ("shown", "not shown", "contradicted")
    }
    parts = [f"tuning beat zero-shot in {len(groups['shown'])} of {len(tested)} tasks ({listed(groups['shown'])})"]
    if not groups["shown"]:
        parts = [f"tuning is not shown to beat zero-shot in any of {len(tested)} tasks"]
    elif groups["not shown"]:
        parts.append(f"this is not shown in {listed(groups['not shown'])}")
    if groups["contradicted"]:
        parts.append(f"it made {listed(groups['contradicted'])} worse")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _control_tally(verdicts: Sequence[TaskVerdict]) -> str:
    ahead = [found for found in verdicts if found.control and found.best]
    if not ahead:
        return "No trivial control or classic baseline is ahead of the best language-model row in any task."
    named = [f"{title(found.task)} ({label(found.best)}, a {found.control})" for found in ahead if found.best]
    several = "the only task" if len(verdicts) == 1 else f"{len(ahead)} of {len(verdicts)} tasks"
    return f"A baseline is ahead of every language-model row in {several}: {listed(named)}."


def listed(words: Sequence[str]) -> str:
    """Return words as ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"
