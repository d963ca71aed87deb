"""All that an answer depends on besides the requests: model, words, items, engine, and a key over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from llmrec.answering.catalogue import Whole
from llmrec.answering.rationales import TOKENS, Reasoner, rationale_template
from llmrec.answering.requests import catalogue
from llmrec.answering.retrieval import Retriever, training_data
from llmrec.answering.strategy import Way, choose_way
from llmrec.backends.cache import AnswerStore
from llmrec.backends.encode import Encoder
from llmrec.backends.vllm.backend import prepare_environment
from llmrec.baselines.retrieve import check_retriever
from llmrec.commands.rank.options import RankOptions, check_choices, engine_section, strategy_of
from llmrec.data.assemble import digest_items, read_items
from llmrec.data.reading.limits import shortened
from llmrec.data.reading.request_file import RequestFile
from llmrec.data.requests import unknown_id
from llmrec.errors import DataError
from llmrec.experiment import bundle as bundles
from llmrec.experiment.bundle import Bundle
from llmrec.experiment.engines import Engines, refuse_paired
from llmrec.experiment.resume import Budget, key_of
from llmrec.models.load import load_config, load_tokenizer, quiet_libraries, weights_stamp
from llmrec.models.traits import is_paired
from llmrec.types import Item


@dataclass(frozen=True)
class Job:
    """What requests are ranked with, and a key over it.

    Attributes:
        bundle: The model and how it was asked in training.
        way: How requests are put.
        items: What requests may name by id; None: nothing.
        encoder: The model's tokenizer and its longest prompt.
        engines: Where the backend comes from.
        engine: Its name.
        weights: A digest of the model's weights; empty where a server has its own.
        store: Where answers are remembered.
        key: Over everything that can change the output, the requests included.
        whole: Ranks the whole catalogue, where that is asked.
        retriever: Finds candidates for requests without, where that is asked.
        reasoner: Writes rationales, where they are asked for.
    """

    bundle: Bundle
    way: Way
    items: Mapping[str, Item] | None
    encoder: Encoder
    engines: Engines
    engine: str
    weights: str
    store: AnswerStore
    key: str
    whole: Whole | None = None
    retriever: Retriever | None = None
    reasoner: Reasoner | None = None

    def close(self) -> None:
        """Stop the engine and close the store."""
        self.engines.close()
        self.store.close()


def open_job(options: RankOptions, source: RequestFile, budget: Budget) -> Job:
    """Open what requests are ranked with; weights are loaded when the first question is asked.

    Raises:
        LlmrecError: If an option, a file or the model cannot be used.
    """
    check_choices(options)
    if options.retrieve is not None:
        check_retriever(options.retrieve, "--retrieve")
    prepare_environment()
    quiet_libraries()
    bundle = _bundle(options)
    strategy = strategy_of(options)
    way = choose_way(bundle, task=options.task, template=options.template, strategy=strategy, settings=options.settings)
    items, retriever = _items(options, bundle)
    if items == {}:
        _check_titled(options, source)
    encoder = Encoder(load_tokenizer(bundle.folder, bundle.model), max_length=_window(options, bundle))
    reasoner = None
    if options.rationale:
        first = options.rationale if options.top is None else min(options.rationale, options.top)
        reasoner = Reasoner(bundle, way, rationale_template(), encoder, first=first, batch=options.batch)
    section = engine_section(options, paired=is_paired(load_config(bundle.folder, bundle.model)))
    refuse_paired(bundle.folder, bundle.model, section)
    store = AnswerStore(options.parts / "answers.sqlite")
    engines = Engines(bundle.model, section, encoder, bundle.seed, budget, store)
    engine = engines.engine_for(way.strategy)
    # A server answers with weights of its own; the folder gives the tokenizer alone.
    weights = "" if engine == "openai" else weights_stamp(bundle.folder)
    whole = None
    if options.whole and items:
        whole = Whole(bundle, items, way, encoder, beams=max(options.beams, options.top or 1), exact=options.exact)
    job = Job(bundle, way, items, encoder, engines, engine, weights, store, "", whole, retriever, reasoner)
    return replace(job, key=_key(options, source, job))


def _key(options: RankOptions, source: RequestFile, job: Job) -> str:
    bundle, way, reasoner = job.bundle, job.way, job.reasoner
    return key_of(
        requests=source.sha256,
        asked=job.engines.identity(job.engine, job.weights),
        window=job.encoder.max_length,
        section=bundle.tasks.present()[way.family].model_dump(),
        template=bundle.templates[way.family][way.template].sha,
        way=(way.family, way.template, way.strategy, way.options),
        index=bundle.index.digest if bundle.index else None,
        noun=bundle.noun,
        seed=bundle.seed,
        items=None if job.items is None else digest_items(job.items),
        top=options.top,
        batch=options.batch,
        limit=options.limit,
        whole=(options.beams, options.exact) if options.whole else None,
        retrieved=job.retriever.identity if job.retriever else None,
        rationale=(reasoner.template.sha, reasoner.first, TOKENS) if reasoner else None,
    )


def _items(options: RankOptions, bundle: Bundle) -> tuple[Mapping[str, Item] | None, Retriever | None]:
    """Return what requests may name by id, and what retrieves among a run's items.

    Raises:
        DataError: If a catalogue is needed and none is known.
    """
    if options.retrieve is not None:
        # The run's data is read once: what it learns from and what it calls its items.
        data = training_data(bundle)
        items = data.dataset.items if options.items is None else read_items(options.items)
        return items, Retriever(options.retrieve, data, items, count=options.k, seed=bundle.seed)
    known = catalogue(bundle, options.items)
    if options.whole and not known:
        raise DataError("--candidates all ranks a catalogue, and none is known; name a table of items with --items")
    return known, None


def _check_titled(options: RankOptions, source: RequestFile) -> None:
    """Refuse ids where no item is known: without its titles a model would rank what it was never tuned on.

    Raises:
        DataError: If a request names an item by its id alone.
    """
    for raw in islice(source, options.limit):
        name = unknown_id(raw.record) if raw.record is not None else None
        if name is not None:
            raise DataError(
                f"{source.path}, line {raw.line} names the item {shortened(name, 60)!r}, and {options.model} carries "
                "no table of items that says what it is; name one with --items, or give each item its title: "
                '{"item_id": ..., "title": ...}'
            )


def _bundle(options: RankOptions) -> Bundle:
    found = bundles.read(options.model)
    changes: dict[str, Any] = {"dtype": options.dtype}
    if options.max_length is not None:
        changes["max_length"] = options.max_length
    return replace(found, model=found.model.model_copy(update=changes), noun=options.noun or found.noun)


def _window(options: RankOptions, bundle: Bundle) -> int:
    """Return the longest prompt with answer, which the model's own positions bound."""
    config = load_config(bundle.folder, bundle.model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or bundle.model.max_length
    if options.max_length is not None and options.max_length > positions:
        raise DataError(
            f"--max-length {options.max_length} is more than the {positions} tokens that {bundle.folder} can read; "
            "lower it"
        )
    return int(min(bundle.model.max_length, positions))
