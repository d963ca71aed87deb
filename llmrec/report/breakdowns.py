"""Results on subsets of test cases, and by the position of the target among the candidates.

Each task has one compact table of slices, with the best row of each setting and the best baseline. Neighbouring
positions are pooled into bands of about twenty requests. Intervals of bands assume independent requests, which holds if
each user has one: Wilson's for the share of hits (JASA 1927), which has a width even if all or no requests hit, and
Student's for the mean rank.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from scipy.special import stdtrit

from llmrec.guard import clean
from llmrec.metrics.stats import wilson_interval
from llmrec.registry import is_lower_better
from llmrec.report.marks import best_baseline
from llmrec.report.wording import DASH, arm_label, format_p_value, join_words, label
from llmrec.results import LANGUAGE_MODEL_ARMS, Metric, PositionBias, PositionResult, Results, Row, SliceOfRow

_SLICE_TITLES = (
    (r"item:cold-below-(\d+)", "Rare items: fewer than {0} training interactions"),
    (r"item:warm-from-(\d+)", "Warm items: {0} training interactions or more"),
    (r"item:head-(0?\.\d+)", "Head items: the most popular, with {share} of training interactions"),
    (r"item:long-tail-(0?\.\d+)", "Long-tail items: all others"),
    (r"count:0-0", "Targets without training interactions"),
    (r"count:(\d+)-(\d+)", "Targets with {0} to {1} training interactions"),
    (r"count:from-(\d+)", "Targets with {0} training interactions or more"),
    (r"words:(\d+)-(\d+)", "Targets with {0} to {1} words of title and fields"),
    (r"words:from-(\d+)", "Targets with {0} words of title and fields or more"),
    (r"history:(\d+)-(\d+)", "History of {0} to {1} interactions"),
    (r"history:from-(\d+)", "History of {0} interactions or more"),
    (r"activity:(\d+)-(\d+)", "Users with {0} to {1} training interactions"),
    (r"activity:from-(\d+)", "Users with {0} training interactions or more"),
    (r"age:quarter-1", "Soonest after training: first quarter of held-out interactions"),
    (r"age:quarter-([23])", "Later: quarter {0} of held-out interactions"),
    (r"age:quarter-4", "Latest: last quarter of held-out interactions"),
    (r"user:([^:=]+)=([^:=]+)", "Users with {0}: {1}"),
    (r"user:([^:=]+):other", "Users with a less frequent {0}"),
    (r"user:([^:=]+):below-([^:=]+)", "Users with {0} below {1}"),
    (r"user:([^:=]+):([^:=]+)-to-([^:=]+)", "Users with {0} from {1} to below {2}"),
    (r"user:([^:=]+):from-([^:=]+)", "Users with {0} from {1} on"),
    (r"user:([^:=]+):none", "Users without {0}"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceLine:
    """A subset of test cases: one line of the table, with a value for each model.

    Attributes:
        users: Number of their users, if known.
        small: Whether there are too few cases for a conclusion.
        figures: One figure for each row; None for a row without one.
        best: The best value among them; None with few cases or fewer than two values.
    """

    title: str
    n: int
    users: int | None
    small: bool
    figures: tuple[Metric | None, ...]
    best: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceTable:
    """The table of results on subsets for one task.

    Attributes:
        rows: The columns: the best row of each setting, then the best baseline.
        lines: Slices with cases.
        empty: Names, in words, of slices without cases.
    """

    metric: str
    rows: tuple[Row, ...]
    lines: tuple[SliceLine, ...]
    empty: tuple[str, ...]


def slice_title(name: str) -> str:
    """Return the readable name of a subset; unknown names are returned unchanged."""
    for pattern, words in _SLICE_TITLES:
        match = re.fullmatch(pattern, name)
        if match:
            share = f"{100 * float(match[1]):g} %" if "{share}" in words else ""
            # Names and values of user attributes are percent-encoded and untrusted.
            return words.format(*(clean(unquote(part)) for part in match.groups()), share=share)
    return name


def slice_table(results: Results, task: str) -> SliceTable | None:
    """Return the table of results on subsets for a task, or None if there are none."""
    rows = [row for row in _best_rows(results, task) if row.slices]
    if not rows:
        return None
    metric = _slice_metric(results, task, rows)
    names = dict.fromkeys(part.name for row in rows for part in row.slices)
    lines, empty = [], []
    for name in names:
        parts = [next((part for part in row.slices if part.name == name), None) for row in rows]
        first = next(part for part in parts if part is not None)
        if first.n:
            lines.append(_slice_line(first, [part.metrics.get(metric) if part else None for part in parts], metric))
        else:
            empty.append(slice_title(name))
    return SliceTable(metric=metric, rows=tuple(rows), lines=tuple(lines), empty=tuple(empty))


def _best_rows(results: Results, task: str) -> list[Row]:
    standings = results.standings(task)
    matches = [
        next((row for row in standings if row.arm == arm and row.fusion is None), None) for arm in LANGUAGE_MODEL_ARMS
    ]
    return [row for row in (*matches, best_baseline(results, task)) if row is not None]


def _slice_metric(results: Results, task: str, rows: list[Row]) -> str:
    """Return the metric that is shown for subsets: the main metric, if it is available."""
    carried = dict.fromkeys(name for row in rows for part in row.slices for name in part.metrics)
    headline = results.headline[task]
    return headline if headline in carried else next(iter(carried), headline)


def _slice_line(part: SliceOfRow, figures: list[Metric | None], metric: str) -> SliceLine:
    values = [figure.value for figure in figures if figure is not None and figure.value is not None]
    chosen = len(set(values)) > 1 and not part.small
    return SliceLine(
        title=slice_title(part.name),
        n=part.n,
        users=part.users,
        small=part.small,
        # A single case has no variance, so there is no interval.
        figures=tuple(figures if part.n > 1 else map(_without_interval, figures)),
        best=(min(values) if is_lower_better(metric) else max(values)) if chosen else None,
    )


def _without_interval(figure: Metric | None) -> Metric | None:
    return figure and figure.model_copy(update={"low": None, "high": None})


# --------------------------------------------------------------------------- position bias


_REQUESTS_PER_BAND = 20  # approximately
_ALPHA = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Requests with the target at positions ``first`` to ``last``: hit rate and mean rank with 95 % intervals."""

    first: int
    last: int
    n: int
    hit: float
    hit_low: float
    hit_high: float
    rank: float
    rank_low: float | None
    rank_high: float | None

    @property
    def name(self) -> str:
        """The positions as text, such as ``5–8``."""
        return str(self.first) if self.first == self.last else f"{self.first}–{self.last}"

    @property
    def middle(self) -> float:
        """The mean position."""
        return (self.first + self.last) / 2

    @property
    def mean_rank(self) -> str:
        """The mean rank with one decimal, since a few requests justify no more."""
        return f"{self.rank:.1f}"

    @property
    def rank_bounds(self) -> str:
        """The confidence interval of the mean rank; empty for a single request."""
        low, high = self.rank_low, self.rank_high
        return "" if low is None or high is None else f"[{low:.1f}, {high:.1f}]".replace("-", "−")


