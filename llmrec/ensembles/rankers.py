"""Ensembles of rankers, with weights from validation users on whom no member was tuned.

Two forms of the probability of the next item:

- a conditional logit, ``p(j) = softmax_j(sum_k w_k z_kj)`` over the members' scores z (McFadden, 1974): weights are
  exponents, and a negative one means that a member overstates what another one also contributes;
- a linear pool, ``p(j) = sum_k w_k p_k(j)`` with weights that sum to 1 (Jelinek and Mercer, 1980): a member with
  probability 0 for an item cannot veto it.

Both are fitted by maximum likelihood. Likelihood is not NDCG, so the form is chosen by NDCG, cross-fitted over users,
and every single member is a form too: on validation no ensemble is worse than its best member. If items of the history
can be ranked, these have an additional weight.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrec.ensembles.base import Ensemble
from llmrec.ensembles.weights import CELLS, Kind, Tried, WeighedCases, Weights, combined
from llmrec.errors import LlmrecError
from llmrec.types import Answer, Case, CatalogueScorer, Predictor, Ranking, Request, Unparsed

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Member:
    """A member that scores the catalogue.

    Attributes:
        name: Its name in tables.
        scorer: The fitted scorer of the catalogue.
        kind: The scale of its scores.
    """

    name: str
    scorer: CatalogueScorer
    kind: Kind


class CatalogueEnsemble(Ensemble):
    """An ensemble of scorers of the catalogue; it is a `CatalogueScorer`."""

    def __init__(self, name: str, parts: Sequence[Member], *, filtered: bool) -> None:
        """Create the ensemble.

        Args:
            name: The name of the row.
            parts: The members, with the same catalogue in the same order.
            filtered: Whether items of the history are excluded from rankings.

        Raises:
            LlmrecError: If there are fewer than two members, or they have different catalogues.
        """
        if len(parts) < 2 or any(part.scorer.items != parts[0].scorer.items for part in parts):
            raise LlmrecError(f"{name}: a fusion needs two or more parts over one catalogue", kind="mismatch")
        super().__init__(name)
        self.parts, self.filtered = tuple(parts), filtered

    @property
    def items(self) -> tuple[str, ...]:
        """The catalogue in column order."""
        return self.parts[0].scorer.items

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the members."""
        return tuple(part.name for part in self.parts)

    def fit(self, cases: Sequence[Case], *, dissect: bool = False, only: Tried | None = None) -> None:
        """Fit the weights of every form, and keep the best form by cross-fitted NDCG@10.

        Args:
            cases: Validation cases of users who were not used to fit or choose a member.
            dissect: Fit the best form again without each member, for the attribute ``without``.
            only: The form to fit, if it was chosen before with another seed of the members.

        Raises:
            LlmrecError: If parameters or the epoch of a member were chosen from one of these users.
            LlmrecError: If there are too few users to fit weights on four fifths of them.
        """
        self._refuse([(part.name, part.scorer) for part in self.parts], cases)
        self._choose(_known(self, cases), [case.request.user_id for case in cases], dissect=dissect, only=only)

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return log-probabilities, shape (n, items); see `CatalogueScorer.scores`."""
        # A member with weight 0 is not called.
        raw = [
            np.asarray(part.scorer.scores(requests)) if weight else np.empty(0)
            for part, weight in zip(self.parts, self.fitted.parts, strict=True)
        ]
        kinds, had = [part.kind for part in self.parts], _history(self, requests)
        return np.asarray(combined(self.fitted, raw, kinds, had, had if self.filtered else None), dtype=np.float64)


def _known(fusion: CatalogueEnsemble, cases: Sequence[Case]) -> WeighedCases:
    requests = [case.request for case in cases]
    column = {item: index for index, item in enumerate(fusion.items)}
    truth = np.array([column[str(case.truth)] for case in cases])
    had = _history(fusion, requests)
    if fusion.filtered:
        had[np.arange(len(truth)), truth] = False
    block = max(1, CELLS // len(fusion.items))
    raw = [
        np.concatenate(
            [
                np.asarray(part.scorer.scores(requests[start : start + block]), dtype=np.float32)
                for start in range(0, len(requests), block)
            ]
        )
        for part in fusion.parts
    ]
    out = had if fusion.filtered else None
    return WeighedCases(raw, [part.kind for part in fusion.parts], had, truth, out, not fusion.filtered)


def _history(fusion: CatalogueEnsemble, requests: Sequence[Request]) -> NDArray[np.bool_]:
    column: Mapping[str, int] = {item: index for index, item in enumerate(fusion.items)}
    had = np.zeros((len(requests), len(column)), dtype=bool)
    for row, request in enumerate(requests):
        had[row, [column[event.item_id] for event in request.history if event.item_id in column]] = True
    return had


# --------------------------------------------------------------------------- lists


@dataclass(frozen=True)
class ListMember:
    """A member that ranks candidates.

    Attributes:
        name: Its name in tables.
        predictor: Answers with a `Ranking` of the candidates; if this has no scores, they are ``-log(rank)``.
        kind: The scale of its scores.
        knows: The items that it can score; None: all.
    """

    name: str
    predictor: Predictor
    kind: Kind
    knows: Container[str] | None = None

    def has(self, item: str) -> bool:
        """Whether it can score an item."""
        return self.knows is None or item in self.knows


class ListEnsemble(Ensemble):
    """An ensemble of rankers that return lists, such as strategies with a language model.

    Scores are normalised over the candidates of a request. If the whole catalogue is ranked, members answer with their
    best items, and the candidates are the union of these. An item missing from a member's list has the score of the
    list's last item if scores are logits, and half of it if scores are counts, which are between that and 0.

    Attributes:
        validation: NDCG@10 of each case of ``fit``, by request id, with weights fitted without its user; 0 if the
            target is not among the candidates.
    """

    def __init__(self, name: str, parts: Sequence[ListMember], weights: Weights | None = None) -> None:
        """Create the ensemble.

        Args:
            name: The name of the row.
            parts: The members.
            weights: The weights of an earlier ``fit``.

        Raises:
            LlmrecError: If there are fewer than two members, or the number of weights differs.
        """
        if len(parts) < 2 or (weights is not None and len(weights.parts) != len(parts)):
            raise LlmrecError(f"{name}: a fusion needs two or more parts, and a weight for each", kind="mismatch")
        super().__init__(name)
        self.parts, self.weights = tuple(parts), weights
        self.validation: dict[str, float] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the members."""
        return tuple(part.name for part in self.parts)

    def fit(self, cases: Sequence[Case], *, dissect: bool = False, onto: Sequence[Ensemble] = ()) -> None:
        """Fit the weights of every form, and keep the best form by cross-fitted NDCG@10.

        Args:
            cases: Validation cases of users who were not used to fit or choose a member. Cases whose target is not
                among the candidates have no information about weights and are left out.
            dissect: Fit the best form again without each member, for the attribute ``without``.
            onto: Fitted ensembles of some of the members; the others may be added to each of them.

        Raises:
            LlmrecError: If there are too few users to fit weights on four fifths of them.
        """
        self._refuse([(part.name, part.predictor) for part in self.parts], cases)
        requests = [case.request for case in cases]
        text = [part.predictor.answer(requests) for part in self.parts]
        sets = _sets(requests, text)
        able = [place for place, case in enumerate(cases) if str(case.truth) in sets[place]]
        known = self._known(
            [cases[place] for place in able],
            [sets[place] for place in able],
            [[answers[place] for place in able] for answers in text],
        )
        self._choose(known, [cases[place].request.user_id for place in able], dissect=dissect, onto=onto)
        assert self.crossed is not None
        result = zip((requests[place].id for place in able), self.crossed.tolist(), strict=True)
        self.validation = {**dict.fromkeys((request.id for request in requests), 0.0), **dict(result)}

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates of each request; see `Predictor.answer`.

        An item that a member does not know has the member's least favourable score, depending on the sign of its
        weight. So items that no member knows come last.
        """
        weights, kinds = self.fitted, [part.kind for part in self.parts]
        text = [part.predictor.answer(requests) for part in self.parts]
        answers: list[Answer] = []
        for index, (request, candidates) in enumerate(zip(requests, _sets(requests, text), strict=True)):
            if not candidates:
                answers.append(Unparsed(request_id=request.id, reason="no part has an answer for the request"))
                continue
            # One request at a time, so that results do not depend on other requests.
            strange = np.array([[not part.has(item) for item in candidates] for part in self.parts])
            rows = [
                _with_least(_scores(entry[index], candidates, part.kind), new, weight)[None]
                for entry, part, new, weight in zip(text, self.parts, strange, weights.parts, strict=True)
            ]
            had = _had(request, candidates)[None]
            (result,) = combined(weights, rows, kinds, had, None).astype(np.float64)
            order = np.lexsort((strange.all(axis=0), -result)).tolist()
            answers.append(
                Ranking(
                    request_id=request.id,
                    items=tuple(candidates[entry] for entry in order),
                    scores=tuple(result[order].tolist()),
                )
            )
        return answers

    def _known(
        self, cases: Sequence[Case], sets: Sequence[Sequence[str]], said: Sequence[Sequence[Answer]]
    ) -> WeighedCases:
        """Return cases with the members' scores; smaller candidate sets are padded."""
        shape = len(cases), max(map(len, sets), default=0)
        out, had = np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for row, (case, candidates) in enumerate(zip(cases, sets, strict=True)):
            out[row, : len(candidates)] = False
            had[row, : len(candidates)] = _had(case.request, candidates)
        raw = []
        for part, answers in zip(self.parts, said, strict=True):
            result = np.zeros(shape, dtype=np.float32)
            for row, (answer, candidates) in enumerate(zip(answers, sets, strict=True)):
                scores = _scores(answer, candidates, part.kind)
                # Padding must not be the maximum, relative to which the other scores are computed.
                result[row] = scores.min() if part.kind == "logits" else 0
                result[row, : len(candidates)] = scores
            raw.append(result)
        truth = [candidates.index(str(case.truth)) for case, candidates in zip(cases, sets, strict=True)]
        return WeighedCases(
            raw,
            [part.kind for part in self.parts],
            had,
            np.array(truth, dtype=np.int64),
            out if out.any() else None,
            bool(had.any()),
        )


