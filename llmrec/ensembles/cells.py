"""Scores of ensemble members for the candidates of requests: the input of every type of ensemble.

Candidates of all requests are in flat arrays, grouped by request, without padding. If the whole catalogue is ranked,
the candidates are the union of the members' top items: candidate generation by several models, and a second stage that
combines them (Covington et al., RecSys 2016, section 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.metrics.ranking import ndcg

if TYPE_CHECKING:
    from numpy.typing import NDArray

ScoreScale = Literal["counts", "logits", "beams"]
"""The scale of scores: non-negative, used as shares; on a log scale; or probabilities of the items in beams only."""

TOP_ITEMS_PER_MEMBER = 40
"""Number of top items of each member that become candidates, if the whole catalogue is ranked."""
NDCG_CUTOFF = 10
"""The cut-off of the NDCG by which forms are compared."""

# The lower limit of a share before taking its logarithm.
_MIN_SHARE = np.float32(1e-6)


@dataclass(frozen=True)
class CandidateScores:
    """The members' scores for all (request, candidate) pairs (cells).

    Attributes:
        names: The k members.
        kinds: The scale of each member's scores.
        starts: The first cell of each request, and the number of cells, shape (n + 1,).
        raw: Scores of each member, shape (k, cells).
        in_history: Whether a candidate is in the history, shape (cells,).
        truth: The cell of each request's target, -1 if it is no candidate, shape (n,); None outside of fitting.
        context: Further features by name, shape (cells,) each; see `llmrec.ensembles.context`.
    """

    names: tuple[str, ...]
    kinds: tuple[ScoreScale, ...]
    starts: NDArray[np.int64]
    raw: NDArray[np.float32]
    in_history: NDArray[np.bool_]
    truth: NDArray[np.int64] | None = None
    context: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """The request of each (request, candidate) pair."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @cached_property
    def hits(self) -> NDArray[np.int64]:
        """The requests whose target is a candidate; only these determine weights."""
        assert self.truth is not None
        return np.flatnonzero(self.truth >= 0)

    def of(self, cases: NDArray[np.int64]) -> CandidateScores:
        """Select requests by ascending indices."""
        selected = np.zeros(len(self.starts) - 1, dtype=bool)
        selected[cases] = True
        cells = selected[self.rows]
        starts = np.concatenate([[0], np.cumsum(np.diff(self.starts)[cases])])
        truth = None
        if self.truth is not None:
            targets = self.truth[cases]
            truth = np.where(targets >= 0, targets - self.starts[cases] + starts[:-1], -1)
        context = {name: values[cells] for name, values in self.context.items()}
        return CandidateScores(
            self.names, self.kinds, starts, self.raw[:, cells], self.in_history[cells], truth, context
        )

    # ------------------------------------------------------------------ reductions by request

    def total(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sum values over the candidates of each request, shape (..., n)."""
        return _reduce_by_request(np.add, values, self.starts, 0)

    def most(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the maximum over the candidates of each request, shape (..., n)."""
        return _reduce_by_request(np.maximum, values, self.starts, -np.inf)

    def ndcg(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Return NDCG@10 of each request when candidates are ranked by ``values``, averaged over ties, shape (n,).

        It is 0 if the target is not a candidate.
        """
        assert self.truth is not None
        target = np.where(self.truth >= 0, values[np.maximum(self.truth, 0)], np.nan)[self.rows]
        greater, tied = (self.total(which.astype(np.int64)) for which in (values > target, values == target))
        return np.asarray(ndcg(greater, tied, NDCG_CUTOFF))

    # ------------------------------------------------------------------ features

    def scores(self, member: int) -> NDArray[np.float32]:
        """Return the scores of a member on a log scale.

        Items outside the beams of a beam search get the probability of the last beam.
        """
        values, kind = self.raw[member], self.kinds[member]
        if kind == "logits":
            return np.asarray(values - self.most(values)[self.rows], dtype=np.float32)
        values = np.maximum(values, 0)
        if kind == "beams":
            least = -self.most(np.where(values > 0, -values, -1))
            return np.asarray(np.log(np.maximum(values, np.maximum(least, 1e-30)[self.rows])), dtype=np.float32)
        totals = self.total(values)[self.rows]
        shares = np.divide(values, totals, out=np.zeros_like(values), where=totals > 0)
        return np.asarray(np.log(shares + _MIN_SHARE), dtype=np.float32)

    def shares(self, member: int) -> NDArray[np.float64]:
        """Return a member's scores as probabilities over the candidates; uniform if it scores no candidate."""
        values, kind = self.raw[member].astype(np.float64), self.kinds[member]
        if kind == "logits":
            values = np.exp(values - self.most(values)[self.rows])
        elif kind == "beams":
            values = np.maximum(values, -self.most(np.where(values > 0, -values, -1))[self.rows])
        else:
            values = np.maximum(values, 0)
        totals = self.total(values)[self.rows]
        uniform = 1 / np.diff(self.starts)[self.rows]
        return np.asarray(np.divide(values, totals, out=uniform, where=totals > 0))

    def ranks(self, member: int) -> NDArray[np.float32]:
        """Return the rank of each candidate by a member, 1 to `TOP_ITEMS_PER_MEMBER` + 1; ties have equal ranks."""
        values = self.raw[member]
        order = np.lexsort((-values, self.rows))
        ranked, rows = values[order], self.rows[order]
        position = np.arange(len(order)) - self.starts[rows]
        # Equal scores get the rank of the first of them.
        first = np.ones(len(order), dtype=bool)
        first[1:] = (ranked[1:] != ranked[:-1]) | (rows[1:] != rows[:-1])
        result = np.empty(len(order), dtype=np.float32)
        result[order] = (
            np.minimum(position[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))], TOP_ITEMS_PER_MEMBER)
            + 1
        )
        return result

    def relative(self, member: int) -> NDArray[np.float32]:
        """Return a member's log-scale scores, standardised over the candidates of each request."""
        values = self.scores(member).astype(np.float64)
        count = np.diff(self.starts)
        mean = self.total(values) / np.maximum(count, 1)
        centred = values - mean[self.rows]
        spread = np.sqrt(self.total(centred**2) / np.maximum(count, 1))
        return np.asarray(centred / np.maximum(spread, 1e-9)[self.rows], dtype=np.float32)


