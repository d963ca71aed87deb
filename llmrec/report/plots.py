"""The data of the plots of a run's report.

`llmrec.report.charts` draws them.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from llmrec.display import single_line
from llmrec.entries import MetricDirection
from llmrec.records import CheckpointSelection, Training
from llmrec.registry import is_lower_better, metric_direction
from llmrec.report import summary
from llmrec.report.breakdowns import rows_with_positions
from llmrec.report.costs import cost_by_row
from llmrec.report.marks import best_baseline
from llmrec.report.wording import (
    format_duration,
    format_mean_count,
    format_metric_difference,
    format_number,
    format_verdict,
    format_with_interval,
    join_words,
    label,
    title,
)
from llmrec.results import Results, Row, Verdict


class Bar(TypedDict):
    """A value with its confidence interval, if any, and both as text."""

    label: str
    value: float
    low: float | None
    high: float | None
    text: str


class RowBar(Bar):
    """A bar for a model: its value, confidence interval and kind of model."""

    arm: str


class Forest(TypedDict):
    """The models of a forest plot, best first, and a reference value."""

    kind: Literal["forest"]
    metric: str
    better: MetricDirection
    rows: list[RowBar]
    reference: float | None


class Difference(Bar):
    """The difference between model and baseline for a task; above 0 is better."""

    beside: str
    detectable: float | None
    verdict: Verdict | None


class Differences(TypedDict):
    """Gains of models over their baselines by task, with the unit of the axis."""

    kind: Literal["differences"]
    unit: str
    sides: str
    rows: list[Difference]


class Bars(TypedDict):
    """Bars from zero: ensemble weights, largest first, or seconds of stages in order."""

    kind: Literal["bars"]
    unit: str
    bars: list[Bar]


class Series(TypedDict):
    """A line over optimiser steps."""

    name: str
    kind: str
    x: list[int]
    y: list[float]


class Lines(TypedDict):
    """Several lines with a common unit."""

    kind: Literal["lines"]
    unit: str
    series: list[Series]


class Positions(TypedDict):
    """Models with results by position of the true item, and the baseline for comparison."""

    kind: Literal["positions"]
    rows: list[Row]
    control: Row | None


class CostPoint(RowBar):
    """A model with its token cost."""

    tokens: float
    short: str


class CostPlot(TypedDict):
    """Quality against tokens per user, with a labelled line for every model that uses no tokens."""

    kind: Literal["cost"]
    metric: str
    better: MetricDirection
    points: list[CostPoint]
    levels: dict[str, float]


Plot = Differences | Forest | Bars | Lines | Positions | CostPlot


def make_bar(label: str, value: float, low: float | None, high: float | None) -> Bar:
    """Return a bar whose text is the value with its interval."""
    text = format_with_interval(value, low, high)
    return {"label": single_line(label), "value": value, "low": low, "high": high, "text": text}


def report_plots(results: Results) -> dict[str, Plot]:
    """Return the data of all plots by the id of their HTML element, without plots of a single bar."""
    result: dict[str, Plot] = {}
    gains = differences_plot(results)
    if gains["rows"]:
        result["differences"] = gains
    for index, task in enumerate(results.tasks, 1):
        result[f"forest-{index}"] = forest_plot(results, task)
        for number_of, row in enumerate((row for row in results.standings(task) if row.fusion), 1):
            result[f"weights-{index}-{number_of}"] = weights_plot(row)
        positions, cost = positions_plot(results, task), cost_plot(results, task)
        if positions["rows"]:
            result[f"positions-{index}"] = positions
        if cost:
            result[f"cost-{index}"] = cost
    if results.training and results.training.log:
        result["training-loss"] = loss_plot(results)
        result |= {f"training/{name}": logged_value_plot(results.training, name) for name in results.training.figured}
        if results.training.judged is not None:
            result["training-ndcg"] = validation_ndcg_plot(results.training, results.training.judged)
        if any(line.reward is not None for line in results.training.log):
            result["training-reward"] = reward_plot(results.training)
        if any(line.tokens_per_second is not None for line in results.training.log):
            result["training-speed"] = speed_plot(results)
    if results.budget:
        result["budget"] = stage_seconds_plot(results)
    return {name: plot for name, plot in result.items() if plot["kind"] != "bars" or len(plot["bars"]) > 1}


def forest_plot(results: Results, task: str) -> Forest:
    """Return the models of a task with intervals, best first, and the best baseline as reference."""
    metric = results.headline[task]
    rows: list[RowBar] = []
    for row in results.standings(task):
        score = row.metrics.get(metric)
        if score is not None and score.value is not None:
            rows.append({**make_bar(label(row), score.value, score.low, score.high), "arm": row.arm})
    control = next((row for row in rows if row["arm"] == "baseline"), None)
    return {
        "kind": "forest",
        "metric": single_line(metric),
        "better": metric_direction(metric),
        "rows": rows,
        "reference": control and control["value"],
    }


def differences_plot(results: Results) -> Differences:
    """Return the gain over the baseline for each task.

    If all families have the same metric, the unit is that metric; otherwise, the percentage of the control's figure.
    """
    matches = [summary.headline(results, task) for task in results.tasks]
    matches = [entry for entry in matches if entry.difference is not None and entry.difference.value is not None]
    metrics = {entry.metric for entry in matches}
    unit = f"difference in {single_line(*metrics)}" if len(metrics) == 1 else "difference, % of the baseline"
    rows = [_difference_bar(entry, share=len(metrics) > 1) for entry in matches]
    turned = sorted(single_line(metric) for metric in metrics if is_lower_better(metric))
    sides = f"better → ({join_words(turned)}: sign reversed, lower is better)" if turned else "better →"
    return {"kind": "differences", "unit": unit, "sides": sides, "rows": [row for row in rows if row]}


def _difference_bar(headline: summary.Headline, *, share: bool) -> Difference | None:
    """Return the gain of a task over its baseline; None if undefined."""
    entry, model, control = headline.difference, headline.model, headline.control
    if entry is None or entry.value is None or model is None or control is None:
        return None
    reference = headline.relative_to if share else None
    if share and reference is None:
        return None
    scale = 1.0 if reference is None else 100.0 / reference
    ends = [end for end in (entry.low, entry.high) if end is not None]
    bounds = sorted(summary.gain(headline.metric, end) * scale for end in ends)
    return {
        "label": single_line(title(headline.task)),
        "beside": single_line(" − ".join(headline.names)),
        "value": summary.gain(headline.metric, entry.value) * scale,
        "low": bounds[0] if len(bounds) == 2 else None,
        "high": bounds[1] if len(bounds) == 2 else None,
        "detectable": None if entry.detectable is None else entry.detectable * scale,
        "verdict": entry.verdict,
        "text": single_line(f"{format_metric_difference(entry)}, {format_verdict(entry.verdict)}"),
    }


def weights_plot(row: Row) -> Bars:
    """Return the ensemble weights as a bar chart, largest first."""
    parts = row.fusion.parts if row.fusion else ()
    bars = [make_bar(part.name, part.weight or 0.0, part.low, part.high) for part in parts]
    return {"kind": "bars", "unit": "weight", "bars": sorted(bars, key=lambda bar: -abs(bar["value"]))}


def loss_plot(results: Results) -> Lines:
    """Return the training loss and the validation loss of each task by optimiser step."""
    log = results.training.log if results.training else ()
    names = dict.fromkeys(name for line in log for name in (line.valid_loss or {}))
    series = [_line_series("training", "train", [(line.step, line.loss) for line in log])]
    for name in names:
        points = [(line.step, (line.valid_loss or {}).get(name)) for line in log]
        series.append(_line_series(f"valid: {title(name)}", "valid", points))
    # A preference loss is a mean over lists, and the loss with rewards is that of a policy gradient.
    other = results.training is not None and (results.training.figured or any(line.reward for line in log))
    return {"kind": "lines", "unit": "loss" if other else "loss, nats per token", "series": series}


def logged_value_plot(training: Training, name: str) -> Lines:
    """Return a logged value by optimiser step."""
    points = [(line.step, (line.figures or {}).get(name)) for line in training.log]
    return {"kind": "lines", "unit": name, "series": [_line_series(name, "train", points)]}


def validation_ndcg_plot(training: Training, judge: CheckpointSelection) -> Lines:
    """Return the validation NDCG@10 of the model by optimiser step, and of the baselines.

    Of these, popularity, the best single one and their ensembles are drawn.
    """
    points = [(line.step, line.valid_ndcg) for line in training.log]
    shown = [name for name in judge.controls if name == "popularity" or name.startswith("fusion")]
    single = [name for name in judge.controls if not name.startswith("fusion")]
    best = max(single, key=lambda name: judge.controls[name], default="popularity")
    steps = [step for step, value in points if value is not None]
    ends = (min(steps, default=0), max(steps, default=0))
    series = [_line_series("this model", "train", points)]
    for name in [name for name in judge.controls if name in (*shown, best)]:
        series.append(_line_series(name, "valid", [(step, judge.controls[name]) for step in ends]))
    return {"kind": "lines", "unit": "validation NDCG@10", "series": series}


def reward_plot(training: Training) -> Lines:
    """Return the rewards of rollouts by optimiser step, with diagnostics of the learning signal."""
    names = {
        "mean reward": "reward",
        "groups with the true item": "hit",
        "groups without an advantage": "zero",
        "divergence, nats": "kl",
    }
    log = [(line.step, line.reward) for line in training.log if line.reward is not None]
    series = [
        _line_series(
            label, "train" if name == "reward" else "valid", [(step, getattr(entry, name)) for step, entry in log]
        )
        for label, name in names.items()
    ]
    return {"kind": "lines", "unit": "rollouts per step", "series": series}


def speed_plot(results: Results) -> Lines:
    """Return training tokens per second by optimiser step."""
    log = results.training.log if results.training else ()
    # no tokens were read before the first step
    points = [(line.step, line.tokens_per_second or None) for line in log]
    return {"kind": "lines", "unit": "tokens/s", "series": [_line_series("tokens/s", "speed", points)]}


def _line_series(name: str, kind: str, points: list[tuple[int, float | None]]) -> Series:
    defined = [(step, value) for step, value in points if value is not None]
    return {
        "name": single_line(name),
        "kind": kind,
        "x": [step for step, _ in defined],
        "y": [value for _, value in defined],
    }


def stage_seconds_plot(results: Results) -> Bars:
    """Return the seconds of each stage, in the order of execution."""
    bars: list[Bar] = [
        {
            "label": single_line(entry.stage),
            "value": entry.seconds,
            "low": None,
            "high": None,
            "text": format_duration(entry.seconds),
        }
        for entry in results.budget
    ]
    return {"kind": "bars", "unit": "seconds", "bars": bars}


def positions_plot(results: Results, task: str) -> Positions:
    """Return HR@1 and mean rank by target position, for language models and the best baseline."""
    rows = rows_with_positions(results, task)
    return {
        "kind": "positions",
        "rows": [row for row in rows if row.arm != "baseline"],
        "control": next((row for row in rows if row.arm == "baseline"), None),
    }


def cost_plot(results: Results, task: str) -> CostPlot | None:
    """Return the main metric of language models and their tokens per user; None if no model used tokens."""
    metric = results.headline[task]
    points: list[CostPoint] = []
    for cost in cost_by_row(results, task):
        score = cost.row.metrics.get(metric)
        if cost.row.arm == "baseline" or score is None or score.value is None or not cost.tokens_per_user:
            continue
        tokens = f"{format_mean_count(cost.tokens_per_user)} tokens"
        bar = make_bar(label(cost.row), score.value, score.low, score.high)
        bar["text"] += f", {tokens}"
        short = f"{format_number(score.value)}, {tokens}"
        points.append({**bar, "arm": cost.row.arm, "tokens": cost.tokens_per_user, "short": short})
    if not points:
        return None
    random_rows = [row for row in results.standings(task) if row.arm == "baseline" and row.predictor == "random"]
    levels = [row for row in (best_baseline(results, task), *random_rows) if row is not None]
    return {
        "kind": "cost",
        "metric": single_line(metric),
        "better": metric_direction(metric),
        "points": points,
        "levels": {
            single_line(label(row)): score.value
            for row in levels
            if (score := row.metrics.get(metric)) is not None and score.value is not None
        },
    }
