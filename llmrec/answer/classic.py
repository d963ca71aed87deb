"""Baselines fitted on the interactions of a run, which answer requests and retrieve candidates."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmrec.answer.known import digest_catalogue
from llmrec.answer.prompting import NO_USER
from llmrec.answer.recommender import RANK, AnnotatedAnswer, Kind, Question, Recommender, check_default_strategy
from llmrec.baselines.fits import fit_baseline
from llmrec.baselines.retrieve import shuffle_by_request, top_unseen_items
from llmrec.data.requests import RankRequest, format_few_names
from llmrec.data.split import SplitDataset
from llmrec.display import Displayed, Summary
from llmrec.ensembles.carried import read_training_data
from llmrec.errors import DataError
from llmrec.fingerprint import digest_of
from llmrec.guard import clean
from llmrec.pipeline.bundle import Bundle
from llmrec.pipeline.study import load_tables
from llmrec.recipe.load import load_stored_recipe
from llmrec.report.results import read_results_json
from llmrec.types import Answer, CatalogueScorer, Event, Item, Predictor, Ranking, Request, Unparsed

log = logging.getLogger(__name__)

MAX_RANKED_CANDIDATES = 200
"""Maximum number of candidates that a language model ranks in one request."""
NOTHING_LEFT = "no item of the catalogue is left to rank"
# Minimum number of candidates in two-step retrieval.
_MIN_RETRIEVED = 50
# Retriever for requests whose history has no known item.
_FALLBACK_RETRIEVER = "popularity"


class ItemIdMapper:
    """Maps the items named in requests to item ids of a data set, and back.

    An item is found by its id, or by its title if that is unique.

    Args:
        data: The data set with the ids of the baselines.
    """

    def __init__(self, data: SplitDataset) -> None:
        self._items = data.dataset.items

    def known(self, request: RankRequest) -> tuple[tuple[Event, ...], list[str]]:
        """Return the history interactions with known items, and the ids of the unknown items."""
        events: list[Event] = []
        unknown: dict[str, None] = {}
        for past in request.history:
            item = self._find_item_id(past.item, request)
            if item is None:
                unknown.setdefault(past.item.item_id)
            else:
                events.append(Event(item_id=item, rating=past.rating, timestamp=past.timestamp))
        return tuple(events), list(unknown)

    def request(self, request: RankRequest) -> Request:
        """Convert a request to item ids of the data set; unknown candidates get a prefix."""
        return Request(
            id=request.id,
            user_id=NO_USER if request.user_id is None else request.user_id,
            history=self.known(request)[0],
            candidates=tuple(self._names(request)),
        )

    def has(self, item: Item) -> bool:
        """Whether the data set has an item, by id or title."""
        return item.item_id in self._items or self._by_title.get(item.title) is not None

    def renamed(self, ranking: Ranking, request: RankRequest) -> Ranking:
        """Return a ranking with the item ids of a converted request."""
        names = dict(zip((item.item_id for item in request.candidates), self._names(request), strict=True))
        return replace(ranking, items=tuple(names[item] for item in ranking.items))

    def back(self, ranking: Ranking, request: RankRequest) -> Ranking:
        """Return a ranking with the ids of the request."""
        ids = dict(zip(self._names(request), (item.item_id for item in request.candidates), strict=True))
        return replace(ranking, request_id=request.id, items=tuple(ids[item] for item in ranking.items))

    def _names(self, request: RankRequest) -> Sequence[str]:
        ids = [self._find_item_id(item, request) for item in request.candidates]
        # If two titles map to the same item, neither is mapped.
        times = Counter(ids)
        return [
            name if name is not None and times[name] == 1 else f"\0{item.item_id}"
            for name, item in zip(ids, request.candidates, strict=True)
        ]

    def _find_item_id(self, item: Item, request: RankRequest) -> str | None:
        if item.item_id not in request.titled and item.item_id in self._items:
            return item.item_id
        return self._by_title.get(item.title)

    @cached_property
    def _by_title(self) -> Mapping[str, str | None]:
        ids: dict[str, str | None] = {}
        for item_id, item in self._items.items():
            title = clean(item.title)
            ids[title] = None if title in ids else item_id
        return ids


def training_data(bundle: Bundle, option: str = "--retrieve") -> SplitDataset:
    """Return the training data of a run, or the interactions stored in an exported folder.

    Warns if the data have changed since the run was evaluated.

    Args:
        bundle: The model.
        option: The option that needs the data, for messages.
    """
    if bundle.run is None:
        if (result := read_training_data(Path(bundle.folder), seed=bundle.seed)) is not None:
            return result
        raise DataError(
            f"{option} needs the interactions of a run, but {bundle.folder} has no interactions; give the run folder "
            "with --model, or export the run with --with-interactions",
            kind="unsupported",
            at=bundle.folder,
            column=option,
        )
    recipe = load_stored_recipe(bundle.run)
    try:
        data = load_tables(recipe)[0]
    except DataError as error:
        raise error.reworded(f"{error}. {option} needs this data of the run {bundle.run}") from None
    _warn_of_changed_data(bundle.run, data)
    return data


def _warn_of_changed_data(run: Path, data: SplitDataset) -> None:
    if not (run / "results.json").is_file():
        return
    measured = read_results_json(run).get("data", {}).get("main", {})
    if measured.get("split_fingerprint") not in (None, data.fingerprint):
        log.warning(
            "the data of %s have changed since its evaluation (%s interactions then, %s now), so its results and "
            "ensemble weights are outdated; run its recipe again, or add the new data with llmrec refresh",
            run,
            f"{measured['interactions']:,}",
            f"{data.dataset.interactions.height:,}",
        )


@dataclass(repr=False)
class FittedBaseline(Displayed):
    """A baseline fitted on the training interactions of a run.

    Attributes:
        name: Its name in questions.
        model: The baseline.
        data: Its training data.
        items: The catalogue, which may be changed in place.
        family: The task about one item that it answers; None: it ranks.
        fingerprint: The fingerprint of the baseline with its parameters.
    """

    name: str
    model: Predictor
    data: SplitDataset
    items: Mapping[str, Item]
    family: str | None
    fingerprint: object
    kind: Kind = "classic"
    strategies: tuple[str, ...] = ()
    _naming: ItemIdMapper = field(init=False)

    def __post_init__(self) -> None:
        self._naming = ItemIdMapper(self.data)

    def _summary(self) -> Summary:
        return Summary(f"{self.name} on {self.data.dataset.name}")

    @property
    def verbs(self) -> tuple[str, ...]:
        """See `Recommender`."""
        return (RANK,) if self.family is None else (self.family,)

    @property
    def signature(self) -> str:
        """See `Recommender`."""
        return digest_of(model=self.fingerprint, data=self.data.fingerprint, items=digest_catalogue(self.items))

    def answer(
        self, requests: Sequence[RankRequest], question: Question, listener: Callable[[str], None] | None = None
    ) -> list[AnnotatedAnswer]:
        """See `Recommender`."""
        translated = [self._naming.request(request) for request in requests]
        if question.verb != RANK:
            pairs = [
                replace(item, candidates=None, item=item.candidates[0] if item.candidates else None)
                for item in translated
            ]
            return [AnnotatedAnswer(answer=answer) for answer in self.model.answer(pairs)]
        check_default_strategy(self, question)
        answers: dict[int, Ranking | Unparsed] = {}
        indices = [n for n, request in enumerate(requests) if request.candidates]
        for n, answer in zip(indices, self.model.answer([translated[n] for n in indices]), strict=True):
            answers[n] = (
                self._naming.back(answer, requests[n])
                if isinstance(answer, Ranking)
                else _unparsed_answer(answer, requests[n])
            )
        rest = [n for n in range(len(requests)) if n not in answers]
        if rest:
            assert isinstance(self.model, CatalogueScorer)
            unranked = [replace(translated[n], candidates=None) for n in rest]
            originals = [requests[n] for n in rest]
            scores = np.asarray(self.model.scores(unranked), dtype=np.float64)
            mask = recommendable_mask(originals, unranked, self._columns, self.items)
            answers.update(
                zip(rest, rank_top_items(originals, self.model.items, scores, mask, question.depth), strict=True)
            )
        return [
            annotate_answer(answers[n], request, self.items, self._naming.known(request)[1])
            for n, request in enumerate(requests)
        ]

    @cached_property
    def _columns(self) -> Mapping[str, int]:
        assert isinstance(self.model, CatalogueScorer)
        return {name: column for column, name in enumerate(self.model.items)}


def recommendable_mask(
    requests: Sequence[RankRequest],
    translated: Sequence[Request],
    columns: Mapping[str, int],
    items: Container[str],
) -> NDArray[np.bool_]:
    """Return a mask of the items that can be recommended for requests, shape (n, columns).

    Args:
        requests: The requests.
        translated: The same with the ids of the data.
        columns: The column of each item, in the order of the columns.
        items: The catalogue.
    """
    # The catalogue may change between two calls.
    inside = np.fromiter((name in items for name in columns), dtype=bool, count=len(columns))
    mask = np.tile(inside, (len(requests), 1))
    for row, request, same in zip(mask, requests, translated, strict=True):
        seen = () if request.keep_seen else (event.item_id for event in same.history)
        row[[columns[name] for name in (*request.barred, *seen) if name in columns]] = False
    return mask


def rank_top_items(
    requests: Sequence[RankRequest],
    names: Sequence[str],
    scores: NDArray[np.float64],
    mask: NDArray[np.bool_],
    depth: int,
) -> list[Ranking]:
    """Return the ``depth`` highest-scoring `recommendable_mask` items for each request.

    Equal scores are in the order of the columns.

    Args:
        requests: The requests.
        names: The items of the columns.
        scores: Finite scores, shape (n, columns).
        mask: The `recommendable_mask` items, shape (n, columns).
        depth: The maximum length of a list.
    """
    rankings = []
    for request, row in zip(requests, np.where(mask, scores, -np.inf), strict=True):
        length = min(depth, int(np.isfinite(row).sum()))
        # Only items that can be in the list are sorted: all that are not below the last one.
        border = np.partition(row, len(row) - length)[len(row) - length] if length else np.inf
        top = np.flatnonzero(row >= border)
        order = top[np.argsort(-row[top], kind="stable")[:length]]
        items = tuple(names[column] for column in order.tolist())
        rankings.append(Ranking(request_id=request.id, items=items, scores=tuple(row[order].tolist())))
    return rankings


class Retriever:
    """Retrieves candidates from the history of a request, with a recommender that is fitted on first use.

    Args:
        name: A baseline that ranks; see `llmrec.baselines.retrieve.check_retriever`.
        data: Its training data; held-out interactions are excluded.
        items: The catalogue of the requests, whose texts take precedence over those of the data.
        count: Candidates per request; fewer if fewer items are unseen.
        seed: The seed of the baseline and of the order of the candidates.
    """

    def __init__(self, name: str, data: SplitDataset, items: Mapping[str, Item], *, count: int, seed: int) -> None:
        self.name, self.count = name, count
        self._data, self._items, self._seed = data, items, seed
        self._naming = ItemIdMapper(data)
        self._models: dict[str, CatalogueScorer] = {}

    @property
    def identity(self) -> dict[str, object]:
        """All inputs that determine the retrieved candidates."""
        return {"retriever": self.name, "k": self.count, "data": self._data.fingerprint, "seed": self._seed}

    def fill(self, requests: Sequence[RankRequest]) -> list[RankRequest]:
        """Add candidates to requests that have none, in order, unless the history contains all items.

        Seen items are excluded. The candidates are shuffled by a hash of the request's id, so that their order does not
        reveal the retriever's.
        """
        known = {n: self._naming.known(request) for n, request in enumerate(requests) if not request.candidates}
        filled = list(requests)
        for cold, name in ((False, self.name), (True, _FALLBACK_RETRIEVER)):
            rows = [n for n, (events, _) in known.items() if cold == (not events)]
            if not rows:
                continue
            histories = [Request(id=requests[n].id, user_id=NO_USER, history=known[n][0]) for n in rows]
            for n, retrieved in zip(rows, top_unseen_items(self._fitted(name), histories, self.count), strict=True):
                filled[n] = self._filled(requests[n], retrieved, known[n][1], cold=cold)
        return filled

    def _filled(
        self, request: RankRequest, retrieved: Sequence[str], unknown: Sequence[str], *, cold: bool
    ) -> RankRequest:
        order = shuffle_by_request(retrieved, request.id, self._seed)
        notes = list(request.notes)
        if unknown:
            notes.append(f"retrieval: ignored items missing in the run's data: {format_few_names(unknown)}")
        if cold:
            notes.append("retrieval: no known item in the history, so the most popular items are the candidates")
        items = tuple(self._items.get(item) or self._data.dataset.items[item] for item in order)
        return replace(request, candidates=items, retrieved=len(items), notes=tuple(notes))

    def _fitted(self, name: str) -> CatalogueScorer:
        if name not in self._models:
            self._models[name] = fit_baseline(name, {}, self._data, seed=self._seed)
        return self._models[name]


def fill_candidates(
    requests: Sequence[RankRequest], finder: Recommender, depth: int, items: Mapping[str, Item] | None
) -> list[RankRequest]:
    """Return requests with candidates retrieved by another model, for reranking.

    Args:
        requests: Requests without candidates.
        finder: The model that retrieves the candidates.
        depth: The number of items to return after reranking.
        items: The catalogue.
    """
    question = Question(depth=min(MAX_RANKED_CANDIDATES, max(depth, _MIN_RETRIEVED)))
    filled = []
    for request, result in zip(requests, finder.answer(requests, question), strict=True):
        names = result.answer.items if isinstance(result.answer, Ranking) else ()
        candidates = tuple((items or {})[name] for name in names)
        filled.append(replace(request, candidates=candidates, retrieved=len(names)))
    return filled


def annotate_answer(
    answer: Ranking | Unparsed, request: RankRequest, items: Mapping[str, Item], unknown: Sequence[str] = ()
) -> AnnotatedAnswer:
    """Return the answer to a request, with notes on ``unknown`` items of its history."""
    ignored = (f"history: ignored items missing in the training data: {format_few_names(unknown)}",) if unknown else ()
    pool = {item.item_id: item for item in request.candidates}
    titles = () if isinstance(answer, Unparsed) else ((pool.get(name) or items[name]).title for name in answer.items)
    return AnnotatedAnswer(
        answer=answer,
        titles=tuple(titles),
        notes=(*request.notes, *ignored),
        retrieved=request.retrieved,
        unknown_user=request.unknown_user,
        unknown_items=tuple(dict.fromkeys((*request.unknown_items, *unknown))),
    )


def _unparsed_answer(answer: Answer, request: RankRequest) -> Unparsed:
    reason = answer.reason if isinstance(answer, Unparsed) else f"expected a ranking, got {type(answer).__name__}"
    return Unparsed(request_id=request.id, reason=reason)
