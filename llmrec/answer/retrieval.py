"""Candidates for requests that bring none: the best of a classic recommender over a run's own data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llmrec.answer.naming import Naming
from llmrec.answer.questions import NOBODY
from llmrec.baselines.fits import fitted
from llmrec.baselines.retrieve import best, shuffled
from llmrec.data.requests import RankRequest
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError
from llmrec.pipeline.bundle import Bundle
from llmrec.pipeline.fusion.carried import carried
from llmrec.pipeline.study import load_tables
from llmrec.recipe.load import load_stored
from llmrec.report.results import content_of
from llmrec.types import CatalogueScorer, Item, Request

log = logging.getLogger(__name__)

# What retrieves where nothing in the history is known: it needs no history.
_FALLBACK = "popularity"
_NAMED = 3


def training_data(bundle: Bundle, option: str = "--retrieve") -> SplitDataset:
    """Return a run's data as its training saw it, or the interactions that an exported folder carries.

    A warning says so where the data have changed since the run was measured.

    Args:
        bundle: The model.
        option: What learns from them, for messages.

    Raises:
        DataError: If the model is no run, or its data cannot be read.
    """
    if bundle.run is None:
        if (found := carried(Path(bundle.folder), seed=bundle.seed)) is not None:
            return found
        raise DataError(
            f"{option} learns from the interactions of a run, and {bundle.folder} carries none; name the run folder "
            "with --model, or export it with --with-interactions",
            kind="unsupported",
            at=bundle.folder,
            column=option,
        )
    recipe = load_stored(bundle.run)
    try:
        data = load_tables(recipe)[0]
    except DataError as error:
        raise DataError(
            f"{error}. This is the data of the run {bundle.run}, which {option} learns from",
            kind=error.kind,
            at=error.place,
            column=error.column,
        ) from None
    _warn_of_change(bundle.run, data)
    return data


def _warn_of_change(run: Path, data: SplitDataset) -> None:
    if not (run / "results.json").is_file():
        return
    measured = content_of(run).get("data", {}).get("main", {})
    if measured.get("split_fingerprint") not in (None, data.fingerprint):
        log.warning(
            "the data of %s have changed since it was measured (%s interactions then, %s now): its figures and "
            "the weights of its fusion are those of the former; run its recipe again, or add what is new with llmrec "
            "refresh",
            run,
            f"{measured['interactions']:,}",
            f"{data.dataset.interactions.height:,}",
        )


class Retriever:
    """Retrieves candidates from a request's history; it is fitted when the first request needs it.

    Args:
        name: A baseline that ranks; see `llmrec.baselines.retrieve.check_retriever`.
        data: What it learns from; held-out interactions stay out.
        items: The catalogue that requests name items of, whose texts go before those of the data.
        count: Candidates a request; fewer where the history leaves fewer.
        seed: Of the baseline, and of the order in which candidates stand.
    """

    def __init__(self, name: str, data: SplitDataset, items: Mapping[str, Item], *, count: int, seed: int) -> None:
        self.name, self.count = name, count
        self._data, self._items, self._seed = data, items, seed
        self._naming = Naming(data)
        self._models: dict[str, CatalogueScorer] = {}

    @property
    def identity(self) -> dict[str, object]:
        """Everything that decides what is retrieved from a history."""
        return {"retriever": self.name, "k": self.count, "data": self._data.fingerprint, "seed": self._seed}

    def fill(self, requests: Sequence[RankRequest]) -> list[RankRequest]:
        """Give candidates to the requests that have none, in order; one whose history holds every item stays empty.

        Seen items are left out, and the order is a shuffle by a hash of the request's id, so that it does not
        tell the retriever's.
        """
        known = {n: self._naming.known(request) for n, request in enumerate(requests) if not request.candidates}
        filled = list(requests)
        for cold, name in ((False, self.name), (True, _FALLBACK)):
            places = [n for n, (events, _) in known.items() if cold == (not events)]
            if not places:
                continue
            asked = [Request(id=requests[n].id, user_id=NOBODY, history=known[n][0]) for n in places]
            for n, found in zip(places, best(self._fitted(name), asked, self.count), strict=True):
                filled[n] = self._filled(requests[n], found, known[n][1], cold=cold)
        return filled

    def _filled(self, request: RankRequest, found: Sequence[str], strange: Sequence[str], *, cold: bool) -> RankRequest:
        order = shuffled(found, request.id, self._seed)
        notes = list(request.notes)
        if strange:
            notes.append(f"retrieval: left aside, unknown to the run's data: {_some(strange)}")
        if cold:
            notes.append("retrieval: no known item in the history, so the most popular items are the candidates")
        items = tuple(self._items.get(item) or self._data.dataset.items[item] for item in order)
        return replace(request, candidates=items, retrieved=len(items), notes=tuple(notes))

    def _fitted(self, name: str) -> CatalogueScorer:
        if name not in self._models:
            self._models[name] = fitted(name, {}, self._data, seed=self._seed)
        return self._models[name]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
