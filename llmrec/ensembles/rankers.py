"""Ensembles of ranking models, with weights fitted on users that were not used to tune any member.

Members retrieve candidates, and one of these forms ranks them:

- a conditional logit, ``p(j) = softmax_j(sum_k w_k z_kj)`` over the members' scores z (McFadden, 1974); weights can be
  negative if members are correlated;
- a linear pool, ``p(j) = sum_k w_k p_k(j)`` with weights that sum to 1 (Jelinek and Mercer, 1980), in which a member
  with probability 0 for an item cannot veto it;
- gradient-boosted trees over the members' scores and ranks and `llmrec.ensembles.context`.

Weights are fitted by maximum likelihood, and the form is chosen by NDCG, cross-fitted over users. Every single member
is a form too: on validation no ensemble is worse than its best member. If items of the history can be ranked, these
have an additional weight.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrec.ensembles.base import Ensemble
from llmrec.ensembles.cells import (
    TOP_ITEMS_PER_MEMBER,
    CandidateScores,
    ScoreScale,
    collect_candidate_scores,
    concatenate_blocks,
    select_candidates,
)
from llmrec.ensembles.context import ContextFeatures
from llmrec.ensembles.weights import EnsembleTrial, Weights
from llmrec.errors import LlmrecError
from llmrec.types import Answer, Case, CatalogueScorer, Predictor, Ranking, Request, Unparsed

if TYPE_CHECKING:
    from numpy.typing import NDArray


MAX_BLOCK_SCORES = 1 << 24
"""Maximum number of scores of a block of requests over all members: 64 MB in single precision."""


@dataclass(frozen=True)
class CatalogueMember:
    """A member that scores all items.

    Attributes:
        name: Name in tables.
        scorer: The fitted scorer of the catalogue.
        kind: The scale of its scores.
    """

    name: str
    scorer: CatalogueScorer
    kind: ScoreScale


class CatalogueEnsemble(Ensemble):
    """An ensemble of models that score all items; it is itself a `CatalogueScorer`."""

    def __init__(
        self,
        name: str,
        parts: Sequence[CatalogueMember],
        *,
        filtered: bool,
        context: ContextFeatures | None = None,
        learns: bool = True,
        weights: Weights | None = None,
    ) -> None:
        """Create the ensemble.

        Args:
            name: Name in tables.
            parts: The members, with the same catalogue in the same order.
            filtered: Whether items of the history are excluded from rankings.
            context: Further features for a ranker; None: only the members' scores.
            learns: Whether a ranker is one of the forms.
            weights: The weights of an earlier ``fit``.

        Raises:
            LlmrecError: If there are fewer than two members, or they have different catalogues.
        """
        if len(parts) < 2 or any(part.scorer.items != parts[0].scorer.items for part in parts):
            raise LlmrecError(f"{name}: an ensemble needs two or more members with the same catalogue", kind="mismatch")
        super().__init__(name, (part.name for part in parts), learns=learns)
        self.parts, self.filtered, self.context, self.weights = tuple(parts), filtered, context, weights
        self._column = {item: index for index, item in enumerate(self.items)}
        self._codes = np.empty(0, dtype=np.int64) if context is None else context.codes(self.items)

    @property
    def items(self) -> tuple[str, ...]:
        """Ids of all items, in column order."""
        return self.parts[0].scorer.items

    def fit(self, cases: Sequence[Case], *, ablate: bool = False, only: EnsembleTrial | None = None) -> None:
        """Fit all types of ensemble, and keep the preferred type by cross-fitted NDCG@10.

        Args:
            cases: Validation cases of users who were not used to fit or choose a member.
            ablate: Fit the best form again without each member, for the attribute ``without``.
            only: The form to fit, if it was chosen before with another seed of the members.

        Raises:
            LlmrecError: If one of these users was used to choose parameters or the epoch of a member.
            LlmrecError: If there are too few users to fit weights on four fifths of them.
        """
        self._refuse([(part.name, part.scorer) for part in self.parts], cases)
        truth = np.array([self._column[str(case.truth)] for case in cases], dtype=np.int64)
        requests, block = [case.request for case in cases], self._block
        blocks = [
            self._cells(requests[start : start + block], truth[start : start + block])[0]
            for start in range(0, len(requests), block)
        ]
        users = [case.request.user_id for case in cases]
        self._choose(concatenate_blocks(blocks), users, repeats=not self.filtered, ablate=ablate, only=only)

    def scores(self, requests: Sequence[Request], barred: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        """Return the scores of all items, shape (n, items); see `CatalogueScorer.scores`.

        Other items come after all candidates, ordered by the sum of the members' standardised scores.

        Args:
            requests: The requests.
            barred: Items to exclude from the candidates, in addition to the history if ``filtered``, shape (n, items).
        """
        weights = self.fitted
        if weights.form == "alone":
            # Members with weight 0 are not called.
            (member,) = (part for part, weight in zip(self.parts, weights.parts, strict=True) if weight)
            alone: NDArray[np.float64] = np.asarray(member.scorer.scores(requests), dtype=np.float64)
            return alone + weights.repeat * self._history_matrix(requests) if weights.repeat else alone
        slices = [slice(start, start + self._block) for start in range(0, len(requests), self._block)]
        blocks = [
            self._score_block(weights, requests[part], None if barred is None else barred[part]) for part in slices
        ]
        return np.concatenate(blocks) if blocks else np.empty((0, len(self.items)))

    @property
    def _block(self) -> int:
        """Number of requests scored per batch."""
        return max(1, MAX_BLOCK_SCORES // (len(self.items) * len(self.parts)))

    def _score_block(
        self, weights: Weights, requests: Sequence[Request], barred: NDArray[np.bool_] | None
    ) -> NDArray[np.float64]:
        cells, chosen, raw = self._cells(requests, barred=barred)
        return _scores_of_all_items(weights.scores(cells), chosen, raw)

    def _cells(
        self,
        requests: Sequence[Request],
        truth: NDArray[np.int64] | None = None,
        barred: NDArray[np.bool_] | None = None,
    ) -> tuple[CandidateScores, NDArray[np.bool_], list[NDArray[np.float32]]]:
        """Return the candidates of requests, a mask of shape (n, items), and the members' scores.

        Args:
            requests: The requests.
            truth: The column of each target, which can be ranked even if the history contains it.
            barred: See `scores`.
        """
        raw = [np.asarray(part.scorer.scores(requests), dtype=np.float32) for part in self.parts]
        in_history = self._history_matrix(requests)
        out = in_history.copy() if self.filtered else None
        if out is not None and truth is not None:
            out[np.arange(len(requests)), truth] = False
        if barred is not None:
            out = barred if out is None else out | barred
        chosen = select_candidates(raw, out, TOP_ITEMS_PER_MEMBER)
        seen = np.zeros_like(in_history) if self.filtered else in_history
        context = _candidate_features(self.context, requests, chosen, self._codes)
        kinds = [part.kind for part in self.parts]
        return collect_candidate_scores(raw, chosen, seen, truth, self.names, kinds, context), chosen, raw

    def _history_matrix(self, requests: Sequence[Request]) -> NDArray[np.bool_]:
        """Return whether each item is in the history, shape (n, items)."""
        in_history = np.zeros((len(requests), len(self.items)), dtype=bool)
        for row, request in enumerate(requests):
            in_history[
                row, [self._column[event.item_id] for event in request.history if event.item_id in self._column]
            ] = True
        return in_history


def _candidate_features(
    context: ContextFeatures | None, requests: Sequence[Request], chosen: NDArray[np.bool_], codes: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """Return the additional features of candidates; empty without a context.

    Args:
        context: The features of the split.
        requests: The requests.
        chosen: Which items are candidates, shape (n, items).
        codes: The code of each item, shape (items,); see `ContextFeatures.codes`.
    """
    if context is None:
        return {}
    rows, columns = np.nonzero(chosen)
    return context.features(requests, rows, codes[columns])


def _scores_of_all_items(
    scores: NDArray[np.float64], chosen: NDArray[np.bool_], raw: Sequence[NDArray[np.float32]]
) -> NDArray[np.float64]:
    """Return the scores of all items, shape (n, items), with items that are not candidates last.

    Args:
        scores: Scores of the candidates, request by request.
        chosen: Which items are candidates, shape (n, items).
        raw: The scores of each member, shape (n, items); their standardised sum orders the other items.
    """
    result = np.full(chosen.shape, np.inf)
    result[chosen] = scores
    if chosen.all():
        return result
    lowest = result.min(axis=1, keepdims=True)
    others = np.zeros(chosen.shape)
    for values in raw:
        centred = values - values.mean(axis=1, keepdims=True, dtype=np.float64)
        others += centred / np.maximum(centred.std(axis=1, keepdims=True), 1e-9)
    after = np.where(np.isfinite(lowest), lowest, 0) - 1 - (others.max(axis=1, keepdims=True) - others)
    return np.asarray(np.where(chosen, result, after))


# --------------------------------------------------------------------------- lists


@dataclass(frozen=True)
class ListMember:
    """A member that ranks given candidates.

    Attributes:
        name: Name in tables.
        predictor: Returns a `Ranking` of the candidates; without scores, they are ``-log(rank)``.
        kind: The scale of its scores.
        knows: The items that it can score; None: all.
    """

    name: str
    predictor: Predictor
    kind: ScoreScale
    knows: Container[str] | None = None

    def has(self, item: str) -> bool:
        """Whether the member can score an item."""
        return self.knows is None or item in self.knows


@dataclass(frozen=True)
class _CandidatePool:
    """The candidates of one request with the members' scores.

    Attributes:
        items: The candidates, and the items ranked after them.
        unknown: The items that no member can score, which come last.
        cells: The candidates with the members' scores.
        chosen: Which items are candidates, shape (1, items).
        raw: The scores of each member, shape (1, items).
    """

    items: Sequence[str]
    unknown: Sequence[str]
    cells: CandidateScores
    chosen: NDArray[np.bool_]
    raw: list[NDArray[np.float32]]


class ListEnsemble(Ensemble):
    """An ensemble of models that rank given candidates, such as scoring methods of a language model.

    Scores are normalised over the candidates of a request. If the whole catalogue is ranked, the candidates are the
    union of the members' lists. An item missing from a member's list gets the score of the list's last item if scores
    are logits, and half of it if scores are counts.

    Attributes:
        validation: NDCG@10 of each case of ``fit``, by request id, with weights fitted without its user; 0 if the
            target is not among the candidates.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[ListMember],
        weights: Weights | None = None,
        context: ContextFeatures | None = None,
    ) -> None:
        """Create the ensemble.

        Args:
            name: Name in tables.
            parts: The members.
            weights: The weights of an earlier ``fit``.
            context: Further features for a ranker; None: only the members' scores.

        Raises:
            LlmrecError: If there are fewer than two members, or the number of weights differs.
        """
        if len(parts) < 2 or (weights is not None and len(weights.parts) != len(parts)):
            raise LlmrecError(f"{name}: an ensemble needs at least two members, and a weight for each", kind="mismatch")
        super().__init__(name, (part.name for part in parts))
        self.parts, self.weights, self.context = tuple(parts), weights, context
        self.validation: dict[str, float] = {}

    def fit(self, cases: Sequence[Case], *, ablate: bool = False, base_ensembles: Sequence[Ensemble] = ()) -> None:
        """Fit all types of ensemble, and keep the best type by cross-fitted NDCG@10.

        Args:
            cases: Validation cases of users who were not used to fit or choose a member. Cases whose target is not a
                candidate are left out.
            ablate: Fit the best form again without each member, for the attribute ``without``.
            base_ensembles: Fitted ensembles of some of the members; the others may be added to each of them.

        Raises:
            LlmrecError: If there are too few users to fit weights on four fifths of them.
        """
        self._refuse([(part.name, part.predictor) for part in self.parts], cases)
        cells, usable = self.known(cases)
        users = [cases[index].request.user_id for index in usable]
        self._choose(cells, users, repeats=bool(cells.in_history.any()), ablate=ablate, base_ensembles=base_ensembles)
        assert self.crossed is not None
        result = zip((cases[index].request.id for index in usable), self.crossed.tolist(), strict=True)
        self.validation = {**dict.fromkeys((case.request.id for case in cases), 0.0), **dict(result)}

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates of each request; see `Predictor.answer`.

        An item that a member cannot score gets the member's worst score, given the sign of its weight. Items that no
        member can score come last.
        """
        answers: list[Answer] = []
        for request, pool in zip(requests, self._iterate_pools(requests), strict=True):
            if pool is None:
                answers.append(Unparsed(request_id=request.id, reason="no member answered the request"))
                continue
            (result,) = _scores_of_all_items(self.fitted.scores(pool.cells), pool.chosen, pool.raw)
            order, least = np.argsort(-result, kind="stable").tolist(), float(result.min())
            answers.append(
                Ranking(
                    request_id=request.id,
                    items=(*(pool.items[entry] for entry in order), *pool.unknown),
                    scores=(*result[order].tolist(), *(least for _ in pool.unknown)),
                )
            )
        return answers

    def contributions(self, requests: Sequence[Request]) -> list[dict[str, dict[str, float]]]:
        """Return each member's contribution to the scores of candidates, by request, item and name.

        See `Weights.contributions`. Items that are in no member's list have none.
        """
        results: list[dict[str, dict[str, float]]] = []
        for pool in self._iterate_pools(requests):
            results.append({})
            if pool is not None:
                parts = self.fitted.contributions(pool.cells)
                for cell, column in enumerate(np.flatnonzero(pool.chosen[0]).tolist()):
                    results[-1][pool.items[column]] = {name: float(values[cell]) for name, values in parts.items()}
        return results

    def _iterate_pools(self, requests: Sequence[Request]) -> Iterator[_CandidatePool | None]:
        """Yield the candidates of each request with the members' scores; None without candidates."""
        by_member = [part.predictor.answer(requests) for part in self.parts]
        for index, (request, candidates) in enumerate(zip(requests, _candidate_sets(requests, by_member), strict=True)):
            if not candidates:
                yield None
                continue
            # One request at a time, so that results do not depend on other requests.
            unscored = np.array([[not part.has(item) for item in candidates] for part in self.parts])
            # Exclude these items before features are computed relative to the other candidates.
            last = np.logical_and.reduce(unscored) & (not unscored.all())
            known, unknown = ([candidates[n] for n in np.flatnonzero(which).tolist()] for which in (~last, last))
            # A single member ranks all items, as it does without an ensemble.
            top = len(known) if self.fitted.form == "alone" else TOP_ITEMS_PER_MEMBER
            answers = [item[index] for item in by_member]
            yield _CandidatePool(
                known, unknown, *self._cells(request, known, answers, unscored=unscored[:, ~last], top=top)
            )

    def known(self, cases: Sequence[Case]) -> tuple[CandidateScores, list[int]]:
        """Return the members' scores for the cases whose target is a candidate, and the indices of these cases."""
        requests = [case.request for case in cases]
        answers = [part.predictor.answer(requests) for part in self.parts]
        sets = _candidate_sets(requests, answers)
        truth = [
            candidates.index(str(case.truth)) if str(case.truth) in candidates else -1
            for case, candidates in zip(cases, sets, strict=True)
        ]
        usable = [row for row, index in enumerate(truth) if index >= 0]
        blocks = [
            self._cells(requests[row], sets[row], [item[row] for item in answers], truth=truth[row])[0]
            for row in usable
        ]
        if not blocks:
            empty = np.empty((0, 1))
            raw, none = [empty.astype(np.float32)] * len(self.parts), empty.astype(bool)
            kinds = [part.kind for part in self.parts]
            return collect_candidate_scores(raw, none, none, np.empty(0, dtype=np.int64), self.names, kinds, {}), usable
        return concatenate_blocks(blocks), usable

    def _cells(
        self,
        request: Request,
        candidates: Sequence[str],
        answers: Sequence[Answer],
        *,
        truth: int | None = None,
        unscored: NDArray[np.bool_] | None = None,
        top: int = TOP_ITEMS_PER_MEMBER,
    ) -> tuple[CandidateScores, NDArray[np.bool_], list[NDArray[np.float32]]]:
        """Return the members' scores for given candidates; see `CatalogueEnsemble._cells`.

        Args:
            request: The request.
            candidates: The items to rank.
            answers: The answer of each member.
            truth: The index of the target.
            unscored: Which items a member cannot score, shape (members, candidates).
            top: Number of top items of each member that become candidates; other items come after them.
        """
        scores = [
            _candidate_scores(answer, candidates, part.kind) for answer, part in zip(answers, self.parts, strict=True)
        ]
        if unscored is not None and unscored.any():
            known = zip(scores, unscored, self.fitted.parts, strict=True)
            scores = [_fill_unscored(values, new, weight) for values, new, weight in known]
        raw = [values[None].astype(np.float32) for values in scores]
        chosen, in_history = select_candidates(raw, None, top), _history_mask(request, candidates)[None]
        codes = np.empty(0, dtype=np.int64) if self.context is None else self.context.codes(candidates)
        context = _candidate_features(self.context, [request], chosen, codes)
        kinds, target = [part.kind for part in self.parts], None if truth is None else np.array([truth])
        return collect_candidate_scores(raw, chosen, in_history, target, self.names, kinds, context), chosen, raw


