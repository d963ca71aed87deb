"""`llmrec augment`: generates texts about users and items with a language model, and stores them with their vectors."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec import __version__
from llmrec.augment.stores import features_from_texts
from llmrec.augment.texts import TextPrompt, extract_text, item_prompts, preference_vector, text_template, user_prompts
from llmrec.backends.cache import AnswerStore, CachedBackend
from llmrec.backends.encode import Encoder
from llmrec.baselines.item_texts import texts_of_items
from llmrec.data.derived import TITLES
from llmrec.data.features import (
    ANSWERS_FILE,
    KINDS,
    PLURALS,
    USER_KINDS,
    FeatureKind,
    Features,
    FeatureStore,
    Provenance,
    lock_store,
    write_version,
)
from llmrec.data.split import SplitDataset, liked_threshold, scale_of
from llmrec.durable import write_text
from llmrec.errors import DataError, RecipeError
from llmrec.fingerprint import fingerprint
from llmrec.models.load import load_tokenizer, model_folder_hash, resolve_model_folder
from llmrec.models.text_encoder import text_embedder
from llmrec.pipeline.engines import Engines
from llmrec.pipeline.resume import StageTimer, lock_folder
from llmrec.pipeline.shards import SHARD_FILE, FinishedShard, finish_shard, reusable_shard, shard_folder, verify_shards
from llmrec.pipeline.study import load_tables
from llmrec.progress import Progress
from llmrec.recipe.load import STORED_RECIPE_FILE, dump_recipe, load_stored_recipe
from llmrec.recipe.schema import AugmentSection, Recipe
from llmrec.records import Shard
from llmrec.strategies.asking import cost_of
from llmrec.types import Cost, Event, Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

FEATURES, CONTROL = "features", "control"
"""Names in a run folder: the feature store of the recipe's section ``augment``, and that of `build_reference_store`."""

# Tokens per second of a small model on two cores, used for estimates.
_READS, _WRITES = 1000.0, 150.0


@dataclass(frozen=True)
class AugmentPlan:
    """The prompts of the recipe section ``augment``, with the model that answers them."""

    data: SplitDataset
    asked: dict[FeatureKind, list[TextPrompt]]
    encoder: Encoder
    base: str


@dataclass(frozen=True)
class AugmentResult:
    """The result of `augment`; ``cost`` includes stored answers, and ``seconds`` is the duration of this call."""

    folder: Path
    texts: dict[FeatureKind, int]
    cost: Cost
    seconds: float


def plan_texts(recipe: Recipe) -> AugmentPlan:
    """Return the prompts of the recipe section ``augment``."""
    data, prompts = collect_prompts(recipe)
    base = resolve_model_folder(recipe.model, seed=recipe.seed)
    encoder = Encoder(load_tokenizer(base, recipe.model), max_length=recipe.model.max_length)
    return AugmentPlan(data, prompts, encoder, base)


def collect_prompts(recipe: Recipe) -> tuple[SplitDataset, dict[FeatureKind, list[TextPrompt]]]:
    """Return the split data and the prompts, without loading a model; raises the errors of `plan_texts`."""
    section = _augment_section(recipe)
    # Load the data without generated texts, which do not exist yet.
    tables = {"data": recipe.data, "reviews": recipe.reviews}
    plain = {key: table and table.model_copy(update={"texts": None}) for key, table in tables.items()}
    data, _ = load_tables(recipe.model_copy(update=plain))
    return data, {
        kind: _prompts_of_kind(recipe, data, kind, {}) for kind in KINDS if _template_name(section, kind) is not None
    }


def check_text_store(recipe: Recipe, store: Path) -> None:
    """Reject a recipe that generates texts but shows the texts of another feature store in its prompts."""
    texts = recipe.data.texts
    if recipe.augment is None or texts is None or Path(texts.path).expanduser().resolve() == store.resolve():
        return
    raise RecipeError(
        f"data.texts.path: prompts use {texts.path}, but the texts of this run are written to {store}; set "
        f"data.texts.path={store}, or augment=null",
        kind="contradiction",
        column="data.texts.path",
    )


