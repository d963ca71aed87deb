"""Evaluates ranked lists of any system with all ranking metrics, and compares two files of lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from llmrec import __version__
from llmrec.data.lists import EntityColumns, GroundTruth, ListOrder, ListUnit, RankedLists, read_lists, read_truth
from llmrec.data.requests import format_few_names
from llmrec.display import Displayed, Summary, format_name_list
from llmrec.entries import MetricEntry
from llmrec.errors import DataError, RecipeError, did_you_mean
from llmrec.evaluate.compare import Contrast, ModelValues, compare_exploratory, compare_planned
from llmrec.evaluate.figures import mean_figure
from llmrec.metrics.functions import match_lists
from llmrec.metrics.multi_target import RelevantRanks
from llmrec.metrics.signature import signature
from llmrec.recipe.shared import CUTOFFS, RESAMPLES
from llmrec.records import Record
from llmrec.registry import METRICS, import_attribute
from llmrec.results import Metric, Pair


class ScoredLists(Record):
    """The metrics of one file of ranked lists.

    Attributes:
        name: The file.
        metrics: Figures by name; those without a cut-off are over whole lists.
        judged: Number of users (or requests) with relevant items: the denominator.
        without_list: Number of these without a list, which counts as 0 in every metric.
        without_truth: Number of lists without relevant items, which are excluded.
        short: Number of judged lists shorter than the largest cut-off.
        tied: Share of the judged whose relevant items tie with other items.
        order: What defines the order of a list: a score, a rank, or the order of the rows.
    """

    name: str
    metrics: dict[str, Metric]
    judged: int
    without_list: int
    without_truth: int
    short: int
    tied: float
    order: ListOrder


class Scores(Displayed, Record):
    """The result of `llmrec.score`.

    Attributes:
        truth: The file of relevant items.
        unit: The owner of a list: a user or a request.
        users: Number of judged users, the sampling units.
        relevant: Number of relevant pairs.
        barren: Number of users of the truth without relevant items, who are excluded.
        lists: The results of one file of lists, or of two.
        comparisons: For two files, first − second, by metric.
    """

    truth: str
    unit: ListUnit
    users: int
    relevant: int
    barren: int
    lists: tuple[ScoredLists, ...]
    comparisons: dict[str, Pair] = Field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of the first file."""
        return self.lists[0].metrics

    def _summary(self) -> Summary:
        first = self.lists[0]
        facts = {
            "judged": f"{first.judged:,} {self.unit}s with {self.relevant:,} relevant items",
            "without a list": format_name_list(f"{item.without_list:,}" for item in self.lists),
        }
        titles = [item.name for item in self.lists]
        header, rows = ["metric", *titles], []
        for name in self.metrics:
            cells = [_format_with_interval(item.metrics[name]) for item in self.lists]
            if (pair := self.comparisons.get(name)) is not None:
                cells.append(_format_with_interval(pair, "+") + ("" if pair.p is None else f", p {pair.p:.3g}"))
            rows.append([name, *cells])
        if self.comparisons:
            header.append(f"{titles[0]} - {titles[1]}")
        return Summary(f"Scores against {self.truth}", facts, header, rows)


def _format_with_interval(figure: Metric | Pair, sign: str = "") -> str:
    if figure.value is None or figure.low is None or figure.high is None:
        return "–"
    return f"{figure.value:{sign}.4f} [{figure.low:{sign}.4f}, {figure.high:{sign}.4f}]"


@dataclass(frozen=True)
class ListEvaluation:
    """Settings for evaluating ranked lists.

    Attributes:
        cutoffs: Ranks at which metrics are cut.
        resamples: Bootstrap samples over users.
        seed: Seed of the bootstrap.
        graded: Use the relevance as gain of NDCG; otherwise every relevant item has gain 1.
        planned: The metric of the planned comparison, which is tested; the others are exploratory.
        whole: Compute also the metrics of whole lists, without a cut-off.
    """

    cutoffs: tuple[int, ...]
    resamples: int
    seed: int = 0
    graded: bool = False
    planned: str | None = None
    whole: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(name for name, *_ in _metrics_with_cutoffs(self))


def list_evaluation_settings(
    k: Sequence[int],
    resamples: int,
    seed: int,
    *,
    graded: bool = False,
    planned: str | None = None,
    whole: bool = True,
    several: bool = True,
) -> ListEvaluation:
    """Validate the settings for evaluating ranked lists, and return them.

    Raises:
        RecipeError: If a cutoff is less than 1, or the planned metric is not computed.
    """
    if not k or any(isinstance(entry, bool) or not isinstance(entry, int) or entry < 1 for entry in k):
        raise RecipeError("k: give cut-offs of at least 1, such as 5,10", kind="bad-value", column="--k")
    how = ListEvaluation(tuple(dict.fromkeys(k)), resamples, seed, graded, planned, whole)
    if planned is not None and not (several and planned in how.names):
        what = (
            f"choose from {', '.join(how.names)}"
            if several
            else "it is only for two files of lists; give a second file"
        )
        raise RecipeError(
            f"planned: {planned!r} cannot be tested{did_you_mean(planned, how.names) if several else ''}; {what}",
            kind="unknown-name" if several else "contradiction",
            column="--planned",
        )
    return how


