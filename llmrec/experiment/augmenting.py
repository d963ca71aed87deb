"""The stage between data and training that writes texts of users and items: prompts -> texts -> vectors -> a store."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmrec import __version__
from llmrec.augment.stores import of_texts
from llmrec.augment.texts import Asked, about_items, about_users, template_of
from llmrec.backends.answers import AnswerStore
from llmrec.backends.encode import Encoder
from llmrec.data.derived import TITLES
from llmrec.data.features import ANSWERS, FeatureKind, FeatureStore, Provenance, write_version, writing
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError, RecipeError
from llmrec.experiment.engines import Engines
from llmrec.experiment.resume import Budget
from llmrec.experiment.study import load_tables
from llmrec.guard import clean
from llmrec.models.embedder import text_embedder
from llmrec.models.load import load_tokenizer, resolve, weights_stamp
from llmrec.progress import Bar
from llmrec.recipe.schema import AugmentSection, Recipe
from llmrec.strategies.asking import cost_of
from llmrec.types import Backend, Cost, Prompt

FEATURES = "features"
"""In a run folder: the store that the recipe's section ``augment`` asks for."""

# Tokens a second of a small model on two cores, for the estimate before anything is asked.
_READS, _WRITES = 1000.0, 150.0


@dataclass(frozen=True)
class Plan:
    """What would be asked.

    Attributes:
        data: The split.
        asked: Questions by kind.
        encoder: Tokenizer of the model.
        base: Its folder.
    """

    data: SplitDataset
    asked: dict[FeatureKind, list[Asked]]
    encoder: Encoder
    base: str

    def prompt_tokens(self) -> dict[FeatureKind, int]:
        """Return how many tokens the questions of each kind have."""
        return {
            kind: sum(len(self.encoder.prompt(each.prompt)) for each in asked) for kind, asked in self.asked.items()
        }


@dataclass(frozen=True)
class Augmented:
    """What was written.

    Attributes:
        folder: The store.
        texts: How many of each kind.
        cost: Tokens of all questions and answers, those that were known before among them.
        seconds: Spent now.
    """

    folder: Path
    texts: dict[FeatureKind, int]
    cost: Cost
    seconds: float


def plan(recipe: Recipe) -> Plan:
    """Return what a recipe's `augment` section would ask.

    Raises:
        RecipeError: If the recipe has no such section, or names a template that is not there.
        DataError: If the data cannot be read or split.
    """
    section = _section(recipe)
    data, _ = load_tables(recipe, None)
    asked: dict[FeatureKind, list[Asked]] = {}
    if section.users is not None:
        asked["user"] = about_users(data, section, recipe.seed, recipe.prompts)
    if section.items is not None:
        asked["item"] = about_items(data, section, recipe.seed, recipe.prompts)
    base = resolve(recipe.model, seed=recipe.seed)
    encoder = Encoder(load_tokenizer(base, recipe.model), max_length=recipe.model.max_length)
    return Plan(data, asked, encoder, base)


def estimate(planned: Plan, section: AugmentSection) -> dict[str, str]:
    """Return what it would cost, for a small model on two cores, in words."""
    rows, seconds = {}, 0.0
    for kind, tokens in planned.prompt_tokens().items():
        count = len(planned.asked[kind])
        seconds += tokens / _READS + count * section.max_tokens / _WRITES
        rows[f"{kind}s"] = f"{count:,} texts, {tokens:,} tokens read, {count * section.max_tokens:,} written at most"
    return rows | {"time": f"about {max(1, round(seconds / 60))} minutes for a small model on two cores"}