def _reduce_by_request(by: np.ufunc, values: NDArray[Any], starts: NDArray[np.int64], empty: float) -> NDArray[Any]:
    """Reduce values over the candidates of each request; requests without candidates get the value ``empty``."""
    counts = np.diff(starts)
    result = np.full((*values.shape[:-1], len(counts)), empty, dtype=values.dtype)
    if counts.any():
        result[..., counts > 0] = by.reduceat(values, starts[:-1][counts > 0], axis=-1)
    return result


def select_candidates(
    raw: Sequence[NDArray[np.float32]], excluded: NDArray[np.bool_] | None, top: int = TOP_ITEMS_PER_MEMBER
) -> NDArray[np.bool_]:
    """Select candidates: the union of the members' top items, as a mask of shape (n, items).

    Items with a member's lowest score are excluded from its top items: items without a vote are all tied.

    Args:
        raw: Scores of each member, shape (n, items).
        excluded: Items that cannot be ranked; None: none.
        top: Number of top items of each member.
    """
    result = np.zeros(raw[0].shape, dtype=bool)
    for scores in raw:
        values = scores if excluded is None else np.where(excluded, -np.inf, scores)
        lowest = np.min(values, axis=1, keepdims=True, where=values > -np.inf, initial=np.inf)
        if values.shape[1] > top:
            top_columns = np.argpartition(-values, top - 1, axis=1)[:, :top]
            chosen = np.take_along_axis(values, top_columns, axis=1) > lowest
            rows, columns = np.nonzero(chosen)
            result[rows, top_columns[rows, columns]] = True
        else:
            result |= values > -np.inf
    return result


def collect_candidate_scores(
    raw: Sequence[NDArray[np.float32]],
    chosen: NDArray[np.bool_],
    in_history: NDArray[np.bool_],
    truth: NDArray[np.int64] | None,
    names: Sequence[str],
    kinds: Sequence[ScoreScale],
    context: Mapping[str, NDArray[np.float32]],
) -> CandidateScores:
    """Collect the members' scores of the candidates.

    Args:
        raw: Scores of each member, shape (n, items).
        chosen: Which items are candidates, shape (n, items); see `select_candidates`.
        in_history: Whether an item is in the history, shape (n, items).
        truth: The column of each target; None outside of fitting.
        names: The members.
        kinds: The scale of each member's scores.
        context: Further features of the candidates, request by request.
    """
    starts = np.concatenate([[0], np.cumsum(chosen.sum(axis=1))])
    targets = None
    if truth is not None:
        rows = np.arange(len(truth))
        targets = np.where(chosen[rows, truth], starts[:-1] + np.cumsum(chosen, axis=1)[rows, truth] - 1, -1)
    scores = np.stack([values[chosen] for values in raw])
    return CandidateScores(tuple(names), tuple(kinds), starts, scores, in_history[chosen], targets, context)


def concatenate_blocks(blocks: Sequence[CandidateScores]) -> CandidateScores:
    """Concatenate several blocks of requests."""
    sizes = np.array([len(block.in_history) for block in blocks])
    before = np.cumsum(sizes) - sizes
    starts = [block.starts[:-1] + start for block, start in zip(blocks, before, strict=True)]
    truths = []
    for block, start in zip(blocks, before, strict=True):
        assert block.truth is not None
        truths.append(np.where(block.truth >= 0, block.truth + start, -1))
    return CandidateScores(
        blocks[0].names,
        blocks[0].kinds,
        np.concatenate([*starts, [sizes.sum()]]),
        np.concatenate([block.raw for block in blocks], axis=1),
        np.concatenate([block.in_history for block in blocks]),
        np.concatenate(truths),
        {name: np.concatenate([block.context[name] for block in blocks]) for name in blocks[0].context},
    )
