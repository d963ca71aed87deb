"""Fusion of rankers that answer with candidate sets: classic ones, and strategies that ask a language model.

The forms, and how they are chosen, are those of `llmrec.strategies.fusion`; what parts say is normalised over the
candidates of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrec.errors import LlmrecError
from llmrec.strategies.fusion_weights import Kind, Known, Weighed, Weights, combined
from llmrec.types import Answer, Case, Predictor, Ranking, Request, Unparsed

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Voice:
    """One of the rankers.

    Attributes:
        name: In tables.
        predictor: Answers with a `Ranking` of the candidates. One without scores is read as ``-log(place)``.
        kind: How its scores are read.
    """

    name: str
    predictor: Predictor
    kind: Kind


class CandidateFusion(Weighed):
    """Ranks candidates by several rankers at once."""

    def __init__(self, name: str, parts: Sequence[Voice], weights: Weights | None = None) -> None:
        """Set up.

        Args:
            name: Of the row.
            parts: The rankers.
            weights: What an earlier ``fit`` found, to answer with.

        Raises:
            LlmrecError: If there are fewer than two parts, or not as many weights.
        """
        if len(parts) < 2 or (weights is not None and len(weights.parts) != len(parts)):
            raise LlmrecError(f"{name}: a fusion needs two or more parts, and a weight for each", kind="mismatch")
        super().__init__(name)
        self.parts, self.weights = tuple(parts), weights

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parts."""
        return tuple(part.name for part in self.parts)

    def fit(self, cases: Sequence[Case], *, dissect: bool = False) -> None:
        """Fit the weights of every form, and keep the best form by cross-fitted NDCG@10.

        Args:
            cases: Validation cases of users that no part has learned from or was chosen by. Those whose target is not
                among the candidates say nothing about weights and are left out.
            dissect: Fit the best form once more without each part, for the attribute ``without``.

        Raises:
            LlmrecError: If there are too few users to fit weights on all but a fifth of them.
        """
        cases = [case for case in cases if str(case.truth) in (case.request.candidates or ())]
        known = self._known(cases)
        self._choose(known, [case.request.user_id for case in cases], dissect=dissect)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates of each request; see `Predictor.answer`. A request without candidates is not answered."""
        weights, kinds = self.fitted, [part.kind for part in self.parts]
        said = [part.predictor.answer(requests) for part in self.parts]
        answers: list[Answer] = []
        for place, request in enumerate(requests):
            candidates = request.candidates
            if not candidates:
                answers.append(Unparsed(request_id=request.id, reason="the request has no candidates"))
                continue
            # One request at a time, so that no other one changes a digit.
            rows = [
                _scores(each[place], candidates, part.kind)[None] for each, part in zip(said, self.parts, strict=True)
            ]
            (found,) = combined(weights, rows, kinds, _had(request)[None], None).astype(np.float64)
            order = np.lexsort((np.array(candidates), -found)).tolist()
            answers.append(
                Ranking(
                    request_id=request.id,
                    items=tuple(candidates[each] for each in order),
                    scores=tuple(found[order].tolist()),
                )
            )
        return answers

    def _known(self, cases: Sequence[Case]) -> Known:
        """Return the cases with what the parts say, sets of fewer candidates being filled up."""
        requests = [case.request for case in cases]
        sets = [request.candidates or () for request in requests]
        shape = len(cases), max(map(len, sets), default=0)
        out, had = np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for row, (request, candidates) in enumerate(zip(requests, sets, strict=True)):
            out[row, : len(candidates)] = False
            had[row, : len(candidates)] = _had(request)
        raw = []
        for part in self.parts:
            found = np.zeros(shape, dtype=np.float32)
            for row, (answer, candidates) in enumerate(zip(part.predictor.answer(requests), sets, strict=True)):
                scores = _scores(answer, candidates, part.kind)
                # What fills up must not be the greatest score, which the others are compared with.
                found[row] = scores.min(initial=np.inf) if part.kind == "logits" else 0
                found[row, : len(candidates)] = scores
            raw.append(found)
        truth = np.array(
            [candidates.index(str(case.truth)) for case, candidates in zip(cases, sets, strict=True)], dtype=np.int64
        )
        return Known(raw, [part.kind for part in self.parts], had, truth, out if out.any() else None, bool(had.any()))


def _had(request: Request) -> NDArray[np.bool_]:
    seen = {event.item_id for event in request.history}
    return np.array([item in seen for item in request.candidates or ()], dtype=bool)


def _scores(answer: Answer, candidates: Sequence[str], kind: Kind) -> NDArray[np.float64]:
    """Return what an answer says of each candidate, shape (m,); one that cannot be read says the same of all."""
    if not isinstance(answer, Ranking):
        return np.zeros(len(candidates))
    if answer.scores:
        known = dict(zip(answer.items, answer.scores, strict=True))
    else:
        known = {item: -float(np.log(place)) for place, item in enumerate(answer.items, start=1)}
    # What a ranking leaves out stands behind what it has.
    least = min(known.values(), default=0.0) if kind == "logits" else 0.0
    return np.array([known.get(item, least) for item in candidates], dtype=np.float64)
