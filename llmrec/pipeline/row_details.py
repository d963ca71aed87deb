"""A finished row taken apart: by slice, and by where the target stands among its candidates.

All is worked out from the values and answers that a row keeps, so that rows of an earlier run have it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.slices import slice_figures
from llmrec.metrics import ranking
from llmrec.metrics.multiple import holm
from llmrec.metrics.stats import mean_ranks
from llmrec.pipeline.evaluation import ResultRow
from llmrec.pipeline.row_specs import protocol_of
from llmrec.pipeline.study import Study
from llmrec.results import AtPosition, PositionBias, SliceOfRow
from llmrec.types import Case, Ranking

# No mean over requests, so that a slice of them has no figure of its own kind; log loss is sliced instead.
_INSTEAD = {"AUC": "LogLoss", "GAUC": "LogLoss"}
_FOR_EACH_ROW = 100
# Permuted positions drawn at a time: 4 MB of them.
_CHUNK = 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where the targets of a row stand, and what became of them.

    Attributes:
        position: Place of the target in the stored order of its candidates, from 1, shape (n,).
        hit: HR@1, shape (n,).
        rank: Expected rank, shape (n,); a target that an answer leaves out counts as last.
    """

    position: NDArray[np.int64]
    hit: NDArray[np.float64]
    rank: NDArray[np.float64]


class Details(TypedDict):
    """What a row of results.json holds beside its figures."""

    users: int
    slices: tuple[SliceOfRow, ...]
    by_position: NotRequired[tuple[AtPosition, ...]]
    position_bias: NotRequired[PositionBias]


def breakdowns(study: Study, rows: Sequence[ResultRow], headline: Mapping[str, str]) -> list[Details]:
    """Return what each row of results.json holds beside its figures.

    Args:
        study: Its cases are those of the rows, in order.
        rows: Finished rows.
        headline: The metric by which slices of a family are compared.

    Returns:
        One mapping a row. Positions stand on rows with candidates, the test for a bias on those of language models.
    """
    cases = {family: study.cases(family) for family in study.tasks}
    protocols = {family: protocol_of(study, family) for family in study.tasks}
    placed = [place(row, cases[row.figures.task]) for row in rows]
    biases = _biases(rows, placed, resamples=study.recipe.eval.bootstrap, seed=study.recipe.seed)
    return [
        _details(
            len({record.user_id for record in row.records}),
            _slices(study, row, cases, headline, protocols),
            by_position(found) if found is not None else None,
            bias,
        )
        for row, found, bias in zip(rows, placed, biases, strict=True)
    ]


def _details(
    users: int, slices: tuple[SliceOfRow, ...], positions: tuple[AtPosition, ...] | None, bias: PositionBias | None
) -> Details:
    found = Details(users=users, slices=slices)
    if positions is not None:
        found["by_position"] = positions
    if bias is not None:
        found["position_bias"] = bias
    return found


def _slices(
    study: Study,
    row: ResultRow,
    cases: Mapping[str, Sequence[Case]],
    headline: Mapping[str, str],
    protocols: Mapping[str, EvalProtocol],
) -> tuple[SliceOfRow, ...]:
    family = row.figures.task
    metric = _INSTEAD.get(headline[family], headline[family])
    if metric not in row.values:
        return ()
    return slice_figures(
        {metric: row.values[metric]},
        cases[family],
        study.task_data(family),
        metrics=row.figures.metrics,
        protocol=protocols[family],
        attributes=study.recipe.eval.slices,
    )


# --------------------------------------------------------------------------- positions


def place(row: ResultRow, cases: Sequence[Case]) -> Placed | None:
    """Return where each target stands among its candidates, if it is there; None where a request has no candidates."""
    if not cases or any(case.request.candidates is None for case in cases):
        return None
    sets = [case.request.candidates or () for case in cases]
    ranks = [record.rank for record in row.records]
    # Retrieved candidates may lack the target: then it has no position.
    there = [n for n, (own, case) in enumerate(zip(sets, cases, strict=True)) if case.truth in own]
    if not there:
        return None
    hits = row.values["HR@1"] if "HR@1" in row.values else _hits(row, sets)
    last = [len(own) if rank is None else rank for own, rank in zip(sets, ranks, strict=True)]
    return Placed(
        position=np.array([sets[n].index(str(cases[n].truth)) + 1 for n in there]),
        hit=hits[there],
        rank=np.array(last, dtype=np.float64)[there],
    )


