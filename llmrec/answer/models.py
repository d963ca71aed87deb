"""The models that answer for one run or folder, by name: tuned, untuned, each classic recommender, their fusion.

Python, a service and the command line ask all of them in one way: `AnsweringModel`. What is asked of a language model
goes through `llmrec.answer.recommender`, so that a list is the one that `llmrec rank` writes, to the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np

from llmrec.answer.about import about_families, answer_about, prompt_about, way_about
from llmrec.answer.fused import Fuser
from llmrec.answer.naming import Naming
from llmrec.answer.rationales import Reasoner, Reasons, rationale_template
from llmrec.answer.recommender import Answered, Recommender
from llmrec.answer.requests import first_prompt
from llmrec.answer.strategy import ranking_families_of
from llmrec.data.assemble import digest_items
from llmrec.data.requests import Past, RankRequest, some
from llmrec.data.split import SplitDataset
from llmrec.errors import RecipeError
from llmrec.fingerprint import digest_of
from llmrec.guard import TEXT_LIMIT, clean
from llmrec.types import Answer, CatalogueScorer, Item, Predictor, Ranking, Request, Unparsed

Kind = Literal["language model", "classic", "fusion"]
RANK = "rank"
"""The verb of lists; the others are names of families."""

_LEAST_BEAMS = 20
MOST_SEARCHED = 160
"""Items of a catalogue that a language model returns at most: a search takes seconds, and grows with them."""

MOST_ORDERED = 200
"""Candidates that a language model orders in one question."""
_NOTHING = "no item of the catalogue is left to rank"
# Candidates that a language model or a fusion with one orders, where it cannot search the catalogue itself.
_RETRIEVED = 50


class AnsweringModel(Protocol):
    """What answers under a name."""

    name: str
    kind: Kind

    @property
    def verbs(self) -> tuple[str, ...]:
        """``rank`` and the families of questions about one item."""
        ...

    @property
    def strategies(self) -> tuple[str, ...]:
        """How it may be asked to order candidates; none where there is one way only."""
        ...

    @property
    def signature(self) -> str:
        """Changes with everything that can change an answer, but for the request."""
        ...

    def rank(self, requests: Sequence[RankRequest], *, depth: int, strategy: str = "auto") -> list[Answered]:
        """Order the candidates of every request, or the whole catalogue where it brings none.

        Args:
            requests: What is asked; ``barred`` and ``keep_seen`` are for the whole catalogue.
            depth: Items that are wanted of a catalogue; candidates are ranked all.
            strategy: One of `strategies`, or ``auto``.
        """
        ...

    def about(self, family: str, requests: Sequence[RankRequest]) -> list[Answer]:
        """Answer questions about the one candidate of each request."""
        ...

    def changed(self) -> None:
        """Take note that the catalogue was changed in place."""
        ...


class LanguageModel:
    """A tuned or plain language model.

    Args:
        name: Under which it answers.
        base: An open recommender of the model; its ``items`` may be changed in place, see `changed`.
        fallback: What finds candidates where the model can search no catalogue; None: nothing does.
    """

    kind: Kind = "language model"

    def __init__(self, name: str, base: Recommender, fallback: AnsweringModel | None = None) -> None:
        self.name, self.base, self._fallback = name, base, fallback
        self._ways: dict[tuple[object, ...], Recommender] = {}

    @property
    def verbs(self) -> tuple[str, ...]:
        """See `AnsweringModel`."""
        bundle = self.base.bundle
        return (*((RANK,) if ranking_families_of(bundle) else ()), *about_families(bundle))

    @property
    def strategies(self) -> tuple[str, ...]:
        """See `AnsweringModel`."""
        return self.base.ways

    @property
    def signature(self) -> str:
        """See `AnsweringModel`."""
        finder = None if self._fallback is None else self._fallback.signature
        return _signed(finder=finder, **self.base.identity)

    def rank(self, requests: Sequence[RankRequest], *, depth: int, strategy: str = "auto") -> list[Answered]:
        """See `AnsweringModel`."""
        found: dict[int, Answered] = {}
        for n, request in enumerate(requests):
            if len(request.candidates) > MOST_ORDERED:
                reason = (
                    f"{len(request.candidates)} candidates are more than the {MOST_ORDERED} that a language model "
                    "orders at once; let a classic recommender or a fusion choose among them first"
                )
                found[n] = Answered(answer=Unparsed(request_id=request.id, reason=reason), notes=request.notes)
        given = [n for n, request in enumerate(requests) if request.candidates and n not in found]
        if given:
            way = self._way(candidates="file", strategy=self.base.options.strategy if strategy == "auto" else strategy)
            found.update(zip(given, way.answer([requests[n] for n in given]), strict=True))
        rest = [n for n in range(len(requests)) if n not in found]
        if rest:
            found.update(zip(rest, self._whole([requests[n] for n in rest], depth, strategy), strict=True))
        return [found[n] for n in range(len(requests))]

    def about(self, family: str, requests: Sequence[RankRequest]) -> list[Answer]:
        """See `AnsweringModel`."""
        bundle = self.base.bundle
        way = way_about(bundle, family)
        with self.base.asked(way.strategy) as backend:
            return answer_about(bundle, requests, way=way, backend=backend, encoder=self.base.encoder)

    def written(self, family: str, request: RankRequest, listener: Callable[[str], None]) -> Answer:
        """Answer a question about one item, whose text is handed out while it is generated, where the engine can."""
        bundle, way = self.base.bundle, way_about(self.base.bundle, family)
        with self.base.asked(way.strategy) as backend, backend.heard(_cleaned(listener)):
            return answer_about(bundle, [request], way=way, backend=backend, encoder=self.base.encoder)[0]

    def reasons(self, requests: Sequence[RankRequest], found: Sequence[Answered], first: int) -> list[Reasons]:
        """Write a sentence on each of the first items of every list; failed lists get none."""
        reasoner = Reasoner(
            self.base.bundle, self.base.way, rationale_template(), self.base.encoder, first=first, batch=16
        )
        rankings = [each.answer for each in found]
        known = self.base.items or {}

        def listed(each: Answered) -> tuple[Item, ...]:
            return tuple(known.get(name) or Item(item_id=name, title=title) for name, title in _titled(each))

        pools = [replace(request, candidates=listed(each)) for request, each in zip(requests, found, strict=True)]
        with self.base.asked("list") as backend:
            return reasoner.write(pools, rankings, None, backend)

    def prompt(self, request: RankRequest, verb: str, strategy: str = "auto") -> str:
        """Return the first thing that the model reads of a request, as its tokenizer gets it.

        Raises:
            LlmrecError: If the request cannot be put.
        """
        if verb != RANK:
            return self.base.encoder.text(prompt_about(self.base.bundle, request, way_about(self.base.bundle, verb)))
        way = self._way(candidates="file", strategy=strategy) if request.candidates else self._searching(_LEAST_BEAMS)
        way = way or self._way(candidates="file", strategy=strategy)
        return self.base.encoder.text(first_prompt(self.base.bundle, request, way.way, self.base.encoder))

    def changed(self) -> None:
        """See `AnsweringModel`."""
        self._ways.clear()

    def warm(self) -> None:
        """Load the weights, which otherwise the first question waits for.

        Raises:
            LlmrecError: If the engine does not start.
        """
        if self.base.options.backend != "openai":
            # A model that was tuned on codes knows no others.
            made = (Item(item_id="1", title="One"), Item(item_id="2", title="Another"))
            items = tuple(islice((self.base.items or {}).values(), 2)) or made
            self.rank([RankRequest(id="1", candidates=items, history=(Past(item=items[0]),))], depth=1)

    def _whole(self, requests: Sequence[RankRequest], depth: int, strategy: str) -> list[Answered]:
        searching = self._searching(depth) if strategy in ("auto", "search") else None
        if searching is not None:
            return searching.answer(requests)
        if self._fallback is None:
            reason = f"{self.name} cannot search a catalogue; give 'candidates', or serve a run, whose data finds them"
            return [Answered(answer=Unparsed(request_id=request.id, reason=reason)) for request in requests]
        retrieved = self._fallback.rank(requests, depth=min(MOST_ORDERED, max(depth, _RETRIEVED)))
        filled = [_with(request, each, self.base.items) for request, each in zip(requests, retrieved, strict=True)]
        found = iter(self.rank([each for each in filled if each.candidates], depth=depth, strategy=strategy))
        return [
            next(found) if each.candidates else Answered(answer=Unparsed(request_id=each.id, reason=_NOTHING))
            for each in filled
        ]

    def _searching(self, depth: int) -> Recommender | None:
        """Return what searches the catalogue; None where the model was not tuned to."""
        if not self.base.items or not self.base.searches:
            return None
        # Few widths, so that few searches are set up: powers of two times the least.
        wanted = max(min(depth, MOST_SEARCHED), self.base.options.beams)
        beams = _LEAST_BEAMS * 2 ** max(0, math.ceil(math.log2(wanted / _LEAST_BEAMS)))
        return self._way(candidates="all", beams=beams)

    def _way(self, **changes: Any) -> Recommender:
        key = tuple(sorted(changes.items()))
        if key not in self._ways:
            self._ways[key] = self.base.beside(**changes)
        return self._ways[key]


@dataclass
class Classic:
    """A classic recommender, fitted to the training interactions of a run.

    Attributes:
        name: Under which it answers.
        model: The baseline.
        data: What it learned from.
        items: The catalogue, which may be changed in place.
        family: The family that it answers.
        fingerprint: Of the baseline with its parameters.
    """

    name: str
    model: Predictor
    data: SplitDataset
    items: Mapping[str, Item]
    family: str | None
    fingerprint: object
    kind: Kind = "classic"
    strategies: tuple[str, ...] = ()
    _naming: Naming = field(init=False)

    def __post_init__(self) -> None:
        self._naming = Naming(self.data)

    @property
    def verbs(self) -> tuple[str, ...]:
        """See `AnsweringModel`."""
        return (RANK,) if self.family is None else (self.family,)

    @property
    def signature(self) -> str:
        """See `AnsweringModel`."""
        return _signed(model=self.fingerprint, data=self.data.fingerprint, items=digest_items(self.items))

    def rank(self, requests: Sequence[RankRequest], *, depth: int, strategy: str = "auto") -> list[Answered]:
        """See `AnsweringModel`."""
        _only_auto(self, strategy)
        asked = [self._naming.request(request) for request in requests]
        found: dict[int, Answered] = {}
        given = [n for n, request in enumerate(requests) if request.candidates]
        for n, answer in zip(given, self.model.answer([asked[n] for n in given]), strict=True):
            back = (
                self._naming.back(answer, requests[n]) if isinstance(answer, Ranking) else _unread(answer, requests[n])
            )
            found[n] = _answered(back, requests[n], self.items, self._naming.strange(requests[n]))
        rest = [n for n in range(len(requests)) if n not in found]
        if rest:
            assert isinstance(self.model, CatalogueScorer)
            scores = np.array(self.model.scores([replace(asked[n], candidates=None) for n in rest]), dtype=np.float64)
            for n, row in zip(rest, scores, strict=True):
                found[n] = self._best(requests[n], asked[n], row, depth)
        return [found[n] for n in range(len(requests))]

    def about(self, family: str, requests: Sequence[RankRequest]) -> list[Answer]:
        """See `AnsweringModel`."""
        asked = [self._naming.request(request) for request in requests]
        pairs = [replace(each, candidates=None, item=each.candidates[0] if each.candidates else None) for each in asked]
        return self.model.answer(pairs)

    def changed(self) -> None:
        """See `AnsweringModel`: what was not there when it was fitted stands last among candidates."""

    def _best(self, request: RankRequest, asked: Request, row: Any, depth: int) -> Answered:
        assert isinstance(self.model, CatalogueScorer)
        names = self.model.items
        out = request.barred if request.keep_seen else request.barred | {event.item_id for event in asked.history}
        open_ = np.fromiter((name not in out and name in self.items for name in names), dtype=bool, count=len(names))
        row[~open_] = -np.inf
        order = np.argsort(-row, kind="stable")[: min(depth, int(open_.sum()))]
        ranking = Ranking(
            request_id=request.id,
            items=tuple(names[place] for place in order),
            scores=tuple(float(row[place]) for place in order),
        )
        return _answered(ranking, request, self.items, self._naming.strange(request))


class Fused:
    """The fusion that a run weighed: of its classic recommenders, or of these with its language model.

    Args:
        name: Under which it answers.
        fuser: Joins rankings.
        items: The catalogue, which may be changed in place.
        model: The language model among its parts; None: there is none.
        finder: What finds candidates for a fusion with a language model; it is not asked by one without.
    """

    kind: Kind = "fusion"
    strategies: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        fuser: Fuser,
        items: Mapping[str, Item],
        model: LanguageModel | None = None,
        finder: AnsweringModel | None = None,
    ) -> None:
        self.name, self._fuser, self._items, self._model, self._finder = name, fuser, items, model, finder

    @property
    def verbs(self) -> tuple[str, ...]:
        """See `AnsweringModel`."""
        return (RANK,)

    @property
    def signature(self) -> str:
        """See `AnsweringModel`."""
        model = None if self._model is None else self._model.signature
        return _signed(fused=self._fuser.identity, model=model, items=digest_items(self._items))

    def rank(self, requests: Sequence[RankRequest], *, depth: int, strategy: str = "auto") -> list[Answered]:
        """See `AnsweringModel`."""
        _only_auto(self, strategy)
        filled = [request if request.candidates else self._filled(request, depth) for request in requests]
        able = [request for request in filled if request.candidates]
        ranked = None
        if self._model is not None and able:
            ranked = [each.answer for each in self._model.rank(able, depth=depth)]
        joined = iter(self._fuser.join(able, ranked))
        found: list[Answered] = []
        for request, given in zip(filled, requests, strict=True):
            if not request.candidates:
                found.append(Answered(answer=Unparsed(request_id=request.id, reason=_NOTHING)))
                continue
            answer = next(joined)
            if isinstance(answer, Ranking) and not given.candidates:
                answer = replace(answer, items=answer.items[:depth], scores=answer.scores[:depth])
            # A language model reads the title of an item that no other part knows.
            strange = self._fuser.strange(request) if self._model is None else ()
            found.append(_answered(answer, request, self._items, strange))
        return found

    def about(self, family: str, requests: Sequence[RankRequest]) -> list[Answer]:
        """See `AnsweringModel`."""
        raise _cannot(self, family)

    def changed(self) -> None:
        """See `AnsweringModel`."""

    def _filled(self, request: RankRequest, depth: int) -> RankRequest:
        """Give candidates to a request about the whole catalogue."""
        if self._model is not None and self._finder is not None:
            return _with(
                request, self._finder.rank([request], depth=min(MOST_ORDERED, max(depth, _RETRIEVED)))[0], self._items
            )
        seen = frozenset() if request.keep_seen else self._fuser.seen(request)
        out = request.barred | seen | {past.item.item_id for past in request.history if not request.keep_seen}
        # What no part knows is last among candidates, and in no list of the catalogue.
        left = (item for name, item in self._items.items() if name not in out and self._fuser.knows(item))
        return replace(request, candidates=tuple(left))


def meant(name: str, known: Iterable[str]) -> str | None:
    """Return which of the known models a name means: that of this name, or the first of this method; None: none.

    A classic recommender with parameters is called by all of them, such as ``item-knn(decay=0.5, history=5)``; its
    method alone, ``item-knn``, is enough, and so are some of them, ``item-knn(history=5)``.
    """
    names = list(known)
    method, settings = _told(name)
    alike = (each for each in names if _told(each)[0] == method and settings <= _told(each)[1])
    return name if name in names else next(alike, None)


def _told(name: str) -> tuple[str, set[str]]:
    """Return the method of a name and its parameters."""
    method, _, settings = name.removesuffix(")").partition("(")
    return method, set(settings.split(", ")) - {""}


def check_verb(model: AnsweringModel, verb: str) -> None:
    """Refuse a question that a model does not answer.

    Raises:
        RecipeError: If it does not.
    """
    if verb not in model.verbs:
        raise _cannot(model, verb)


def _cleaned(listener: Callable[[str], None]) -> Callable[[str], None]:
    """Return what is to hear the pieces of a text whose answer is cleaned: it hands on what that has more each time."""
    raw = said = ""

    def heard(piece: str) -> None:
        nonlocal raw, said
        raw += piece
        now = clean(raw, TEXT_LIMIT)
        if len(now) > len(said) and now.startswith(said):
            listener(now[len(said) :])
            said = now

    return heard


def _cannot(model: AnsweringModel, verb: str) -> RecipeError:
    return RecipeError(
        f"the model {model.name!r} does not answer {verb!r}; it answers {', '.join(model.verbs)}",
        kind="unsupported",
        column="model",
    )


def _only_auto(model: AnsweringModel, strategy: str) -> None:
    if strategy != "auto":
        raise RecipeError(
            f"strategy: {model.name} ranks in one way only; leave it out, or ask a language model",
            kind="unsupported",
            column="strategy",
        )


def _with(request: RankRequest, found: Answered, items: Mapping[str, Item] | None) -> RankRequest:
    """Return a request with the items that were found as its candidates."""
    names = found.answer.items if isinstance(found.answer, Ranking) else ()
    return replace(request, candidates=tuple((items or {})[name] for name in names), retrieved=len(names))


def _answered(
    answer: Ranking | Unparsed, request: RankRequest, items: Mapping[str, Item], strange: Sequence[str] = ()
) -> Answered:
    """Return what became of a request; ``strange`` are items of its history that the model has not learned from."""
    ignored = (f"history: ignored, since the model has not learned from it: {some(strange)}",) if strange else ()
    given = {item.item_id: item for item in request.candidates}
    titles = () if isinstance(answer, Unparsed) else ((given.get(name) or items[name]).title for name in answer.items)
    return Answered(
        answer=answer,
        titles=tuple(titles),
        notes=(*request.notes, *ignored),
        retrieved=request.retrieved,
        unknown_user=request.unknown_user,
        unknown_items=tuple(dict.fromkeys((*request.unknown_items, *strange))),
    )


def _titled(found: Answered) -> list[tuple[str, str]]:
    return list(zip(found.answer.items, found.titles, strict=True)) if isinstance(found.answer, Ranking) else []


def _unread(answer: Answer, request: RankRequest) -> Unparsed:
    reason = answer.reason if isinstance(answer, Unparsed) else f"there is no ranking but a {type(answer).__name__}"
    return Unparsed(request_id=request.id, reason=reason)


def _signed(**known: object) -> str:
    return digest_of(**known)
