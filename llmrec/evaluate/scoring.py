"""Scores ranked lists of any system: every ranking metric with its interval, and the comparison of two lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from llmrec import __version__
from llmrec.data.lists import Lists, Order, Truth, Unit
from llmrec.display import Displayed, Summary, listed
from llmrec.entries import MetricEntry
from llmrec.errors import DataError
from llmrec.evaluate.compare import Contrast, Standing, exploratory, planned
from llmrec.evaluate.figures import EvalProtocol, mean_figure
from llmrec.metrics.multi_target import Judged, Pairs, judge
from llmrec.metrics.signature import signature
from llmrec.records import Record
from llmrec.registry import METRICS, attribute
from llmrec.results import Metric, Pair

_SHOWN = 3


class ScoredLists(Record):
    """The figures of one file of lists.

    Attributes:
        name: The file.
        metrics: Figures by name; those without a cut-off are over whole lists.
        judged: Number of users (or requests) with relevant items: the denominator.
        without_list: Number of them without a list, which counts as 0 in every metric.
        without_truth: Number of lists without relevant items, which are excluded.
        short: Number of judged lists shorter than the largest cut-off.
        tied: Share of the judged whose relevant items tie with other items.
        order: The order of a list: a score, a rank, or the order of the rows.
    """

    name: str
    metrics: dict[str, Metric]
    judged: int
    without_list: int
    without_truth: int
    short: int
    tied: float
    order: Order


class Scores(Displayed, Record):
    """The result of `llmrec.score`.

    Attributes:
        truth: The file of relevant items.
        unit: The owner of a list: a user or a request.
        users: Number of judged users, the sampling units.
        relevant: Number of relevant pairs.
        barren: Number of users of the truth without relevant items, who are excluded.
        lists: One file of lists, or the two that are compared.
        comparisons: For two files, first − second, by metric.
    """

    truth: str
    unit: Unit
    users: int
    relevant: int
    barren: int
    lists: tuple[ScoredLists, ...]
    comparisons: dict[str, Pair] = Field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Metric]:
        """The figures of the first file."""
        return self.lists[0].metrics

    def _summary(self) -> Summary:
        first = self.lists[0]
        facts = {
            "judged": f"{first.judged:,} {self.unit}s with {self.relevant:,} relevant items",
            "without a list": listed(f"{item.without_list:,}" for item in self.lists),
        }
        titles = [item.name for item in self.lists]
        header, rows = ["metric", *titles], []
        for name in self.metrics:
            cells = [_with_interval(item.metrics[name]) for item in self.lists]
            rows.append([name, *cells, *([_with_interval(self.comparisons[name], "+")] if self.comparisons else [])])
        if self.comparisons:
            header.append(f"{titles[0]} - {titles[1]}")
        return Summary(f"Scores against {self.truth}", facts, header, rows)


def _with_interval(found: Metric | Pair, sign: str = "") -> str:
    if found.value is None or found.low is None or found.high is None:
        return "–"
    return f"{found.value:{sign}.4f} [{found.low:{sign}.4f}, {found.high:{sign}.4f}]"


@dataclass(frozen=True)
class Judging:
    """Settings for judging lists.

    Attributes:
        cutoffs: Ranks at which metrics are cut.
        resamples: Bootstrap samples over users.
        seed: Seed of the bootstrap.
        graded: Use the relevance as gain of NDCG; otherwise every relevant item has gain 1.
        planned: The metric of the planned comparison, which is tested; the others are exploratory.
    """

    cutoffs: tuple[int, ...]
    resamples: int
    seed: int = 0
    graded: bool = False
    planned: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the metrics."""
        return tuple(name for name, *_ in _several(self.cutoffs))