def _candidate_sets(requests: Sequence[Request], answers: Sequence[Sequence[Answer]]) -> list[Sequence[str]]:
    """Return the candidates of each request; without candidates, all items ranked by any member.

    They are sorted, so that sums do not depend on the order of the lists.
    """
    return [
        sorted(request.candidates or ())
        or sorted({item for member in answers if isinstance(answer := member[index], Ranking) for item in answer.items})
        for index, request in enumerate(requests)
    ]


def _fill_unscored(scores: NDArray[np.float64], unscored: NDArray[np.bool_], weight: float) -> NDArray[np.float64]:
    """Return the scores of a member, shape (m,); items that it cannot score get its lowest score."""
    known = scores[~unscored]
    if not len(known):
        return scores
    return np.where(unscored, known.min() if weight >= 0 else known.max(), scores)


def _history_mask(request: Request, candidates: Sequence[str]) -> NDArray[np.bool_]:
    seen = {event.item_id for event in request.history}
    return np.array([item in seen for item in candidates], dtype=bool)


def _candidate_scores(answer: Answer, candidates: Sequence[str], kind: ScoreScale) -> NDArray[np.float64]:
    """Return the scores of candidates in an answer, shape (m,); equal scores if it could not be parsed."""
    if not isinstance(answer, Ranking):
        return np.zeros(len(candidates))
    if answer.scores:
        known = dict(zip(answer.items, answer.scores, strict=True))
    else:
        known = {item: -float(np.log(index)) for index, item in enumerate(answer.items, start=1)}
    # Items that a ranking lacks come after its last item; `CandidateScores.scores` handles those that a beam search
    # lacks.
    least = min(known.values(), default=0.0) * {"logits": 1.0, "counts": 0.5, "beams": 0.0}[kind]
    return np.array([known.get(item, least) for item in candidates], dtype=np.float64)