def _sets(requests: Sequence[Request], said: Sequence[Sequence[Answer]]) -> list[Sequence[str]]:
    """Return the candidates of each request, or the union of the members' lists.

    They are sorted, since the last digit of sums depends on their order.
    """
    return [
        sorted(request.candidates or ())
        or sorted({item for answers in said if isinstance(entry := answers[index], Ranking) for item in entry.items})
        for index, request in enumerate(requests)
    ]


def _with_least(scores: NDArray[np.float64], strange: NDArray[np.bool_], weight: float) -> NDArray[np.float64]:
    """Return the scores of a member, shape (m,), with the least favourable score for items that it does not know."""
    known = scores[~strange]
    if not strange.any() or not len(known):
        return scores
    return np.where(strange, known.min() if weight >= 0 else known.max(), scores)


def _had(request: Request, candidates: Sequence[str]) -> NDArray[np.bool_]:
    seen = {event.item_id for event in request.history}
    return np.array([item in seen for item in candidates], dtype=bool)


def _scores(answer: Answer, candidates: Sequence[str], kind: Kind) -> NDArray[np.float64]:
    """Return the scores of candidates in an answer, shape (m,); equal scores if it is unparsed."""
    if not isinstance(answer, Ranking):
        return np.zeros(len(candidates))
    if answer.scores:
        known = dict(zip(answer.items, answer.scores, strict=True))
    else:
        known = {item: -float(np.log(index)) for index, item in enumerate(answer.items, start=1)}
    # Items missing from a ranking come after its last; `feature` handles items missing from a search.
    least = min(known.values(), default=0.0) * {"logits": 1.0, "counts": 0.5, "beams": 0.0}[kind]
    return np.array([known.get(item, least) for item in candidates], dtype=np.float64)