def augment(recipe: Recipe, out: Path, *, quiet: bool = False) -> Augmented:
    """Write the texts, make vectors of them and publish both; a killed call resumes where it was.

    A store that was made so already stays as it is, with what was corrected or erased in it since.

    Args:
        recipe: With the section ``augment``.
        out: The store.
        quiet: Show no progress.

    Raises:
        RecipeError: See `plan`.
        DataError: See `plan`; or if no text came out.
        BackendError: If the engine fails.
        LlmrecError: If the folder holds other things, or another process writes to it.
    """
    section, begin = _section(recipe), time.perf_counter()
    planned = plan(recipe)
    made = {kind: _provenance(recipe, planned, kind) for kind in planned.asked}
    with writing(out) as place:
        if (kept := _made_so(place, made, section)) is not None:
            return Augmented(place, {kind: len(kept.ids(kind)) for kind in kept.kinds}, Cost(), 0.0)
        store = AnswerStore(place / ANSWERS)
        engines = Engines(recipe.model, recipe.eval, planned.encoder, recipe.seed, Budget(), store)
        cost, tables = Cost(), []
        try:
            engine = engines.engine_for("text")
            backend = engines.get(engine, planned.base, _weights(engine, planned))
            for kind, asked in planned.asked.items():
                written, spent = _write(backend, asked, section, recipe.eval.batch, f"{kind}s", quiet=quiet)
                cost += spent
                seen = {each.id: each.seen for each in asked if each.seen}
                tables.append(of_texts(kind, written, encoder=section.encoder, provenance=made[kind], seen=seen))
            write_version(place, tables, dtype=section.dtype)
        finally:
            engines.close()
            store.close()
    counts = {table.kind: len(table.ids) for table in tables}
    return Augmented(out, counts, cost, time.perf_counter() - begin)


def _weights(engine: str, planned: Plan) -> str:
    return "" if engine == "openai" else weights_stamp(planned.base)


def _provenance(recipe: Recipe, planned: Plan, kind: FeatureKind) -> Provenance:
    """Return where texts come from, but for the encoder: equal ones are equal texts."""
    section, data = _section(recipe), planned.data
    template = template_of(kind, str(getattr(section, f"{kind}s")), recipe.prompts)
    engine = recipe.eval.backend
    # Texts on items show no interaction, and belong to no split; but for titles that are made of training reviews.
    of_split = kind == "user" or TITLES in data.dataset.derives
    shown = section.model_dump(mode="json", exclude={"dtype", "encoder"})
    return Provenance(
        system="augment",
        split=data.readable if of_split else "",
        template=_digest([template.sha, json.dumps(shown, sort_keys=True)]),
        generator={
            "model": recipe.model.name,
            "weights": _weights(engine, planned),
            "engine": engine,
            "decoding": "greedy",
            "max_tokens": section.max_tokens,
            "seed": recipe.seed,
            "asked": _digest([each.id for each in planned.asked[kind]]),
        },
        version=__version__,
    )


def _made_so(place: Path, made: Mapping[FeatureKind, Provenance], section: AugmentSection) -> FeatureStore | None:
    """Return the store if it was made as is asked now; None if it was not, or there is none."""
    try:
        store = FeatureStore.open(place)
    except DataError:
        return None
    stamp = text_embedder(section.encoder).stamp
    same = store.kinds == tuple(made) and store.dtype == section.dtype
    for kind, wanted in made.items():
        found = store.provenance(kind) if same else None
        same = same and found is not None and replace(found, encoder={}) == wanted and found.encoder["stamp"] == stamp
    return store if same else None


def _section(recipe: Recipe) -> AugmentSection:
    if recipe.augment is None:
        raise RecipeError(
            "the recipe has no section augment; add one, such as augment: {factors: [genre, mood]}",
            kind="missing-key",
            column="augment",
        )
    return recipe.augment


def _write(
    backend: Backend, asked: Sequence[Asked], section: AugmentSection, batch: int, what: str, *, quiet: bool
) -> tuple[dict[str, str], Cost]:
    written, cost = {}, Cost()
    with Bar(what, len(asked), quiet=quiet) as bar:
        for start in range(0, len(asked), batch):
            part = asked[start : start + batch]
            prompts: list[Prompt] = [each.prompt for each in part]
            for each, done in zip(part, backend.generate(prompts, max_tokens=section.max_tokens), strict=True):
                # What a model writes is data like any other, and can forge no word of a template.
                written[each.id] = clean(done.text)
                cost += cost_of(done)
            bar.advance(len(part))
    return written, cost


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
