"""From requests to answers: one object that is opened once and asked as often as there are requests.

`llmrec rank`, Python and a server use it alike: given candidates, a whole catalogue, retrieved candidates, rationales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from llmrec.answer.about import about_families, way_about
from llmrec.answer.catalogue import CatalogueRanking
from llmrec.answer.checks import bundle_of, check_choices, engine_section, strategy_of, window_of
from llmrec.answer.fused import Fuser, fusion_of
from llmrec.answer.known import Known, Profile, known_from, profiles_of, read_known
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.rationales import TOKENS, Reasoner, Reasons, rationale_template
from llmrec.answer.requests import catalogue_of, notes_of, rank_requests
from llmrec.answer.retrieval import Retriever, training_data
from llmrec.answer.strategy import TWO_STEP, Asking, choose_way, ranking_families_of
from llmrec.backends.cache import AnswerStore, CachedBackend
from llmrec.backends.encode import Encoder
from llmrec.backends.vllm.backend import prepare_environment
from llmrec.baselines.retrieve import check_retriever
from llmrec.data.assemble import digest_items, read_items
from llmrec.data.dataset import Dataset
from llmrec.data.read.limits import shortened
from llmrec.data.requests import LEFT_ASIDE, RankRequest, identity, unknown_id
from llmrec.errors import DataError, LlmrecError, ModelError, RecipeError
from llmrec.models.load import load_tokenizer, quiet_libraries, weights_stamp
from llmrec.pipeline.bundle import Bundle, refuse_changed
from llmrec.pipeline.engines import Engines, refuse_paired
from llmrec.pipeline.resume import Budget
from llmrec.tasks.family import family_of
from llmrec.types import Item, Ranking, Unparsed

# hf scores requests one by one, so that handing it few at a time costs nothing and keeps a progress bar moving.
_FEW = 4
# Strategies that generate or search, which hf does for many prompts at once.
_TOGETHER = ("list", TWO_STEP, "search")


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What became of one request.

    Attributes:
        answer: The ranking, cut to ``top``, or why there is none.
        titles: One a ranked item, as the model read it.
        notes: What was left out or changed on the way.
        retrieved: How many of the candidates were retrieved: all of them or none.
        profile: What two-step wrote of the user; None if it wrote nothing.
        reasons: Sentences on the first items, with their own cost.
        unknown_user: The request names a user of whom nothing is stored, and brings no history.
        unknown_items: Ids of its history that no part of the list goes by, since nothing is known of them.
        cold: Nothing is known of the user, and the list is that of the most popular items.
    """

    answer: Ranking | Unparsed
    titles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    retrieved: int = 0
    profile: str | None = None
    reasons: Reasons = field(default_factory=Reasons)
    unknown_user: bool = False
    unknown_items: tuple[str, ...] = ()
    cold: bool = False