def _hits(row: ResultRow, sets: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Return HR@1 from the stored answers, for a recipe whose cut-offs leave out 1."""
    standings = []
    for record, own in zip(row.records, sets, strict=True):
        found = json.loads(record.parsed) or {"items": (), "scores": ()}
        answer = Ranking(
            request_id=record.request_id, items=tuple(found["items"]), scores=tuple(map(float, found["scores"]))
        )
        standings.append(ranking.standing(answer, record.truth, len(own)))
    greater = np.array([standing.greater for standing in standings], dtype=np.int64)
    return ranking.hit_rate(greater, np.array([standing.tied for standing in standings], dtype=np.int64), 1)


def by_position(placed: Placed) -> tuple[AtPosition, ...]:
    """Return HR@1 and the mean rank of each position, those without requests left out."""
    found = []
    for position in np.unique(placed.position):
        here = placed.position == position
        rank = placed.rank[here]
        found.append(
            AtPosition(
                position=int(position),
                n=int(here.sum()),
                hit=float(placed.hit[here].mean()),
                rank=float(rank.mean()),
                rank_sd=float(rank.std(ddof=1)) if len(rank) > 1 else None,
            )
        )
    return tuple(found)


def _biases(
    rows: Sequence[ResultRow], placed: Sequence[Placed | None], *, resamples: int, seed: int
) -> list[PositionBias | None]:
    """Test the rows of language models for a bias; p-values are Holm-adjusted over these rows."""
    tested = [row.figures.arm != "baseline" and own is not None for row, own in zip(rows, placed, strict=True)]
    # As for comparisons: enough draws that the smallest p stays small after Holm.
    resamples = max(resamples, _FOR_EACH_ROW * sum(tested))
    found = [
        position_bias(own.position, own.rank, resamples=resamples, seed=seed) if own is not None and chosen else None
        for own, chosen in zip(placed, tested, strict=True)
    ]
    adjusted = iter(holm([float(each.p or 0.0) for each in found if each is not None]))
    return [None if each is None else each.model_copy(update={"p": next(adjusted)}) for each in found]


def position_bias(
    position: NDArray[np.int64], rank: NDArray[np.float64], *, resamples: int, seed: int
) -> PositionBias | None:
    """Test whether the target's rank depends on its position, with the statistic of Kruskal and Wallis (JASA 1952).

    Positions are drawn at random when candidate sets are made, so that without a bias every assignment of the
    positions to the requests is equally likely, whatever users and items are like: p is the share of drawn assignments
    that explain at least as much, ``(1 + as much) / (1 + resamples)``.

    Args:
        position: Of the target among its candidates, shape (n,).
        rank: Of the target, shape (n,).
        resamples: Assignments that are drawn.
        seed: Seeds them.

    Returns:
        None where all positions or all ranks are equal, or no position has two requests.
    """
    order = np.argsort(position, kind="stable")
    _, starts, sizes = np.unique(position[order], return_index=True, return_counts=True)
    y = mean_ranks(rank)[order] - (len(rank) + 1) / 2
    x = mean_ranks(position)[order] - (len(position) + 1) / 2
    total = float(y @ y)
    if total == 0 or not 1 < len(sizes) < len(y):
        return None

    def explained(values: NDArray[np.float64]) -> NDArray[np.float64]:
        # Squares between the positions over all squares; values of a position stand together.
        return (np.add.reduceat(values, starts, axis=-1) ** 2 / sizes).sum(axis=-1) / total  # type: ignore[no-any-return]

    observed = float(explained(y))
    rng = np.random.default_rng(seed)
    beyond, drawn = 0, 0
    while drawn < resamples:
        rows = min(max(1, _CHUNK // len(y)), resamples - drawn)
        beyond += int(np.count_nonzero(explained(rng.permuted(np.tile(y, (rows, 1)), axis=1)) >= observed - 1e-9))
        drawn += rows
    return PositionBias(
        share=observed,
        chance=(len(sizes) - 1) / (len(y) - 1),
        rho=float(x @ y / np.sqrt((x @ x) * total)),
        p=(1 + beyond) / (1 + resamples),
    )