def build_reference_store(recipe: Recipe, out: Path) -> AugmentResult:
    """Build a feature store from interactions without a language model, as a baseline for generated texts.

    An item has its title and fields. A user has the mean vector of the liked items in the question's interactions minus
    that of the others, since the question shows ratings too; without ratings the mean of all. The vector therefore
    depends on the same interactions as the generated text.
    """
    section, begin = _augment_section(recipe), time.perf_counter()
    data, prompts = collect_prompts(recipe)
    if not {"user", "item"} & prompts.keys():
        raise RecipeError(
            "a reference store needs texts about users or items; set augment.users or augment.items",
            kind="unsupported",
            column="augment",
        )
    items = [data.dataset.items[entry] for entry in sorted(data.dataset.items)]
    texts_by_id = dict(zip((item.item_id for item in items), texts_of_items(items), strict=True))
    provenance = Provenance(system="augment without a model", split=data.readable, version=__version__)
    every = features_from_texts("item", texts_by_id, encoder=section.encoder, provenance=provenance)
    row_of = {item: row for row, item in enumerate(every.ids)}
    tables = []
    if "item" in prompts:
        # The users and items to generate texts for, limited by augment.limit.
        selected = [row_of[entry.id] for entry in prompts["item"] if entry.id in row_of]
        names = [every.ids[row] for row in selected]
        written = [every.texts[row] for row in selected]
        tables.append(Features("item", names, every.vectors[selected], every.provenance, texts=written))
    if "user" in prompts:
        known = [(entry, [event for event in entry.events if event.item_id in row_of]) for entry in prompts["user"]]
        liked = recipe.tasks.ctr.liked if recipe.tasks.ctr is not None else None
        rows = [_user_preference_vector(data, events, every, row_of, liked) for _, events in known if events]
        seen = {entry.id: entry.seen for entry, events in known if events}
        tables.insert(0, Features("user", list(seen), np.array(rows, np.float32), every.provenance, seen=seen))
    with lock_store(out) as folder:
        write_version(folder, tables, dtype=section.dtype)
    return AugmentResult(out, {table.kind: len(table.ids) for table in tables}, Cost(), time.perf_counter() - begin)


def _user_preference_vector(
    data: SplitDataset, events: Sequence[Event], every: Features, row_of: Mapping[str, int], liked: float | None
) -> NDArray[np.floating[Any]]:
    """Return the mean vector of liked items minus the mean vector of other items, shape (d,)."""
    rated = [event for event in events if event.rating is not None]
    vectors = every.vectors[[row_of[event.item_id] for event in rated or events]]
    if not rated:
        return np.asarray(vectors.mean(axis=0))
    return preference_vector(
        vectors, np.array([float(event.rating or 0) for event in rated]) >= liked_threshold(scale_of(data), liked)
    )


def estimate_cost(planned: AugmentPlan, section: AugmentSection) -> dict[str, str]:
    """Estimate the cost for a small model on two cores, as text."""
    rows, seconds = {}, 0.0
    for kind, prompts in planned.asked.items():
        count, tokens = len(prompts), sum(len(planned.encoder.prompt(item.prompt)) for item in prompts)
        seconds += tokens / _READS + count * section.max_tokens / _WRITES
        most = count * section.max_tokens
        rows[PLURALS[kind]] = f"{count:,} texts, {tokens:,} prompt tokens, at most {most:,} completion tokens"
    return rows | {"time": f"about {max(1, round(seconds / 60))} minutes for a small model on two cores"}