def score_lists(lists: Sequence[Lists], truth: Truth, how: Judging) -> Scores:
    """Judge lists, and compare them if there are two.

    Ties are taken as the expectation over all orders of equal scores; see `llmrec.metrics.multi_target`.

    Args:
        lists: One or two files of lists.
        truth: The relevant items.
        how: See `Judging`.

    Raises:
        DataError: If no list belongs to a user or request with relevant items.
    """
    keys = truth.frame["key"].unique().sort()
    owners = truth.frame.group_by("key").agg(pl.col("owner").first()).sort("key")["owner"].to_list()
    values, scored = [], []
    for item in lists:
        judged, about = _judged(item, truth, keys, how)
        result = _values(judged, how)
        values.append(result)
        metrics = {name: _figure(name, result[name], owners, how) for name in how.names}
        scored.append(ScoredLists(name=item.name, metrics=metrics, order=item.order, **about))
    comparisons = {}
    if len(lists) > 1:
        for name in how.names:
            a, b = (
                Standing(one.name, one.metrics[name].value, own[name]) for one, own in zip(scored, values, strict=True)
            )
            contrast = [Contrast(name, a, b, owners)]
            tested = planned if name == how.planned else exploratory
            (comparisons[name],) = tested(contrast, resamples=how.resamples, seed=how.seed)
    return Scores(
        truth=truth.name,
        unit=truth.unit,
        users=len(set(owners)),
        relevant=truth.frame.height,
        barren=len(truth.barren),
        lists=tuple(scored),
        comparisons=comparisons,
    )


def _judged(lists: Lists, truth: Truth, keys: pl.Series, how: Judging) -> tuple[Judged, dict[str, int | float]]:
    """Match lists with relevant items, and count unmatched ones."""
    known = set(keys.to_list())
    listed = set(lists.frame["key"].unique().to_list())
    strangers = (listed | lists.empty) - known
    if not known & (listed | lists.empty):
        raise DataError.at(
            lists.name,
            "mismatch",
            f": no {lists.unit} of its lists ({_some(sorted(strangers))}) is in {truth.name} "
            f"({_some(keys.to_list())}); check that both files use the same ids",
            "user",
        )
    frame = lists.frame.filter(pl.col("key").is_in(keys.implode()))
    items = pl.concat([frame["item"], truth.frame["item"]]).unique().sort()
    wanted = truth.frame
    gains = wanted["gain"].to_numpy() if how.graded else np.ones(wanted.height)
    ranked = Pairs(_numbers(frame["key"], keys), _numbers(frame["item"], items), frame["score"].to_numpy())
    relevant = Pairs(_numbers(wanted["key"], keys), _numbers(wanted["item"], items), gains)
    judged = judge(ranked, relevant, len(keys))
    tied = np.unique(judged.request[judged.tied > judged.relevant])
    about: dict[str, int | float] = {
        "judged": len(keys),
        "without_list": int((judged.ranked == 0).sum()),
        "without_truth": len(strangers),
        "short": int(((judged.ranked > 0) & (judged.ranked < max(how.cutoffs))).sum()),
        "tied": len(tied) / len(keys),
    }
    return judged, about


def _numbers(names: pl.Series, known: pl.Series) -> NDArray[np.int64]:
    return known.search_sorted(names).to_numpy().astype(np.int64)


def _several(cutoffs: Sequence[int]) -> list[tuple[str, MetricEntry, int | None]]:
    """Return the metrics that allow several relevant items, with their cut-offs; those of whole lists last."""
    entries = {name: entry for name, entry in METRICS.items() if entry.several}
    whole = [(name, entry, None) for name, entry in entries.items() if entry.both or not entry.cut]
    cut = [(f"{name}@{k}", entry, k) for k in cutoffs for name, entry in entries.items() if entry.cut or entry.both]
    return [*cut, *whole]


def _values(judged: Judged, how: Judging) -> dict[str, NDArray[np.float64]]:
    return {name: attribute(entry.several)(judged, k) for name, entry, k in _several(how.cutoffs)}


def _figure(name: str, values: NDArray[np.float64], owners: Sequence[str], how: Judging) -> Metric:
    # The pool, and the treatment of the history, are unknown for external lists.
    protocol = EvalProtocol(
        split="given", candidates="given", cutoffs=how.cutoffs, resamples=how.resamples, seed=how.seed, catalogue=0
    )
    gain = "graded" if how.graded and name.startswith("NDCG") else "binary"
    signed = signature(
        name,
        gain=gain,
        candidates="given",
        seen="given",
        users=str(len(set(owners))),
        split="given",
        version=__version__,
    )
    return mean_figure(name, values, owners, protocol, signed)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, ..."
