"""Ensembles of a run's baselines, optionally with its language model, with the weights fitted in the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from llmrec.answer.classic import (
    NOTHING_LEFT,
    ItemIdMapper,
    annotate_answer,
    fill_candidates,
    rank_top_items,
    recommendable_mask,
)
from llmrec.answer.known import digest_catalogue
from llmrec.answer.recommender import (
    EXPLAIN,
    RANK,
    AnnotatedAnswer,
    Kind,
    Question,
    Reasons,
    Recommender,
    check_default_strategy,
)
from llmrec.answer.strategy import TaskStrategy
from llmrec.baselines.fits import fit_baseline
from llmrec.baselines.parameters import input_hashes
from llmrec.data.requests import RankRequest
from llmrec.data.split import SplitDataset
from llmrec.ensembles.context import ContextFeatures
from llmrec.ensembles.members import PrecomputedMember, member_training_data
from llmrec.ensembles.rankers import CatalogueEnsemble, CatalogueMember, ListEnsemble, ListMember
from llmrec.ensembles.stored import StoredEnsemble, StoredMember, read_ensembles
from llmrec.errors import RecipeError
from llmrec.fingerprint import digest_of
from llmrec.pipeline.bundle import Bundle
from llmrec.types import Answer, CatalogueScorer, Cost, Item, Predictor, Ranking, Request, Text, Unparsed

# Number of largest contributions to list; the rest is summed.
_MAX_LISTED_CONTRIBUTIONS = 4


def find_stored_ensemble(bundle: Bundle, way: TaskStrategy, joined: str) -> StoredEnsemble:
    """Return the ensemble that a run fitted for a task, template and strategy.

    Args:
        bundle: The model.
        way: The family, template and strategy.
        joined: ``model``: the ensemble with the language model; ``baselines``: the ensemble of baselines only.
    """
    folder = bundle.source_folder
    stored = [fusion for fusion in read_ensembles(folder).fusions if fusion.family == way.family]
    results = [fusion for fusion in stored if (fusion.arm == "baseline") == (joined == "baselines")]
    if joined == "model":
        name = bundle.templates[way.family][way.template].id
        results = [result for result in results if result.template == name and result.parts[-1].name == way.strategy]
        results = [item for item in results if item.arm == ("tuned" if bundle.tuned else "zero-shot")]
    if results:
        # The last ensemble of baselines has the most members.
        return results[-1]
    known = ", ".join(fusion.id for fusion in stored) or "none"
    more = "eval.fusion.model_users=200 and " if joined == "model" else ""
    raise RecipeError(
        f"--fuse {joined}: {folder} has no matching ensemble for {way.family} with strategy {way.strategy} "
        f"(ensembles: {known}); evaluate its recipe with {more}eval.fusion.controls=true",
        kind="missing-value",
        at=folder,
        column="--fuse",
    )


class Ensemble:
    """An ensemble with the weights fitted in a run; its baselines are fitted on first use.

    Args:
        fused: The members and weights from the run.
        data: The training data of its baselines; held-out interactions are excluded.
        items: The catalogue, which may be changed in place.
        name: Its name in questions.
        model: The language model among its members; None: there is none, or its rankings are passed to `join`.
        finder: The model that retrieves candidates for an ensemble with a language model.
    """

    kind: Kind = "fusion"
    strategies: tuple[str, ...] = ()
    verbs: tuple[str, ...] = (RANK, EXPLAIN)

    def __init__(
        self,
        fused: StoredEnsemble,
        data: SplitDataset,
        items: Mapping[str, Item],
        name: str = "",
        model: Recommender | None = None,
        finder: Recommender | None = None,
    ) -> None:
        self.name, self._items, self._model, self._finder = name, items, model, finder
        self._fused, self._data, self._naming = fused, data, ItemIdMapper(data)
        self._baselines: dict[str, Predictor] = {}
        self._weights, self._context = fused.weights(), ContextFeatures(data)

    @property
    def asks_model(self) -> bool:
        """Whether a language model is one of the members."""
        return any(part.baseline is None for part in self._fused.parts)

    @property
    def identity(self) -> dict[str, object]:
        """All inputs that determine how rankings are combined."""
        parts = [part for part in self._fused.parts if part.baseline is not None]
        hashes = [input_hashes(str(part.baseline), part.parameters) for part in parts]
        return {"fused": self._fused.model_dump(mode="json"), "data": self._data.fingerprint, "read": hashes}

    @property
    def signature(self) -> str:
        """See `Recommender`."""
        model = None if self._model is None else self._model.signature
        return digest_of(fused=self.identity, model=model, items=digest_catalogue(self._items))

    def answer(
        self, requests: Sequence[RankRequest], question: Question, listener: Callable[[str], None] | None = None
    ) -> list[AnnotatedAnswer]:
        """See `Recommender`."""
        check_default_strategy(self, question)
        if question.verb == EXPLAIN:
            return [self._explain_item(request) for request in requests]
        depth, filled = question.depth, list(requests)
        unfilled = [n for n, request in enumerate(requests) if not request.candidates]
        answers: dict[int, Ranking | Unparsed] = {}
        if self._model is None:
            answers.update(zip(unfilled, self._lists([requests[n] for n in unfilled], depth), strict=True))
        else:
            for n in unfilled:
                filled[n] = self._filled(requests[n], depth)
        rankable = [n for n, request in enumerate(filled) if request.candidates]
        posed = [filled[n] for n in rankable]
        for n, answer in zip(rankable, self.join(posed, self._language_model_rankings(posed, depth)), strict=True):
            if isinstance(answer, Ranking) and not requests[n].candidates:
                answer = replace(answer, items=answer.items[:depth], scores=answer.scores[:depth])
            answers[n] = answer
        results = []
        for n, request in enumerate(filled):
            answer = answers.get(n) or Unparsed(request_id=request.id, reason=NOTHING_LEFT)
            # A language model reads titles, so it can use unknown items.
            unknown = self._naming.known(request)[1] if self._model is None else ()
            results.append(annotate_answer(answer, request, self._items, unknown))
        return results

    def join(self, requests: Sequence[RankRequest], ranked: Sequence[Answer] | None) -> list[Ranking | Unparsed]:
        """Combine the rankings of the members, and return them with the cost of the language model.

        Args:
            requests: Requests with candidates.
            ranked: The answers of the language model; None if it is not a member.
        """
        fusion, translated = self._build_list_ensemble(requests, ranked)
        results: list[Ranking | Unparsed] = []
        for n, answer in enumerate(fusion.answer(translated)):
            reply = ranked[n] if ranked else None
            if isinstance(reply, Unparsed):
                results.append(reply)
            elif isinstance(answer, Ranking):
                back = self._naming.back(answer, requests[n])
                results.append(back if reply is None else replace(back, raw=reply.raw, cost=reply.cost))
            else:
                results.append(Unparsed(request_id=requests[n].id, reason="there is nothing to rank"))
        return results

    def reasons(
        self, requests: Sequence[RankRequest], lists: Sequence[AnnotatedAnswer], question: Question, first: int
    ) -> list[Reasons]:
        """Explain the first items of every list by the contributions of the members, as text.

        The lists are ranked again, because contributions are relative to the mean over all candidates.
        """
        results = []
        for request, answer in zip(requests, lists, strict=True):
            reasons = Reasons()
            # For a cold-start user, the popular items do not come from the ensemble.
            if isinstance(answer.answer, Ranking) and not answer.cold:
                pool = request if request.candidates else self._filled(request, question.depth)
                parts, reasons.cost = self._contributions(pool, question.depth)
                reasons.texts = [_format_contributions(parts.get(item)) for item in answer.answer.items[:first]]
            results.append(reasons)
        return results

    def _explain_item(self, request: RankRequest) -> AnnotatedAnswer:
        """Explain the score of one item among all recommendable items by the contributions of the members, as text."""
        (item,) = request.candidates
        pool = self._filled(replace(request, candidates=()), 0)
        pool = replace(pool, candidates=(item, *(other for other in pool.candidates if other.item_id != item.item_id)))
        parts, cost = self._contributions(pool, 0)
        return AnnotatedAnswer(
            answer=Text(request_id=request.id, text=_format_contributions(parts.get(item.item_id)), cost=cost)
        )

    def _contributions(self, request: RankRequest, depth: int) -> tuple[dict[str, dict[str, float]], Cost]:
        """Return each member's contribution to the candidates' scores, by item, and the cost of the language model."""
        ranked = self._language_model_rankings([request], depth)
        fusion, translated = self._build_list_ensemble([request], ranked)
        (parts,) = fusion.contributions(translated)
        names = zip(request.candidates, translated[0].candidates or (), strict=True)
        known = {item.item_id: parts[name] for item, name in names if name in parts}
        return known, Cost() if ranked is None else ranked[0].cost

    def _language_model_rankings(self, requests: Sequence[RankRequest], depth: int) -> list[Answer] | None:
        """Return the rankings of the language model; None if it is not a member or there is no request."""
        if self._model is None or not requests:
            return None
        return [item.answer for item in self._model.answer(requests, Question(depth=depth))]

    def _build_list_ensemble(
        self, requests: Sequence[RankRequest], ranked: Sequence[Answer] | None
    ) -> tuple[ListEnsemble, list[Request]]:
        """Return the ensemble, and the requests converted to ids of its data; see `join`."""
        translated = [self._naming.request(request) for request in requests]
        answers: dict[str, Answer] = {}
        for n, item in enumerate(ranked or ()):
            answers[str(n)] = self._naming.renamed(item, requests[n]) if isinstance(item, Ranking) else item
        # A language model reads titles, so it can rank items that are not in the data.
        parts = [
            ListMember(
                part.name,
                self._predictor(part, answers),
                part.kind,
                self._data.dataset.items if part.baseline else None,
            )
            for part in self._fused.parts
        ]
        fusion = ListEnsemble(self._fused.id, parts, self._weights, self._context)
        return fusion, [replace(request, id=str(n)) for n, request in enumerate(translated)]

    def _predictor(self, part: StoredMember, answers: dict[str, Answer]) -> Predictor:
        if part.baseline is None:
            return PrecomputedMember(part.name, "language model", part.kind, answers)
        if part.name not in self._baselines:
            data = member_training_data(part.baseline, self._data, self._fused.reserved)
            self._baselines[part.name] = fit_baseline(part.baseline, part.parameters, data, seed=self._fused.seed)
        return self._baselines[part.name]

    def _filled(self, request: RankRequest, depth: int) -> RankRequest:
        """Add candidates to a request on the whole catalogue."""
        if self._model is not None and self._finder is not None:
            return fill_candidates([request], self._finder, depth, self._items)[0]
        history = [] if request.keep_seen else self._naming.known(request)[0]
        seen = {event.item_id for event in history}
        out = request.barred | seen | {past.item.item_id for past in request.history if not request.keep_seen}
        # An item unknown to all members is ranked last among candidates, and left out of lists of the whole catalogue.
        left = (item for name, item in self._items.items() if name not in out and self._naming.has(item))
        return replace(request, candidates=tuple(left))

    def _lists(self, requests: Sequence[RankRequest], depth: int) -> list[Ranking | Unparsed]:
        """Rank the whole catalogue for requests without candidates, using baselines that score all items."""
        if not requests:
            return []
        translated = [replace(self._naming.request(request), candidates=None) for request in requests]
        mask = recommendable_mask(requests, translated, self._columns, self._items)
        rankings = rank_top_items(
            requests, self._catalogue.items, self._catalogue.scores(translated, ~mask), mask, depth
        )
        return [
            ranking if ranking.items else Unparsed(request_id=ranking.request_id, reason=NOTHING_LEFT)
            for ranking in rankings
        ]

    @cached_property
    def _columns(self) -> Mapping[str, int]:
        return {name: column for column, name in enumerate(self._catalogue.items)}

    @cached_property
    def _catalogue(self) -> CatalogueEnsemble:
        """The ensemble of the same baselines over the whole catalogue."""
        members = []
        for part in self._fused.parts:
            scorer = self._predictor(part, {})
            assert isinstance(scorer, CatalogueScorer)
            members.append(CatalogueMember(part.name, scorer, part.kind))
        return CatalogueEnsemble(self._fused.id, members, filtered=False, context=self._context, weights=self._weights)


def _format_contributions(parts: Mapping[str, float] | None) -> str:
    """Return the contributions to an item's score as text, largest first."""
    if parts is None:
        return "not among the best items of any member"
    ordered = sorted(parts.items(), key=lambda part: -abs(part[1]))
    texts = [f"{name} {value:+.3g}" for name, value in ordered[:_MAX_LISTED_CONTRIBUTIONS]]
    if rest := ordered[_MAX_LISTED_CONTRIBUTIONS:]:
        texts.append(f"{len(rest)} more {sum(value for _, value in rest):+.3g}")
    return ", ".join(texts)
