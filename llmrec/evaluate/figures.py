"""Evaluation protocols, and metrics from per-request values: means with intervals and signatures."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmrec import __version__
from llmrec.entries import MetricEntry, MetricKind
from llmrec.errors import LlmrecError
from llmrec.metrics.signature import signature
from llmrec.metrics.stats import Interval, MetricValues, StatisticName, bootstrap_interval, statistic_interval
from llmrec.registry import METRICS, find_metric, import_attribute
from llmrec.results import Metric, Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalProtocol:
    """The evaluation protocol, which is recorded in the signature of every metric.

    Attributes:
        split: Kind of split.
        candidates: Such as ``"uniform-20"``, or ``"full"``.
        cutoffs: Ranks at which HR and NDCG are cut.
        resamples: Bootstrap samples over users.
        seed: Seed of the bootstrap.
        catalogue: Number of items, the pool of requests without candidates.
        users: Name or number of the evaluated users, for the signatures; None to omit it.
        liked: Lowest rating that counts as liked, for the AUC of ratings; None omits that metric.
    """

    split: str
    candidates: str
    cutoffs: tuple[int, ...]
    resamples: int
    seed: int
    catalogue: int
    users: str | None = None
    liked: float | None = None

    def sign(self, metric: str, *, seen: str = "excluded", how: str | None = None) -> str:
        """Return the signature of a metric; see `signature`."""
        return signature(
            metric,
            candidates=self.candidates,
            seen=seen,
            users=self.users,
            how=how,
            split=self.split,
            version=__version__,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """The metrics of one model.

    Attributes:
        metrics: Figures by metric.
        values: Per-request values by metric, shape (n,) each.
        rates: Further rates, such as the copy rate.
        tie_rate: Share of answers with ties.
        columns: Per-request values by field of `llmrec.results.Prediction`.
    """

    metrics: dict[str, Metric] = field(default_factory=dict)
    values: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    rates: Rates = field(default_factory=Rates)
    tie_rate: float = 0.0
    columns: Mapping[str, Sequence[object]] = field(default_factory=dict)


def compute_metrics(
    kind: MetricKind,
    inputs: Mapping[str, object],
    users: Sequence[str],
    protocol: EvalProtocol,
    *,
    cutoffs: Sequence[int] = (),
    full: bool = False,
    seen: str = "excluded",
) -> Measurements:
    """Compute all metrics of a type whose inputs are available; see `llmrec.entries.MetricEntry`.

    Args:
        kind: The kind of metrics.
        inputs: Arguments of the metric functions by name; None if unavailable.
        users: The user of each request.
        protocol: The protocol, for signatures.
        cutoffs: Cut-offs of metrics that have them.
        full: Compute only metrics of full ranking.
        seen: ``excluded`` or ``included``, see `signature`.
    """
    entries = {name: entry for name, entry in METRICS.items() if entry.kind == kind and entry.full == full}
    cut = [
        (f"{name}@{k}", entry, k) for k in cutoffs for name, entry in entries.items() if entry.cut and k >= entry.least
    ]
    uncut = [(name, entry, None) for name, entry in entries.items() if not entry.cut]
    measurements = Measurements()
    for name, entry, k in [*uncut, *cut] if full else [*cut, *uncut]:
        if (result := compute_metric(name, entry, {**inputs, "k": k} if k is not None else inputs)) is None:
            continue
        sign = protocol.sign(name, seen=seen, how=result.how or entry.how)
        owners = users if result.users is None else result.users
        if isinstance(result.result, np.ndarray):
            measurements.metrics[name] = mean_figure(
                name, result.result, owners, sign, resamples=protocol.resamples, seed=protocol.seed
            )
        elif callable(result.result):
            drawn = statistic_interval(
                result.result, len(set(owners)), resamples=protocol.resamples, seed=protocol.seed
            )
            measurements.metrics[name] = Metric(value=drawn.value, low=drawn.low, high=drawn.high, signature=sign)
        else:
            reason = {"undefined": result.undefined} if result.result is None else {}
            measurements.metrics[name] = Metric(value=result.result, low=None, high=None, signature=sign, **reason)
        if entry.compared and isinstance(result.result, np.ndarray) and entry.unit == "request":
            measurements.values[name] = result.result
    return measurements


def compute_metric(name: str, entry: MetricEntry, inputs: Mapping[str, object]) -> MetricValues | None:
    """Return the result of a metric; None if an input is missing or it needs several relevant items."""
    if not entry.function:
        return None
    function = import_attribute(entry.function)
    parameters = inspect.signature(function).parameters
    needed = {name for name, item in parameters.items() if item.default is item.empty} - entry.fixed.keys()
    if unknown := needed - inputs.keys():
        raise LlmrecError(
            f"the metric {name} has unknown parameters {', '.join(sorted(unknown))}; parameters of {entry.kind} "
            f"metrics are {', '.join(inputs)}",
            kind="defect",
            at=entry.function,
        )
    arguments = {parameter: inputs[parameter] for parameter in parameters if parameter in inputs}
    if any(argument is None for argument in arguments.values()):
        return None
    result = function(**arguments, **entry.fixed)
    return result if isinstance(result, MetricValues) else MetricValues(result=result)


def metric_statistic(metric: str) -> StatisticName:
    """Return whether a metric is a mean or a root mean of per-request values."""
    entry = find_metric(metric)
    return "root_mean" if entry is not None and entry.root else "mean"


def mean_figure(
    metric: str, values: NDArray[np.float64], users: Sequence[str], signature: str, *, resamples: int, seed: int
) -> Metric:
    """Return the mean (or root mean) of per-request values, with interval and signature."""
    result = mean_interval(metric, values, users, resamples=resamples, seed=seed)
    return Metric(value=result.value, low=result.low, high=result.high, signature=signature)


def mean_interval(
    metric: str, values: NDArray[np.float64], users: Sequence[str], *, resamples: int, seed: int
) -> Interval:
    """Return the mean (or root mean) of values, shape (n,) or (seeds, n), with its BCa interval over users."""
    statistic = metric_statistic(metric)
    return bootstrap_interval(
        values, users=users, resamples=resamples, seed=seed, statistic=statistic, method="bca", widen=True
    )