def augment(recipe: Recipe, out: Path, *, quiet: bool = False, shards: Sequence[FinishedShard] = ()) -> AugmentResult:
    """Generate texts and vectors, and write them to a feature store; resumes an interrupted call.

    An existing store of the same inputs is kept, with its corrections and erasures.

    Args:
        recipe: A recipe with the section ``augment``.
        out: The feature store.
        quiet: Show no progress.
        shards: Folders of `augment_shard`, whose answers are reused.

    Raises:
        RecipeError: See `plan_texts`.
        DataError: See `plan_texts`; or if no text was generated.
        BackendError: If the engine fails.
        LlmrecError: If the folder has foreign files, another process writes to it, or shards have other inputs.
    """
    section, begin = _augment_section(recipe), time.perf_counter()
    planned = plan_texts(recipe)
    choices = _build_engines(recipe, planned).choices("text", planned.base)
    provenances = {
        engine: {kind: _provenance(recipe, planned, kind, engine) for kind in planned.asked} for engine in choices
    }
    with lock_store(out) as store_folder:
        if (kept := _matching_store(store_folder, provenances, section)) is not None:
            return AugmentResult(store_folder, {kind: len(kept.ids(kind)) for kind in kept.kinds}, Cost(), 0.0)
        cost, tables = Cost(), []
        for item in shards:
            item.refuse_other(_answers_key(recipe, planned))
        with _open_backend(recipe, planned, store_folder, StageTimer()) as (backend, store, engines):
            for item in shards:
                store.join(item.folder / ANSWERS_FILE)
            interests: dict[str, str] = {}
            for kind, planned_prompts in planned.asked.items():
                # Prompts for synthetic items show the text about their user, which is generated first.
                prompts = (
                    _prompts_of_kind(recipe, planned.data, kind, interests) if kind == "synthetic" else planned_prompts
                )
                written, spent = _generate_texts(backend, prompts, kind, section, recipe.eval.batch, quiet=quiet)
                interests = written if kind == "user" else interests
                cost += spent
                seen = {item.id: item.seen for item in prompts if item.seen}
                provenance = provenances[engines.engine_for("text", planned.base)][kind]
                tables.append(
                    features_from_texts(kind, written, encoder=section.encoder, provenance=provenance, seen=seen)
                )
            write_version(store_folder, tables, dtype=section.dtype)
    counts = {table.kind: len(table.ids) for table in tables}
    return AugmentResult(out, counts, cost, time.perf_counter() - begin)


def augment_shard(recipe: Recipe, out: Path, shard: Shard, *, quiet: bool = False) -> Path:
    """Generate the texts of one shard, and store them next to the feature store that `merge_augment` writes.

    A shard has complete batches of the texts of each kind. Returns its folder.
    """
    section, folder, budget = _augment_section(recipe), shard_folder(out, shard), StageTimer(quiet=quiet)
    with lock_folder(folder, (STORED_RECIPE_FILE, ANSWERS_FILE, SHARD_FILE)):
        with budget.stage("data"):
            planned = plan_texts(recipe)
        key = _answers_key(recipe, planned)
        if reusable_shard(folder, key):
            log.warning("shard %s is already complete", shard)
            return folder
        cost, count = Cost(), 0
        with _open_backend(recipe, planned, folder, budget) as (backend, *_):
            for kind, prompts in planned.asked.items():
                # Synthetic items depend on texts of all users, so they are generated when shards are merged.
                part = [] if kind == "synthetic" else shard.share(prompts, recipe.eval.batch)
                with budget.stage(PLURALS[kind]):
                    cost += _generate_texts(backend, part, kind, section, recipe.eval.batch, quiet=quiet)[1]
                count += len(part)
        write_text(folder / STORED_RECIPE_FILE, dump_recipe(recipe))
        facts = {"texts": count, "cost": asdict(cost), "seconds": budget.stages}
        finish_shard(folder, "augment", shard, key, [STORED_RECIPE_FILE, ANSWERS_FILE], facts)
    return folder


def merge_augment(out: Path, folders: Sequence[Path] = (), *, quiet: bool = False) -> AugmentResult:
    """Merge shards, by default those next to the store, into the store that a single process would write."""
    result = verify_shards(out, folders)
    return augment(load_stored_recipe(result[0].folder), out, quiet=quiet, shards=result)


@contextmanager
def _open_backend(
    recipe: Recipe, planned: AugmentPlan, folder: Path, budget: StageTimer
) -> Iterator[tuple[CachedBackend, AnswerStore, Engines]]:
    """Open the backend, its answer cache, and the engines."""
    store = AnswerStore(folder / ANSWERS_FILE)
    engines = _build_engines(recipe, planned, budget, store)
    try:
        engine = engines.engine_for("text", planned.base)
        backend = engines.get(engine, planned.base, _weights_stamp(engine, planned))
        yield backend, store, engines
    finally:
        engines.close()
        store.close()


def _answers_key(recipe: Recipe, planned: AugmentPlan) -> str:
    """Return the fingerprint of the generated answers."""
    engines = _build_engines(recipe, planned)
    engine = engines.engine_for("text", planned.base)
    provenances = {kind: asdict(_provenance(recipe, planned, kind, engine)) for kind in planned.asked}
    identity = engines.identity(engine, _weights_stamp(engine, planned))
    return fingerprint("augment", recipe, made=provenances, asked=identity, batch=recipe.eval.batch)


