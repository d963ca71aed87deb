"""A language model that answers requests with one engine, which stays open.

It ranks given candidates, retrieved ones or a whole catalogue, alone or in an ensemble with the baselines of its run,
explains its rankings, and answers questions about one item. `llmrec rank` uses the method `rank`, which follows the
options; Python and a service use `answer`, which takes a `Question`. Both return identical lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from llmrec.answer.checks import (
    check_recommender_options,
    context_length,
    engine_section,
    on_gpu,
    read_bundle,
    requested_strategy,
)
from llmrec.answer.classic import MAX_RANKED_CANDIDATES, NOTHING_LEFT, Retriever, fill_candidates, training_data
from llmrec.answer.ensemble import Ensemble, find_stored_ensemble
from llmrec.answer.known import (
    KnownEntities,
    Profile,
    build_known_entities,
    digest_catalogue,
    parse_request_with_history,
    profile_lookup,
    read_catalogue,
)
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.prompting import (
    CatalogueRanking,
    answer_item_questions,
    first_prompt,
    item_question_prompt,
    rank_requests,
    ranking_notes,
)
from llmrec.answer.rationales import RATIONALE_TOKENS, Explainer
from llmrec.answer.recommender import RANK, AnnotatedAnswer, Closeable, Kind, Question, Reasons, Recommender
from llmrec.answer.strategy import (
    TWO_STEP,
    TaskStrategy,
    item_families,
    ranking_families_of,
    select_item_strategy,
    select_ranking_strategy,
)
from llmrec.backends.cache import AnswerStore, CachedBackend
from llmrec.backends.encode import Encoder
from llmrec.backends.vllm.adapters import Adapter
from llmrec.backends.vllm.backend import prepare_environment
from llmrec.baselines.retrieve import check_retriever
from llmrec.data.assemble import read_items
from llmrec.data.dataset import Dataset
from llmrec.data.requests import CANDIDATES_IGNORED, PastEvent, RankRequest, first_untitled_id, request_identity
from llmrec.display import shorten_text
from llmrec.errors import DataError, LlmrecError, ModelError, RecipeError
from llmrec.fingerprint import digest_of
from llmrec.guard import TEXT_LIMIT, clean
from llmrec.models.load import load_tokenizer, model_folder_hash, silence_libraries
from llmrec.pipeline.bundle import Bundle, check_unchanged
from llmrec.pipeline.engines import Engines, check_encoder_decoder_engine, check_engine_device, dtype_name
from llmrec.pipeline.resume import StageTimer
from llmrec.tasks.family import family_of
from llmrec.types import Answer, Item, Ranking, Unparsed

MAX_SEARCHED_ITEMS = 160
"""Maximum number of catalogue items that a language model returns; the time of a search grows with it."""
_MIN_BEAMS = 20
# hf scores requests one by one, so small batches cost nothing and update the progress bar often.
_SMALL_BATCH = 4
# Strategies that generate or search, for which hf batches prompts.
_BATCHED_STRATEGIES = ("list", TWO_STEP, "search")


@dataclass(frozen=True, kw_only=True)
class RankingSteps:
    """The steps of a ranking: prompts, scoring strategy, and what happens before and after.

    Attributes:
        options: The options of the model.
        asking: The family, template and strategy.
        search: The search of the whole catalogue, if requested.
        ensemble: The ensemble of the model with the baselines of its run, if requested.
        reasoner: The writer of rationales, if requested.
    """

    options: RecommenderOptions
    asking: TaskStrategy
    search: CatalogueRanking | None = None
    ensemble: Ensemble | None = None
    reasoner: Explainer | None = None


@dataclass
class LanguageModel(Closeable):
    """An open language model, fine-tuned or pretrained; use it as a context manager, or close it.

    It is thread-safe; calls are serialised, as an engine serves one call at a time.

    Attributes:
        options: The options of the model.
        bundle: The model and its training prompts.
        items: The items that requests may name by id, which may be changed in place; None: none.
        known: A function that returns the stored data of users, read at the first use.
        retriever: The retriever for requests without candidates, if requested.
        encoder: The model's tokenizer and its maximum prompt length.
        engines: The provider of backends.
        weights: A digest of the model's weights; empty with a server.
        store: The answer cache; None: none.
        budget: The recorder of seconds per stage.
        default: The ranking configuration of the options.
        name: Its name in questions.
        finder: The model that retrieves candidates if this one cannot search the catalogue; None: none.
    """

    options: RecommenderOptions
    bundle: Bundle
    items: Mapping[str, Item] | None
    known: Callable[[], KnownEntities]
    retriever: Retriever | None
    encoder: Encoder
    engines: Engines
    weights: str
    store: AnswerStore | None
    budget: StageTimer
    default: RankingSteps = field(init=False)
    name: str = ""
    finder: Recommender | None = None
    kind: Kind = "language model"
    _ways: dict[tuple[object, ...], RankingSteps] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)
    _closed: bool = False

    @classmethod
    def open(
        cls,
        options: RecommenderOptions,
        *,
        store: Path | None = None,
        budget: StageTimer | None = None,
        bundle: Bundle | None = None,
        ranks: bool = True,
        adapters: Sequence[Adapter] = (),
        peer: LanguageModel | None = None,
    ) -> LanguageModel:
        """Open a model with its catalogue and data; weights are loaded for the first request.

        Args:
            options: The options of the model.
            store: The database of the answer cache, created if missing; by default answers are not cached.
            budget: The recorder of seconds per stage.
            bundle: The model, if not the one that ``options.model`` names.
            ranks: Require a model that ranks; False admits one tuned only on questions about single items.
            adapters: The adapters of all models that share an engine on a GPU.
            peer: The model opened with these adapters, whose engine is shared where possible.

        Raises:
            LlmrecError: If an option, a file or the model cannot be used.
        """
        check_recommender_options(options)
        if options.retrieve is not None:
            check_retriever(options.retrieve, "--retrieve")
        prepare_environment()
        silence_libraries()
        budget = budget or StageTimer()
        bundle = bundle or read_bundle(options)
        if not bundle.weights:
            raise ModelError(
                f"{bundle.called} has no language model (eval.arms is empty); use its baselines with `llmrec rank "
                f"--model {bundle.called}`, `llmrec.load` or `llmrec serve`",
                kind="unsupported",
                at=bundle.called,
            )
        items, data, retriever = _read_items_and_retriever(options, bundle)
        encoder = Encoder(load_tokenizer(bundle.folder, bundle.model), max_length=context_length(options, bundle))
        section = engine_section(options)
        check_engine_device(bundle.model, section)
        check_encoder_decoder_engine(bundle.folder, bundle.model, section)
        answers = None if store is None else AnswerStore(store)
        # A server has its own weights; only the tokenizer comes from the folder.
        weights = "" if options.backend == "openai" else model_folder_hash(bundle.folder)
        if weights:
            check_unchanged(bundle, weights)
        model = cls(
            options=options,
            bundle=bundle,
            items=items,
            known=cache(lambda: build_known_entities(bundle, items or {}, data)),
            retriever=retriever,
            encoder=encoder,
            engines=Engines(
                bundle.model,
                section,
                encoder,
                bundle.seed,
                budget,
                answers,
                adapters=adapters,
                beside=None if peer is None else peer.engines,
            ),
            weights=weights,
            store=answers,
            budget=budget,
        )
        if peer is not None and model.engines.is_shared("vllm", weights):
            # An engine handles one call at a time.
            model._lock = peer._lock
        only = not ranks and not ranking_families_of(bundle)
        asking = select_item_strategy(bundle, next(iter(item_families(bundle)), "rating")) if only else None
        model.default = model._build_ranking_steps(options, asking)
        return model

    def close(self) -> None:
        """Stop the engine and close the store."""
        with self._lock:
            self._closed = True
            self.engines.close()
            if self.store is not None:
                self.store.close()

    # ------------------------------------------------------------------- identity

    @property
    def verbs(self) -> tuple[str, ...]:
        """See `Recommender`."""
        return (*((RANK,) if ranking_families_of(self.bundle) else ()), *item_families(self.bundle))

    @property
    def strategies(self) -> tuple[str, ...]:
        """See `Recommender`."""
        names = [family_of(family).strategies for family in ranking_families_of(self.bundle)]
        return tuple(dict.fromkeys(name for strategies in names for name in strategies if name != "search"))

    @property
    def on_gpu(self) -> bool:
        """Whether the engine runs on a GPU of this machine."""
        return on_gpu(self.options, self.bundle)

    @property
    def signature(self) -> str:
        """See `Recommender`."""
        finder = None if self.finder is None else self.finder.signature
        return digest_of(finder=finder, **self.identity)

    @property
    def identity(self) -> dict[str, object]:
        """All inputs that can change an answer, except the requests, by name."""
        bundle, way, options = self.bundle, self.default, self.options
        asking, reasoner = way.asking, way.reasoner
        return {
            "asked": self.engines.identity(self._engine(way), self.weights),
            "window": self.encoder.max_length,
            "section": bundle.tasks.present()[asking.family].model_dump(),
            "template": bundle.templates[asking.family][asking.template].sha,
            "way": (asking.family, asking.template, asking.strategy, asking.options),
            "index": bundle.index.digest if bundle.index else None,
            "noun": bundle.noun,
            "seed": bundle.seed,
            "items": None if self.items is None else digest_catalogue(self.items),
            "top": options.top,
            "batch": options.batch,
            "whole": (options.beams, options.exact) if options.ranks_catalogue else None,
            "fused": way.ensemble.identity if way.ensemble else None,
            "retrieved": self.retriever.identity if self.retriever else None,
            "rationale": (reasoner.template.sha, reasoner.first, RATIONALE_TOKENS) if reasoner else None,
        }

    @property
    def described(self) -> Mapping[str, object]:
        """The model and its prompts, for a summary."""
        way, options, engine = self.default.asking, self.options, self._engine(self.default)
        return {
            "model": options.model,
            "task": way.family,
            "template": way.template,
            "strategy": way.strategy,
            "options": way.options,
            "engine": engine,
            "server": options.server_model if engine == "openai" else None,
            "dtype": dtype_name(self.bundle.model),
            "window": self.encoder.max_length,
            "history": self.bundle.tasks.present()[way.family].history,
            "retriever": self.retriever.identity if self.retriever else None,
            "rationales": self.default.reasoner is not None,
        }

    @property
    def histories(self) -> str:
        """Hash of the stored user data that requests can use; empty if the data cannot be read."""
        try:
            return self.known().digest
        except DataError:
            return ""

    @cached_property
    def profiles(self) -> Callable[[str], Profile] | None:
        """Function that maps a user to the text or profile fields in prompts; None if prompts show neither."""
        run = self.bundle.run
        return None if run is None else profile_lookup(str(run), lambda: self.known().users)

    def changed(self) -> None:
        """Discard values derived from the catalogue after the catalogue has changed."""
        self._ways.clear()

    # ------------------------------------------------------------------- configured by options

    def read(self, record: Mapping[str, object], row: int = 1) -> RankRequest | Unparsed:
        """Parse a request in the format of docs/batch-inference-and-export.md, or return why it is invalid.

        Missing data of a user are taken from the run's data.

        Args:
            record: Its keys are `llmrec.data.requests.REQUEST_KEYS`.
            row: Its number, from 1; used as the id if that is missing.
        """
        try:
            if fault := self.untitled(record):
                raise DataError(f"the request {fault}", kind="unknown-name", column="item_id")
            return parse_request_with_history(
                record,
                row,
                lambda user: self.known().histories.of_user(user),
                self.items,
                self.profiles,
                whole=self.default.search is not None,
                retrieves=self.retriever is not None,
            )
        except DataError as error:
            return Unparsed(request_id=request_identity(record, row)[0] or str(row), reason=str(error))

    def untitled(self, record: Mapping[str, object]) -> str:
        """Return an error message if a request names items by id but there is no catalogue; otherwise an empty text.

        Without titles the prompts would differ from those of training.
        """
        name = first_untitled_id(record) if self.items == {} else None
        if name is None:
            return ""
        return (
            f"names the item {shorten_text(name, 60)!r}, but {self.options.model} has no item table; give a table with "
            '--items, or give each item a title: {"item_id": ..., "title": ...}'
        )

    def rank(
        self,
        requests: Sequence[RankRequest | Unparsed],
        *,
        advance: Callable[[int], None] = lambda done: None,
        part: int | None = None,
    ) -> list[AnnotatedAnswer]:
        """Answer all requests as the options say, in order; a failed request does not affect the others.

        Args:
            requests: From `read`; invalid requests are returned unchanged.
            advance: Called with the number of requests just answered.
            part: The number of the part of a job; answers are the same for any split into parts.

        Raises:
            LlmrecError: If the engine does not start or breaks down, or the model is closed.
        """
        return self._ranked(self.default, requests, advance, part)

    # ------------------------------------------------------------------- configured per call

    def answer(
        self,
        requests: Sequence[RankRequest],
        question: Question,
        listener: Callable[[str], None] | None = None,
    ) -> list[AnnotatedAnswer]:
        """See `Recommender`."""
        if question.verb != RANK:
            return [
                AnnotatedAnswer(answer=item)
                for item in self.about(requests, select_item_strategy(self.bundle, question.verb), listener)
            ]
        answers: dict[int, AnnotatedAnswer] = {}
        for n, request in enumerate(requests):
            if len(request.candidates) > MAX_RANKED_CANDIDATES:
                reason = (
                    f"{len(request.candidates)} candidates exceed the limit of {MAX_RANKED_CANDIDATES} for a language "
                    "model; preselect candidates with a baseline or an ensemble"
                )
                answers[n] = AnnotatedAnswer(answer=Unparsed(request_id=request.id, reason=reason), notes=request.notes)
        indices = [n for n, request in enumerate(requests) if request.candidates and n not in answers]
        if indices:
            strategy = self.options.strategy if question.strategy == "auto" else question.strategy
            way = self._way(candidates="file", strategy=strategy)
            answers.update(zip(indices, self._ranked(way, [requests[n] for n in indices]), strict=True))
        rest = [n for n in range(len(requests)) if n not in answers]
        if rest:
            answers.update(zip(rest, self._rank_catalogue([requests[n] for n in rest], question), strict=True))
        return [answers[n] for n in range(len(requests))]

    def about(
        self, requests: Sequence[RankRequest], way: TaskStrategy, listener: Callable[[str], None] | None = None
    ) -> list[Answer]:
        """Answer a question about the single candidate of each request; ``listener`` streams generated text."""
        with self.backend(way.strategy) as backend:
            if listener is None:
                return answer_item_questions(self.bundle, requests, way=way, backend=backend, encoder=self.encoder)
            with backend.streaming(_cleaning_listener(listener)):
                return answer_item_questions(self.bundle, requests, way=way, backend=backend, encoder=self.encoder)

    def reasons(
        self, requests: Sequence[RankRequest], lists: Sequence[AnnotatedAnswer], question: Question, first: int
    ) -> list[Reasons]:
        """Generate a sentence about each of the first items of every list; failed lists get none."""
        reasoner = Explainer(self.bundle, self.default.asking, self.encoder, first=first, batch=16)
        pools = [
            replace(request, candidates=self._listed_items(answer))
            for request, answer in zip(requests, lists, strict=True)
        ]
        with self.backend("list") as backend:
            return reasoner.write(pools, [item.answer for item in lists], None, backend)

    def prompt(self, request: RankRequest, question: Question) -> str:
        """Return the first prompt of a request, as text for the tokenizer.

        Raises:
            LlmrecError: If the request cannot be rendered.
        """
        bundle, encoder = self.bundle, self.encoder
        if question.verb != RANK:
            return encoder.text(item_question_prompt(bundle, request, select_item_strategy(bundle, question.verb)))
        way = None if request.candidates else self._searching(_MIN_BEAMS)
        way = way or self._way(candidates="file", strategy=question.strategy)
        return encoder.text(first_prompt(bundle, request, way.asking, encoder))

    def warm(self) -> None:
        """Load the weights now instead of for the first request.

        Raises:
            LlmrecError: If the engine does not start.
        """
        if self.options.backend != "openai":
            # A model trained with item codes has no codes for the made-up items.
            invented = (Item(item_id="1", title="One"), Item(item_id="2", title="Another"))
            items = tuple(islice((self.items or {}).values(), 2)) or invented
            self.answer([RankRequest(id="1", candidates=items, history=(PastEvent(item=items[0]),))], Question(depth=1))

    @contextmanager
    def backend(self, strategy: str) -> Iterator[CachedBackend]:
        """Yield the engine of a strategy for exclusive use."""
        with self._exclusively():
            engine = self.engines.engine_for(strategy, self.bundle.folder)
            yield self.engines.get(engine, self.bundle.folder, self.weights)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise LlmrecError("this recommender is closed; open it again", kind="closed")
            yield

    # ------------------------------------------------------------------- ranking

    def _way(self, **changes: Any) -> RankingSteps:
        """Return the ranking configuration for changed options."""
        key = tuple(sorted(changes.items()))
        if key not in self._ways:
            options = replace(self.options, **changes)
            check_recommender_options(options)
            self._ways[key] = self._build_ranking_steps(options)
        return self._ways[key]

    def _build_ranking_steps(self, options: RecommenderOptions, asking: TaskStrategy | None = None) -> RankingSteps:
        bundle, encoder = self.bundle, self.encoder
        asking = asking or select_ranking_strategy(
            bundle,
            task=options.task,
            template=options.template,
            strategy=requested_strategy(options),
            settings=options.settings,
        )
        ensemble = search = reasoner = None
        if options.fuse != "none":
            fused = find_stored_ensemble(bundle, asking, options.fuse)
            ensemble = Ensemble(fused, training_data(bundle, "--fuse"), self.items or {})
        if options.rationale:
            first = options.rationale if options.top is None else min(options.rationale, options.top)
            reasoner = Explainer(bundle, asking, encoder, first=first, batch=options.batch)
        if options.ranks_catalogue and self.items:
            search = CatalogueRanking(
                bundle, self.items, asking, encoder, beams=max(options.beams, options.top or 1), exact=options.exact
            )
        return RankingSteps(options=options, asking=asking, search=search, ensemble=ensemble, reasoner=reasoner)

    def _engine(self, way: RankingSteps) -> str:
        """Return the name of the engine; after a failure, the name of the next engine."""
        return self.engines.engine_for(way.asking.strategy, self.bundle.folder)

    @property
    def _can_search(self) -> bool:
        """Whether the model can rank the whole catalogue by beam search."""
        if self.options.backend == "openai":
            return False
        try:
            select_ranking_strategy(self.bundle, strategy="search")
        except RecipeError:
            return False
        return True

    def _searching(self, depth: int) -> RankingSteps | None:
        """Return the configuration for beam search over the catalogue; None if the model was not trained for it."""
        if not self.items or not self._can_search:
            return None
        # Beam widths are the minimum times powers of two, to limit the number of configurations.
        needed = max(min(depth, MAX_SEARCHED_ITEMS), self.options.beams)
        beams = _MIN_BEAMS * 2 ** max(0, math.ceil(math.log2(needed / _MIN_BEAMS)))
        return self._way(candidates="all", beams=beams)

    def _rank_catalogue(self, requests: Sequence[RankRequest], question: Question) -> list[AnnotatedAnswer]:
        """Rank the whole catalogue, by beam search or by reranking retrieved candidates."""
        searching = self._searching(question.depth) if question.strategy in ("auto", "search") else None
        if searching is not None:
            return self._ranked(searching, requests)
        if self.finder is None:
            reason = f"{self.name} cannot search a catalogue; give 'candidates', or serve a run with interactions"
            return [AnnotatedAnswer(answer=Unparsed(request_id=request.id, reason=reason)) for request in requests]
        filled = fill_candidates(requests, self.finder, question.depth, self.items)
        ranked = iter(self.answer([item for item in filled if item.candidates], question))
        return [
            next(ranked)
            if item.candidates
            else AnnotatedAnswer(answer=Unparsed(request_id=item.id, reason=NOTHING_LEFT))
            for item in filled
        ]

    def _listed_items(self, answer: AnnotatedAnswer) -> tuple[Item, ...]:
        """Return the items of a list; unknown items get the titles with which they were ranked."""
        if not isinstance(answer.answer, Ranking):
            return ()
        known, titled = self.items or {}, zip(answer.answer.items, answer.titles, strict=True)
        return tuple(known.get(name) or Item(item_id=name, title=title) for name, title in titled)

    # ------------------------------------------------------------------- steps of a ranking

    def _ranked(
        self,
        way: RankingSteps,
        requests: Sequence[RankRequest | Unparsed],
        advance: Callable[[int], None] = lambda done: None,
        part: int | None = None,
    ) -> list[AnnotatedAnswer]:
        """Rank requests: retrieve candidates, score, combine with baselines, explain, and truncate."""
        with self._exclusively():
            ready = [self._ready(way, request) for request in self._with_retrieved_candidates(way, requests)]
            valid = [request for request in ready if isinstance(request, RankRequest)]
            advance(len(ready) - len(valid))
            if way.ensemble is not None and not way.ensemble.asks_model and way.reasoner is None:
                rankings = way.ensemble.join(valid, None)
                advance(len(valid))
                ranked = iter([(ranking, Reasons()) for ranking in rankings])
            else:
                ranked = iter(self._rank_with_model(way, valid, advance, part))
        return [
            AnnotatedAnswer(answer=item) if isinstance(item, Unparsed) else self._answered(way, item, *next(ranked))
            for item in ready
        ]

    def _with_retrieved_candidates(
        self, way: RankingSteps, requests: Sequence[RankRequest | Unparsed]
    ) -> Sequence[RankRequest | Unparsed]:
        """Retrieve candidates for requests that have none."""
        if self.retriever is None or way is not self.default:
            return requests
        with self.budget.stage("retrieving"):
            filled = iter(self.retriever.fill([request for request in requests if isinstance(request, RankRequest)]))
        return [next(filled) if isinstance(request, RankRequest) else request for request in requests]

    def _ready(self, way: RankingSteps, request: RankRequest | Unparsed) -> RankRequest | Unparsed:
        """Return a request that is ready to be ranked, or the reason why it cannot be ranked."""
        if isinstance(request, Unparsed):
            return request
        if way.search is not None and request.candidates:
            return replace(request, candidates=(), notes=(*request.notes, CANDIDATES_IGNORED))
        if way.search is not None or request.candidates:
            return request
        reason = "there are no 'candidates'; give a list of items to rank"
        if self.retriever is not None and way is self.default:
            reason = "the history contains every item of the run's data, so no item is left to retrieve"
        return Unparsed(request_id=request.id, reason=reason)

    def _rank_with_model(
        self, way: RankingSteps, requests: Sequence[RankRequest], advance: Callable[[int], None], part: int | None
    ) -> list[tuple[Ranking | Unparsed, Reasons]]:
        engine, options = self._engine(way), way.options
        backend = self.engines.get(engine, self.bundle.folder, self.weights)
        backend.part = part
        # Cached answers of an interrupted run keep their original cost.
        before = backend.recalled_seconds
        one_by_one = engine == "hf" and way.asking.strategy not in _BATCHED_STRATEGIES
        batch = min(_SMALL_BATCH, options.batch) if one_by_one else options.batch
        if way.search is not None:
            ranked = way.search.rank(requests, backend, batch=batch, advance=advance)
        else:
            ranked = rank_requests(
                self.bundle,
                requests,
                way=way.asking,
                backend=backend,
                encoder=self.encoder,
                batch=batch,
                advance=advance,
            )
        self.budget.add("ranking", backend.recalled_seconds - before)
        if way.ensemble is not None:
            with self.budget.stage("fusing"):
                ranked = way.ensemble.join(requests, ranked)
        return list(zip(ranked, self._write_rationales(way, requests, ranked, backend), strict=True))

    def _write_rationales(
        self,
        way: RankingSteps,
        requests: Sequence[RankRequest],
        ranked: Sequence[Ranking | Unparsed],
        backend: CachedBackend,
    ) -> list[Reasons]:
        if way.reasoner is None:
            return [Reasons() for _ in requests]
        before = backend.recalled_seconds
        with self.budget.stage("rationales"):
            reasons = way.reasoner.write(requests, ranked, self.items if way.search is not None else None, backend)
        self.budget.add("rationales", backend.recalled_seconds - before)
        return reasons

    def _answered(
        self, way: RankingSteps, request: RankRequest, answer: Ranking | Unparsed, reasons: Reasons
    ) -> AnnotatedAnswer:
        notes = (*request.notes, *ranking_notes(way.asking, request, answer), *reasons.notes)
        common = AnnotatedAnswer(
            answer=answer,
            notes=notes,
            retrieved=request.retrieved,
            unknown_user=request.unknown_user,
            unknown_items=request.unknown_items,
        )
        if isinstance(answer, Unparsed):
            return common
        top = way.options.top
        items = answer.items[:top]
        catalogue = self.items if way.search is not None else None
        known = catalogue or {item.item_id: item for item in request.candidates}
        return replace(
            common,
            answer=replace(answer, items=items, scores=answer.scores[:top]),
            titles=tuple(known[item].title for item in items),
            profile=(answer.raw or None) if way.asking.strategy == TWO_STEP else None,
            reasons=reasons,
        )


def _read_items_and_retriever(
    options: RecommenderOptions, bundle: Bundle
) -> tuple[Mapping[str, Item] | None, Dataset | None, Retriever | None]:
    """Return the items that requests can name by id, the data of a run, and the retriever."""
    if options.retrieve is not None:
        # Read the data of the run only once, for both interactions and items.
        data = training_data(bundle)
        items = data.dataset.items if options.items is None else read_items(options.items)
        retriever = Retriever(options.retrieve, data, items, count=options.k, seed=bundle.seed)
        return items, None if bundle.run is None else data.dataset, retriever
    known, dataset = read_catalogue(bundle, options.items)
    if options.ranks_catalogue and not known:
        raise DataError(
            "--candidates all needs a catalogue; give a table of items with --items",
            kind="missing-key",
            column="--items",
        )
    return known, dataset, None


def _cleaning_listener(listener: Callable[[str], None]) -> Callable[[str], None]:
    """Return a listener that cleans a streamed text and passes on new parts."""
    raw = sent = ""

    def listen(piece: str) -> None:
        nonlocal raw, sent
        raw += piece
        now = clean(raw, TEXT_LIMIT)
        if len(now) > len(sent) and now.startswith(sent):
            listener(now[len(sent) :])
            sent = now

    return listen