@dataclass
class Recommender:
    """Ranks for requests, with one model in one way; use it as a context manager, or close it.

    It may be asked from several threads, which then wait for each other: an engine serves one call at a time.

    Attributes:
        options: What was asked for.
        bundle: The model and how it was asked in training.
        way: How requests are put.
        items: What requests may name by id; None: nothing.
        known: Gives what is stored of users, which is looked up when a request first names one.
        encoder: The model's tokenizer and its longest prompt.
        engines: Where the backend comes from.
        weights: A digest of the model's weights; empty where a server has its own.
        store: Where answers are remembered; None: nowhere.
        budget: Where seconds are booked, by stage.
        whole: Ranks the whole catalogue, where that is asked.
        fuser: Joins the model with the baselines of its run, where that is asked.
        retriever: Finds candidates for requests without, where that is asked.
        reasoner: Writes rationales, where they are asked for.
    """

    options: RecommenderOptions
    bundle: Bundle
    way: Asking
    items: Mapping[str, Item] | None
    known: Callable[[], Known]
    encoder: Encoder
    engines: Engines
    weights: str
    store: AnswerStore | None
    budget: Budget
    whole: CatalogueRanking | None
    fuser: Fuser | None
    retriever: Retriever | None
    reasoner: Reasoner | None
    _lock: Lock = field(default_factory=Lock)
    _closed: bool = False
    _shares: bool = False

    @classmethod
    def open(
        cls,
        options: RecommenderOptions,
        *,
        store: Path | None = None,
        budget: Budget | None = None,
        bundle: Bundle | None = None,
        ranks: bool = True,
    ) -> Recommender:
        """Open a model with what it is asked about; weights are loaded when the first question is asked.

        Args:
            options: What is asked for.
            store: A database of answers, which is made where it is not there: what it holds is not asked again. By
                default nothing is remembered.
            budget: Where seconds are booked, by stage.
            bundle: The model, where it is not the one that ``options.model`` names.
            ranks: It must rank; a model that was tuned on questions about single items alone can be opened without.

        Raises:
            LlmrecError: If an option, a file or the model cannot be used.
        """
        check_choices(options)
        if options.retrieve is not None:
            check_retriever(options.retrieve, "--retrieve")
        prepare_environment()
        quiet_libraries()
        budget = budget or Budget()
        bundle = bundle or bundle_of(options)
        if not bundle.weights:
            raise ModelError(
                f"{bundle.called} asked no language model (eval.arms is empty), so there is none to ask; its classic "
                f"recommenders answer `llmrec rank --model {bundle.called}`, `llmrec.load` and `llmrec serve`",
                kind="unsupported",
                at=bundle.called,
            )
        items, data, retriever = _items(options, bundle)
        known = cache(lambda: known_from(bundle, items or {}, data))
        encoder = Encoder(load_tokenizer(bundle.folder, bundle.model), max_length=window_of(options, bundle))
        section = engine_section(options)
        refuse_paired(bundle.folder, bundle.model, section)
        answers = None if store is None else AnswerStore(store)
        engines = Engines(bundle.model, section, encoder, bundle.seed, budget, answers)
        # A server answers with weights of its own; the folder gives the tokenizer alone.
        weights = "" if options.backend == "openai" else weights_stamp(bundle.folder)
        if weights:
            refuse_changed(bundle, weights)
        only = not ranks and not ranking_families_of(bundle)
        way = way_about(bundle, next(iter(about_families(bundle)), "rating")) if only else None
        return cls._made(options, bundle, items, known, retriever, encoder, engines, weights, answers, budget, way)

    def beside(self, **changes: Any) -> Recommender:
        """Return another recommender of the same model and engine, which is asked in another way.

        Closing it does not close the engine, which is this one's.

        Args:
            changes: Options by name; none that decides which model, items or engine there are.

        Raises:
            LlmrecError: If the changed options do not go together, or the model cannot be asked so.
        """
        options = replace(self.options, **changes)
        check_choices(options)
        own = self.bundle, self.items, self.known
        made = self._made(options, *own, None, self.encoder, self.engines, self.weights, None, self.budget)
        made._lock, made._shares = self._lock, True
        return made

    @classmethod
    def _made(
        cls,
        options: RecommenderOptions,
        bundle: Bundle,
        items: Mapping[str, Item] | None,
        known: Callable[[], Known],
        retriever: Retriever | None,
        encoder: Encoder,
        engines: Engines,
        weights: str,
        store: AnswerStore | None,
        budget: Budget,
        way: Asking | None = None,
    ) -> Recommender:
        way = way or choose_way(
            bundle,
            task=options.task,
            template=options.template,
            strategy=strategy_of(options),
            settings=options.settings,
        )
        fused = None if options.fuse == "none" else fusion_of(bundle, way, options.fuse)
        reasoner = whole = None
        if options.rationale:
            first = options.rationale if options.top is None else min(options.rationale, options.top)
            reasoner = Reasoner(bundle, way, rationale_template(), encoder, first=first, batch=options.batch)
        if options.whole and items:
            whole = CatalogueRanking(
                bundle, items, way, encoder, beams=max(options.beams, options.top or 1), exact=options.exact
            )
        return cls(
            options=options,
            bundle=bundle,
            way=way,
            items=items,
            known=known,
            encoder=encoder,
            engines=engines,
            weights=weights,
            store=store,
            budget=budget,
            whole=whole,
            fuser=None if fused is None else Fuser(fused, training_data(bundle, "--fuse")),
            retriever=retriever,
            reasoner=reasoner,
        )

    @property
    def engine(self) -> str:
        """The engine that answers: another one once it has failed, where that is left to llmrec."""
        return self.engines.engine_for(self.way.strategy, self.bundle.folder)

    @property
    def identity(self) -> dict[str, object]:
        """Everything besides the requests that can change an answer, by name."""
        bundle, way, reasoner, options = self.bundle, self.way, self.reasoner, self.options
        return {
            "asked": self.engines.identity(self.engine, self.weights),
            "window": self.encoder.max_length,
            "section": bundle.tasks.present()[way.family].model_dump(),
            "template": bundle.templates[way.family][way.template].sha,
            "way": (way.family, way.template, way.strategy, way.options),
            "index": bundle.index.digest if bundle.index else None,
            "noun": bundle.noun,
            "seed": bundle.seed,
            "items": None if self.items is None else digest_items(self.items),
            "top": options.top,
            "batch": options.batch,
            "whole": (options.beams, options.exact) if options.whole else None,
            "fused": self.fuser.identity if self.fuser else None,
            "retrieved": self.retriever.identity if self.retriever else None,
            "rationale": (reasoner.template.sha, reasoner.first, TOKENS) if reasoner else None,
        }

    @cached_property
    def profiles(self) -> Callable[[str], Profile] | None:
        """What says what prompts show of a user of the run's data; None where they show nothing."""
        run = self.bundle.run
        return None if run is None else profiles_of(str(run), lambda: self.known().users)

    @property
    def stored(self) -> str:
        """A hash over what is known of users, which requests may go by; empty where it cannot be read."""
        try:
            return self.known().digest
        except DataError:
            return ""

    @property
    def ways(self) -> tuple[str, ...]:
        """The strategies that the model can be asked to order candidates by."""
        here = [family_of(family).strategies for family in ranking_families_of(self.bundle)]
        return tuple(dict.fromkeys(name for names in here for name in names if name != "search"))

    @property
    def searches(self) -> bool:
        """Whether the model can search the whole catalogue."""
        if self.options.backend == "openai":
            return False
        try:
            choose_way(self.bundle, strategy="search")
        except RecipeError:
            return False
        return True

    @contextmanager
    def asked(self, strategy: str) -> Iterator[CachedBackend]:
        """Hand out the engine that a strategy asks, to nobody else meanwhile.

        Raises:
            LlmrecError: If the recommender is closed, or the engine does not start.
        """
        with self._lock:
            if self._closed:
                raise LlmrecError("this recommender is closed; open another", kind="closed")
            yield self.engines.get(
                self.engines.engine_for(strategy, self.bundle.folder), self.bundle.folder, self.weights
            )

    def read(self, record: Mapping[str, object], row: int = 1) -> RankRequest | Unparsed:
        """Read one request, as docs/rank.md describes it; what is wrong with it is a failure of its own.

        What it does not bring of a user of the run's data is taken from there.

        Args:
            record: Its keys are `llmrec.data.requests.KEYS`.
            row: Counted from 1; stands in for a missing id.
        """
        try:
            if fault := self.untitled(record):
                raise DataError(f"the request {fault}", kind="unknown-name", column="item_id")
            return read_known(
                record,
                row,
                lambda: self.known().histories,
                self.items,
                self.profiles,
                whole=self.whole is not None,
                retrieves=self.retriever is not None,
            )
        except DataError as error:
            return Unparsed(request_id=identity(record, row)[0] or str(row), reason=str(error))

    def untitled(self, record: Mapping[str, object]) -> str:
        """Return what is wrong with a request that names an item by id where no item is known; empty: nothing is.

        Without its titles a model would rank what it was never tuned on.
        """
        name = unknown_id(record) if self.items == {} else None
        if name is None:
            return ""
        return (
            f"names the item {shortened(name, 60)!r}, and {self.options.model} carries no table of items that says "
            'what it is; name one with --items, or give each item its title: {"item_id": ..., "title": ...}'
        )

    def answer(
        self,
        requests: Sequence[RankRequest | Unparsed],
        *,
        advance: Callable[[int], None] = lambda done: None,
        part: int | None = None,
    ) -> list[Answered]:
        """Answer every request, in order; one that cannot be answered does not touch the others.

        Args:
            requests: From `read`; what could not be read comes back as it is.
            advance: Called with the number of requests just answered.
            part: Of a job: its answers do not depend on other parts.

        Raises:
            LlmrecError: If the engine does not start or breaks down, or the recommender is closed.
        """
        with self._lock:
            if self._closed:
                raise LlmrecError("this recommender is closed; open another", kind="closed")
            asked = [self._fitting(request) for request in self._retrieved(requests)]
            able = [request for request in asked if isinstance(request, RankRequest)]
            advance(len(asked) - len(able))
            if self.fuser is not None and not self.fuser.asks_model and self.reasoner is None:
                ranked = self.fuser.join(able, None)
                advance(len(able))
                found = iter([(each, Reasons()) for each in ranked])
            else:
                found = iter(self._with_model(able, advance, part))
        return [
            Answered(answer=each) if isinstance(each, Unparsed) else self._answered(each, *next(found))
            for each in asked
        ]

    def _with_model(
        self, requests: Sequence[RankRequest], advance: Callable[[int], None], part: int | None
    ) -> list[tuple[Ranking | Unparsed, Reasons]]:
        backend = self.engines.get(self.engine, self.bundle.folder, self.weights)
        backend.part = part
        # What a killed run had asked already costs what it cost then.
        before = backend.recalled_seconds
        ranked = self._ranked(requests, backend, advance)
        self.budget.add("ranking", backend.recalled_seconds - before)
        if self.fuser is not None:
            with self.budget.stage("fusing"):
                ranked = self.fuser.join(requests, ranked)
        return list(zip(ranked, self._reasons(requests, ranked, backend), strict=True))

    def close(self) -> None:
        """Stop the engine and close the store."""
        with self._lock:
            self._closed = True
            if not self._shares:
                self.engines.close()
            if self.store is not None:
                self.store.close()

    def __enter__(self) -> Recommender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _retrieved(self, requests: Sequence[RankRequest | Unparsed]) -> Sequence[RankRequest | Unparsed]:
        """Retrieve candidates for the requests that bring none."""
        if self.retriever is None:
            return requests
        with self.budget.stage("retrieving"):
            filled = iter(self.retriever.fill([each for each in requests if isinstance(each, RankRequest)]))
        return [next(filled) if isinstance(each, RankRequest) else each for each in requests]

    def _fitting(self, request: RankRequest | Unparsed) -> RankRequest | Unparsed:
        """Return a request as it can be ranked here, or why it cannot."""
        if isinstance(request, Unparsed):
            return request
        if self.whole is not None and request.candidates:
            return replace(request, candidates=(), notes=(*request.notes, LEFT_ASIDE))
        if self.whole is not None or request.candidates:
            return request
        reason = "there are no 'candidates'; give a list of items to rank"
        if self.retriever is not None:
            reason = "the history holds every item of the run's data, so that none is left to retrieve"
        return Unparsed(request_id=request.id, reason=reason)

    def _ranked(
        self, requests: Sequence[RankRequest], backend: CachedBackend, advance: Callable[[int], None]
    ) -> list[Ranking | Unparsed]:
        one_by_one = self.engine == "hf" and self.way.strategy not in _TOGETHER
        batch = min(_FEW, self.options.batch) if one_by_one else self.options.batch
        if self.whole is not None:
            return self.whole.rank(requests, backend, batch=batch, advance=advance)
        return rank_requests(
            self.bundle, requests, way=self.way, backend=backend, encoder=self.encoder, batch=batch, advance=advance
        )

    def _reasons(
        self, requests: Sequence[RankRequest], ranked: Sequence[Ranking | Unparsed], backend: CachedBackend
    ) -> list[Reasons]:
        if self.reasoner is None:
            return [Reasons() for _ in requests]
        before = backend.recalled_seconds
        with self.budget.stage("rationales"):
            reasons = self.reasoner.write(requests, ranked, self.items if self.whole is not None else None, backend)
        self.budget.add("rationales", backend.recalled_seconds - before)
        return reasons

    def _answered(self, request: RankRequest, answer: Ranking | Unparsed, reasons: Reasons) -> Answered:
        notes = (*request.notes, *notes_of(self.way, request, answer), *reasons.notes)
        found = Answered(
            answer=answer,
            notes=notes,
            retrieved=request.retrieved,
            unknown_user=request.unknown_user,
            unknown_items=request.unknown_items,
        )
        if isinstance(answer, Unparsed):
            return found
        top = self.options.top
        items = answer.items[:top]
        whole = self.items if self.whole is not None else None
        known = whole or {item.item_id: item for item in request.candidates}
        return replace(
            found,
            answer=replace(answer, items=items, scores=answer.scores[:top]),
            titles=tuple(known[item].title for item in items),
            profile=(answer.raw or None) if self.way.strategy == TWO_STEP else None,
            reasons=reasons,
        )


def _items(
    options: RecommenderOptions, bundle: Bundle
) -> tuple[Mapping[str, Item] | None, Dataset | None, Retriever | None]:
    """Return what requests may name by id, the data of a run, and what retrieves among its items.

    Raises:
        DataError: If a catalogue is needed and none is known.
    """
    if options.retrieve is not None:
        # The run's data is read once: what it learns from and what it calls its items.
        data = training_data(bundle)
        items = data.dataset.items if options.items is None else read_items(options.items)
        retriever = Retriever(options.retrieve, data, items, count=options.k, seed=bundle.seed)
        return items, None if bundle.run is None else data.dataset, retriever
    known, dataset = catalogue_of(bundle, options.items)
    if options.whole and not known:
        raise DataError(
            "--candidates all ranks a catalogue, and none is known; name a table of items with --items",
            kind="missing-key",
            column="--items",
        )
    return known, dataset, None