def _build_engines(
    recipe: Recipe, planned: AugmentPlan, budget: StageTimer | None = None, store: AnswerStore | None = None
) -> Engines:
    return Engines(recipe.model, recipe.eval, planned.encoder, recipe.seed, budget or StageTimer(), store)


def _weights_stamp(engine: str, planned: AugmentPlan) -> str:
    return "" if engine == "openai" else model_folder_hash(planned.base)


def _provenance(recipe: Recipe, planned: AugmentPlan, kind: FeatureKind, engine: str) -> Provenance:
    """Return all settings that affect generated texts, which are reused if the settings are equal."""
    section, data = _augment_section(recipe), planned.data
    template = text_template(kind, str(_template_name(section, kind)), recipe.prompts)
    # Texts about items use no interactions, except for titles derived from training reviews.
    of_split = kind in USER_KINDS or TITLES in data.dataset.derives
    shown = section.model_dump(mode="json", exclude={"dtype", "encoder"})
    return Provenance(
        system="augment",
        split=data.readable if of_split else "",
        template=_digest([template.sha, json.dumps(shown, sort_keys=True)]),
        generator={
            "model": recipe.model.name,
            "weights": _weights_stamp(engine, planned),
            "engine": engine,
            "decoding": "greedy",
            "max_tokens": section.max_tokens,
            "seed": recipe.seed,
            # Full prompts, since titles and fields may change while ids stay the same.
            "asked": _digest([part for item in planned.asked[kind] for part in (item.id, repr(item.prompt))]),
            **({"synthetic": True} if kind == "synthetic" else {}),
        },
        version=__version__,
    )


def _matching_store(
    folder: Path, provenances: Mapping[str, Mapping[FeatureKind, Provenance]], section: AugmentSection
) -> FeatureStore | None:
    """Return the existing feature store if it has the same texts; otherwise None."""
    try:
        store = FeatureStore.open(folder)
    except DataError:
        return None
    stamp = text_embedder(section.encoder).stamp
    same = store.kinds == tuple(next(iter(provenances.values()))) and store.dtype == section.dtype
    for kind in store.kinds if same else ():
        result = store.provenance(kind)
        expected = [item[kind] for item in provenances.values()]
        same = (
            same and result is not None and replace(result, encoder={}) in expected and result.encoder["stamp"] == stamp
        )
    return store if same else None


def _template_name(section: AugmentSection, kind: FeatureKind) -> str | None:
    return {"user": section.users, "item": section.items, "synthetic": section.synthetic}[kind]


def _prompts_of_kind(
    recipe: Recipe, data: SplitDataset, kind: FeatureKind, interests: Mapping[str, str]
) -> list[TextPrompt]:
    section = _augment_section(recipe)
    if kind == "item":
        return item_prompts(data, section, recipe.seed, recipe.prompts)
    return user_prompts(data, section, recipe.seed, recipe.prompts, kind=kind, interests=interests)


def _augment_section(recipe: Recipe) -> AugmentSection:
    if recipe.augment is None:
        raise RecipeError(
            "the recipe has no section augment; add one, such as augment: {factors: [genre, mood]}",
            kind="missing-key",
            column="augment",
        )
    return recipe.augment


def _generate_texts(
    backend: CachedBackend,
    prompts: Sequence[TextPrompt],
    kind: FeatureKind,
    section: AugmentSection,
    batch: int,
    *,
    quiet: bool,
) -> tuple[dict[str, str], Cost]:
    with Progress(PLURALS[kind], len(prompts), quiet=quiet) as bar:
        while True:
            replaced, written, cost = backend.replaced, dict[str, str](), Cost()
            for start in range(0, len(prompts), batch):
                part = prompts[start : start + batch]
                inputs: list[Prompt] = [item.prompt for item in part]
                for item, done in zip(part, backend.generate(inputs, max_tokens=section.max_tokens), strict=True):
                    written[item.id] = extract_text(kind, done.text, section)
                    cost += cost_of(done)
                bar.advance(len(part))
            if backend.replaced == replaced:
                return written, cost
            # A store never has texts of two engines.
            bar.reach(0)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