def score(
    ranked: Any,
    truth: Any,
    *,
    against: Any = None,
    k: Sequence[int] = CUTOFFS,
    graded: bool = False,
    planned: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    user: str | None = None,
    item: str | None = None,
) -> Scores:
    """Evaluate ranked lists of any system, with a 95 % interval for each metric.

    Args:
        ranked: A path or a frame: lists of llmrec, a table with one row per ranked item, or a TREC run; see
            docs/benchmark.md.
        truth: A path or a frame: the relevant items, one row per item, or TREC qrels.
        against: Other lists for the same truth, with which ``ranked`` is compared (``ranked`` − ``against``, paired).
        k: Cutoffs of the metrics.
        graded: Whether NDCG uses the relevance in the truth as gain; otherwise every relevant item has a gain of 1.
        planned: The metric of the planned comparison, which is tested; the other metrics are exploratory.
        resamples: Number of bootstrap resamples over users.
        seed: Seed of the resamples.
        user: Column of the user in all files; by default one with a typical name, such as ``userId``.
        item: Column of the item in all files; by default one with a typical name.

    Returns:
        Figures in [0, 1] by metric, with counts of users and items.

    Raises:
        DataError: If a file or frame cannot be read; it names the file and the row.
        RecipeError: If a cutoff is less than 1, or the planned metric is not computed.
    """
    how = list_evaluation_settings(k, resamples, seed, graded=graded, planned=planned, several=against is not None)
    entities = EntityColumns(user, item)
    relevant = read_truth(truth, entities)
    lists = [read_lists(entry, relevant.unit, entities) for entry in (ranked, against) if entry is not None]
    known = [*relevant.columns, *(name for entry in lists for name in entry.columns)]
    for option, column in (("--user", user), ("--item", item)):
        if column is not None and column not in known:
            raise DataError(
                f"{option} {column}: neither file has this column{did_you_mean(column, known)}; the columns are: "
                f"{', '.join(dict.fromkeys(known))}",
                kind="missing-column",
                column=option,
            )
    return score_lists(lists, relevant, how)


def score_lists(lists: Sequence[RankedLists], truth: GroundTruth, how: ListEvaluation) -> Scores:
    """Evaluate lists, and compare two files of lists if both are given.

    Metrics are expectations over all orders of tied scores; see `llmrec.metrics.multi_target`.

    Raises:
        DataError: If no list belongs to a user or request with relevant items.
    """
    keys = truth.frame["key"].unique().sort()
    owners = truth.frame.group_by("key").agg(pl.col("owner").first()).sort("key")["owner"].to_list()
    values, scored = [], []
    for item in lists:
        judged, about = _match_with_counts(item, truth, keys, how)
        result = _metric_values(judged, how)
        values.append(result)
        metrics = {name: _metric_figure(name, result[name], owners, how) for name in how.names}
        scored.append(ScoredLists(name=item.name, metrics=metrics, order=item.order, **about))
    comparisons = {}
    if len(lists) > 1:
        for name in how.names:
            a, b = (
                ModelValues(one.name, one.metrics[name].value, row[name])
                for one, row in zip(scored, values, strict=True)
            )
            contrast = [Contrast(name, a, b, owners)]
            tested = compare_planned if name == how.planned else compare_exploratory
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


def _match_with_counts(
    lists: RankedLists, truth: GroundTruth, keys: pl.Series, how: ListEvaluation
) -> tuple[RelevantRanks, dict[str, int | float]]:
    """Match ranked lists with relevant items, and count lists and items without a match."""
    known = set(keys.to_list())
    listed = set(lists.frame["key"].unique().to_list())
    unknown = (listed | lists.empty) - known
    if not known & (listed | lists.empty):
        raise DataError.at(
            lists.name,
            "mismatch",
            f": none of its {lists.unit}s ({format_few_names(sorted(unknown))}) is in {truth.name} "
            f"({format_few_names(keys.to_list())}); check that both files use the same ids",
            "user",
        )
    judged = match_lists(lists, truth, keys, graded=how.graded)
    tied = np.unique(judged.request[judged.tied > judged.relevant])
    about: dict[str, int | float] = {
        "judged": len(keys),
        "without_list": int((judged.ranked == 0).sum()),
        "without_truth": len(unknown),
        "short": int(((judged.ranked > 0) & (judged.ranked < max(how.cutoffs))).sum()),
        "tied": len(tied) / len(keys),
    }
    return judged, about


def _metrics_with_cutoffs(how: ListEvaluation) -> list[tuple[str, MetricEntry, int | None]]:
    """Return the metrics for several relevant items, with their cut-offs."""
    several = [(name, entry) for name, entry in METRICS.items() if entry.several]
    cut = [(f"{name}@{k}", entry, k) for k in how.cutoffs for name, entry in several if entry.cut or entry.both]
    uncut = [(name, entry, None) for name, entry in several if how.whole and (entry.both or not entry.cut)]
    return [*cut, *uncut]


def _metric_values(judged: RelevantRanks, how: ListEvaluation) -> dict[str, NDArray[np.float64]]:
    return {name: import_attribute(entry.several)(judged, k) for name, entry, k in _metrics_with_cutoffs(how)}


def _metric_figure(name: str, values: NDArray[np.float64], owners: Sequence[str], how: ListEvaluation) -> Metric:
    # For external lists, candidates and the treatment of history items are unknown.
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
    return mean_figure(name, values, owners, signed, resamples=how.resamples, seed=how.seed)