def rows_with_positions(results: Results, task: str) -> tuple[Row, ...]:
    """Return the language models with results by position, and the best baseline for comparison.

    Classic recommenders do not see the order of their candidates, so a run of these alone has no such rows.
    """
    rows = [row for row in results.rows if row.task == task and row.arm != "baseline" and position_bands(row)]
    control = best_baseline(results, task)
    return (*rows, *([control] if rows and control is not None and position_bands(control) else []))


def position_bands(row: Row) -> tuple[Band, ...]:
    """Combine neighbouring positions into groups of about equal width."""
    entries = sorted((entry for entry in row.by_position if _is_complete(entry)), key=lambda entry: entry.position)
    if not entries:
        return ()
    last = entries[-1].position
    count = min(len(entries), max(2, sum(entry.n for entry in entries) // _REQUESTS_PER_BAND))
    edges = [round(index * last / count) for index in range(count + 1)]
    results = []
    for low, high in itertools.pairwise(edges):
        group = [entry for entry in entries if low < entry.position <= high]
        if group:
            results.append(_pool_positions(low + 1, high, group))
    return tuple(results)


def _is_complete(entry: PositionResult) -> bool:
    return entry.n > 0 and entry.position > 0 and entry.hit is not None and entry.rank is not None


def _pool_positions(first: int, last: int, entries: Sequence[PositionResult]) -> Band:
    n = sum(entry.n for entry in entries)
    hit = sum(entry.n * (entry.hit or 0.0) for entry in entries) / n
    rank = sum(entry.n * (entry.rank or 0.0) for entry in entries) / n
    # Sums of squares within and between positions, as in an analysis of variance.
    squares = sum(
        (entry.n - 1) * (entry.rank_sd or 0.0) ** 2 + entry.n * ((entry.rank or 0.0) - rank) ** 2 for entry in entries
    )
    half = float(stdtrit(n - 1, 0.975)) * math.sqrt(squares / (n - 1) / n) if n > 1 else None
    low, high = wilson_interval(hit, n)
    return Band(
        first=first,
        last=last,
        n=n,
        hit=hit,
        hit_low=low,
        hit_high=high,
        rank=rank,
        rank_low=None if half is None else rank - half,
        rank_high=None if half is None else rank + half,
    )


def position_bias_sentences(results: Results, task: str) -> tuple[str, ...]:
    """Return sentences that name the language models with and without significant position bias.

    Rows that differ only in their template are named together.
    """
    tested = [row for row in results.rows if row.task == task and row.position_bias is not None]
    biased, others = ([row for row in tested if _is_biased(row) == way] for way in (True, False))
    if not tested:
        return ()
    if not biased:
        return ("No language model has a significant position bias.",)
    result = (
        "Significant position bias (the rank of the target depends on its position among the candidates): "
        f"{_format_model_names(biased, tested)}."
    )
    return (result, *([f"No significant position bias: {_format_model_names(others, tested)}."] if others else []))


def describe_bias(bias: PositionBias) -> str:
    """Describe how much of the variance of ranks the position explains, with the corrected p-value."""
    return _describe_biases([bias])


def _is_biased(row: Row) -> bool:
    return row.position_bias is not None and row.position_bias.p is not None and row.position_bias.p <= _ALPHA


def _format_model_names(rows: Sequence[Row], tested: Sequence[Row]) -> str:
    """Return the names of models, with the size of the position bias if it is significant."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.predictor), []).append(row)
    results = []
    for (arm, predictor), group in groups.items():
        of = sum((row.arm, row.predictor) == (arm, predictor) for row in tested)
        share = ("both" if of == 2 else f"all {of}") if len(group) == of else f"{len(group)} of {of}"
        name = label(group[0]) if of == 1 else f"{arm_label(arm, predictor)} with {share} templates"
        explained = _describe_biases([row.position_bias for row in group if row.position_bias])
        results.append(f"{name} ({explained})" if _is_biased(group[0]) else name)
    return join_words(results)


def _describe_biases(biases: Sequence[PositionBias]) -> str:
    shares, expected, rhos = ([getattr(bias, name) for bias in biases] for name in ("share", "chance", "rho"))
    known = [bias.p for bias in biases if bias.p is not None]
    p = format_p_value(max(known, default=None))
    is_p = p if p[0] in f"<{DASH}" else f"= {p}" if len(known) == 1 else f"at most {p}"
    return (
        f"{_format_range(shares, _format_percent)} of the variance of the rank, "
        f"{_format_range(expected, _format_percent)} expected by "
        f"chance; rank correlation {_format_range(rhos, _format_signed)}; corrected p {is_p}"
    )


def _format_range(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    """Return the smallest and the largest value as text."""
    known = sorted(value for value in values if value is not None)
    ends = list(dict.fromkeys(text(value) for value in known[:1] + known[-1:]))
    return " to ".join(ends) or DASH


def _format_percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _format_signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
