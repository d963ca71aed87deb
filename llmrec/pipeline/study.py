"""Builds the data, candidate sets and tasks of a recipe, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmrec.backends.encode import Encoder
from llmrec.baselines.parameters import baseline_config
from llmrec.baselines.retrieve import ENSEMBLE_RETRIEVER_NAME, RetrievedCandidates, retrieve_candidates
from llmrec.data.candidates import CandidateSets, sample_candidates
from llmrec.data.described import held_out_titles, mentions_title, with_stored_texts
from llmrec.data.read.limits import format_value
from llmrec.data.sets.table import load_data
from llmrec.data.split import SplitDataset, split_dataset, split_validation_users, split_without_test, with_review_part
from llmrec.errors import DataError, RecipeError, did_you_mean
from llmrec.evaluate.slices import user_attributes
from llmrec.index.semantic import item_vectors
from llmrec.index.table import ItemIndex
from llmrec.models.item_tokens import add_item_tokens
from llmrec.models.load import load_tokenizer
from llmrec.models.text_encoder import text_embedder_for_split
from llmrec.pipeline.indexing import build_index
from llmrec.pipeline.rejecting import hard_negative_source
from llmrec.prompts.template import Template, load_templates
from llmrec.recipe.paths import name_searched_folders
from llmrec.recipe.schema import BaselineSection, DataSection, Recipe, TaskSection, default_baselines
from llmrec.registry import BASELINES, import_component
from llmrec.results import Arm
from llmrec.tasks.cases import Cases, cases_of_first_users
from llmrec.tasks.family import check_task_components, family_of
from llmrec.tasks.held_items import HeldItems, check_codes_without_titles, sample_held_candidates, select_held_items
from llmrec.tasks.history import ItemVectors
from llmrec.tasks.mixture import training_shares
from llmrec.tasks.pool import training_examples
from llmrec.tasks.task import Task, TaskInputs
from llmrec.tasks.templates import select_task_templates
from llmrec.types import Case, Example, Item, Probability, Rating, SplitName

if TYPE_CHECKING:
    from llmrec.ensembles.retrieving import EnsembleRetriever

TEXT_BASELINE = "content"
"""A baseline that ranks by item texts only, in seconds and without a download."""


@dataclass(frozen=True)
class Study:
    """The data and tasks of a recipe, built once and shared by all stages.

    Attributes:
        recipe: The complete recipe.
        data: Main data; its held-out pairs are held out in every task.
        reviews: The second table, if the recipe names one.
        candidates: Stored candidate sets of the evaluated users in the evaluated split, for ranking tasks; None if the
            whole catalogue is ranked.
        index: Codes of the items, if the recipe has an index.
        tasks: Chosen families by name.
        templates: All templates of the chosen families, ``family -> name -> template``.
        held: Items whose code and text no training row may contain together; None without the alignment task.
        aligned: Stored candidate sets of the questions about these items.
        trained: The tasks of training rows if ``train.seed`` draws them separately; otherwise ``tasks``.
    """

    recipe: Recipe
    data: SplitDataset
    reviews: SplitDataset | None
    candidates: CandidateSets | None
    index: ItemIndex | None
    tasks: Mapping[str, Task]
    templates: Mapping[str, Mapping[str, Template]]
    held: HeldItems | None = None
    aligned: CandidateSets | None = None
    trained: Mapping[str, Task] | None = None

    @property
    def training_seed(self) -> int:
        """Seed of training examples, their order, dropout and adapters."""
        seed = self.recipe.train.seed
        return self.recipe.seed if seed is None else seed

    @property
    def training_tasks(self) -> Mapping[str, Task]:
        """Tasks from which training examples are drawn."""
        return self.trained or self.tasks

    def section(self, family: str) -> TaskSection:
        """Return the recipe section of a task."""
        return self.recipe.tasks.present()[family]

    def task_data(self, family: str) -> SplitDataset:
        """Return the data of a task; the text column has the part of a review that the task generates."""
        return self._read[family]

    @cached_property
    def _read(self) -> Mapping[str, SplitDataset]:
        result = {}
        for family in self.recipe.tasks.present():
            used = self._table(family)
            part = family_of(family).writes
            result[family] = with_review_part(used, part) if part is not None else used
        return result

    @property
    def tables(self) -> tuple[SplitDataset, ...]:
        """The main data set, and the second data set if the recipe has one."""
        return tuple(filter(None, (self.data, self.reviews)))

    def table_name(self, family: str) -> str:
        """Return the name of a task's data set in results: ``main``, or ``reviews`` for the second one."""
        return "reviews" if family_of(family).second_table and self.reviews is not None else "main"

    def _table(self, family: str) -> SplitDataset:
        return self.reviews if self.reviews is not None and self.table_name(family) == "reviews" else self.data

    def codes(self, family: str) -> ItemIndex | None:
        """Return the item index of a task; None for tasks on the second data set."""
        return self.index if self.task_data(family).dataset.items is self.data.dataset.items else None

    def sets(self, family: str) -> CandidateSets | None:
        """Return the stored candidate sets of a task."""
        return {"items": self.aligned, "users": self.candidates, None: None}[family_of(family).candidates]

    def sets_digest(self, family: str) -> str | None:
        """Return the hash of the stored candidate sets of a task."""
        sets = self.sets(family)
        return sets.digest if sets is not None else None

    def baselines(self, family: str) -> tuple[BaselineSection, ...]:
        """Return the baselines of a task; see `with_text_baseline`."""
        known = self.section(family).baselines
        return (
            with_text_baseline(known, self.task_data(family).dataset.items)
            if family_of(family).ranks_for_users
            else known
        )

    def cases(self, family: str, split: SplitName | None = None) -> list[Case]:
        """Return all evaluated cases of the first ``users`` users in seeded order.

        Users whose profile names a held-out item are excluded. The validation split also excludes those that weigh
        ensembles, which must not be used for any other choice or calibration. A family about items instead of users has
        its first cases.

        Args:
            family: A chosen family.
            split: The split; None: the evaluated one.
        """
        split = split or self.recipe.eval.split
        if (family, split) not in self._case_cache:
            self._case_cache[family, split] = self._cases(family, split)
        return self._case_cache[family, split]

    @cached_property
    def _case_cache(self) -> dict[tuple[str, SplitName], list[Case]]:
        return {}

    def _cases(self, family: str, split: SplitName) -> list[Case]:
        cases, count = self.tasks[family].cases(split), self.section(family).users or self.recipe.eval.users
        if not isinstance(cases, Cases):
            return list(cases[:count])
        but = self.set_aside(family)
        if split == "valid":
            but |= ensemble_weight_users(self.recipe, family, self.task_data(family))
        return cases_of_first_users(cases, count, but=but)

    def set_aside(self, family: str) -> frozenset[str]:
        """Return the users excluded from evaluation because their profile mentions one of their held-out items."""
        return frozenset(leaking_users(self.leaks(self._table(family))))

    def leaks(self, table: SplitDataset) -> tuple[ProfileLeak, ...]:
        """Return the profile fields of a data set that mention a held-out item of their user."""
        return self._leaks[id(table)]

    @cached_property
    def _leaks(self) -> Mapping[int, tuple[ProfileLeak, ...]]:
        return {id(table): profile_leaks(table) for table in self.tables}

    @cached_property
    def shares(self) -> Mapping[str, float]:
        """Relative shares of training tokens by trained task."""
        return training_shares(self.recipe.trained(), self.training_size, self.recipe.train)

    def training_size(self, family: str) -> int:
        """Return the number of training interactions, or items, from which a task can draw examples.

        If a pool of rows is repeated (``train.examples``), it is the size of the pool for every family.
        """
        if self.recipe.train.examples is not None:
            return self.recipe.train.examples
        return self.tasks[family].training_size()

    def training_examples(self, family: str) -> Iterator[Example]:
        """Yield the training examples of a task endlessly; with ``train.examples`` from the file of examples."""
        return training_examples(self.training_tasks[family], self.recipe.train.examples, self.training_seed)

    def eval_templates(self, family: str) -> tuple[Template, ...]:
        """Return the evaluation templates of all settings; by default the first training template."""
        return tuple(self.templates[family][name] for name in self.tasks[family].eval_templates)

    def templates_for(self, family: str, arm: Arm) -> tuple[Template, ...]:
        """Return the evaluation templates of one setting; see `TaskSection.untuned_templates`."""
        section, templates = self.section(family), self.eval_templates(family)
        untuned = {name.rpartition("/")[2] for name in section.untuned_templates}
        if not untuned:
            return templates
        if arm != "tuned":
            return tuple(template for template in templates if template.name in untuned)
        # a template may be in both lists
        both = {name.rpartition("/")[2] for name in section.eval_templates}
        return tuple(template for template in templates if template.name not in untuned - both)

    def untuned_without_codes(self) -> bool:
        """Whether base models are evaluated without reading or writing item codes."""
        templates = [
            template
            for family in self.tasks
            for arm in self.section(family).arms or self.recipe.eval.arms
            if arm != "tuned" and arm in self.recipe.eval.arms
            for template in self.templates_for(family, arm)
        ]
        return bool(templates) and not any(template.writes_codes for template in templates)


def with_text_baseline(known: tuple[BaselineSection, ...], items: Mapping[str, Item]) -> tuple[BaselineSection, ...]:
    """Return the baselines of a ranking task, with a text-only baseline added if items have texts.

    A language model that does not beat this baseline adds nothing to text similarity.
    """
    if not any(item.fields or item.title != item.item_id for item in items.values()):
        return known
    reads = any(import_component(BASELINES, entry.name, "baseline").READS == "texts" for entry in known)
    return known if reads else (*known, *default_baselines(TEXT_BASELINE))


def _check_parameters(family: str, baseline: BaselineSection) -> None:
    key = f"tasks.{family}.baselines"
    baseline_config(baseline.name, baseline.parameters, key)
    if "liked" in baseline.parameters:
        raise RecipeError(
            f"{key}: liked applies to all models of a task; set tasks.{family}.liked instead of liked of "
            f"{baseline.name!r}",
            kind="contradiction",
            column=key,
        )


def build_study(recipe: Recipe, data: SplitDataset | None = None) -> Study:
    """Load, split and check all data of a recipe; ``data`` are the main data if already loaded."""
    families = recipe.tasks.present()
    for family, section in families.items():
        check_task_components(family, section.strategies, [baseline.name for baseline in section.baselines])
        for baseline in section.baselines:
            _check_parameters(family, baseline)
    data, reviews = load_tables(recipe, data)
    templates = {family: load_templates(family, family_of(family).prompts, *recipe.prompts) for family in families}
    candidates = None
    if any(family_of(family).ranks_for_users for family in families):
        candidates = build_candidate_sets(recipe, data, recipe.eval.split, _evaluated_users(recipe, data))
    held, aligned = _alignment_items(recipe, data)
    with name_searched_folders(recipe):
        index = build_index(recipe.index, data, seed=recipe.seed) if recipe.index is not None else None
    study = Study(recipe, data, reviews, candidates, index, {}, templates, held, aligned)
    _check_slices(study)
    for family in families:
        _check_data(family, study.task_data(family), recipe)
    study = replace(study, tasks=_build_tasks(study, recipe.seed))
    if study.training_seed != recipe.seed:
        study = replace(study, trained=_build_tasks(study, study.training_seed))
    for family in families if data.measures else ():
        if not study.cases(family):
            name = study.task_data(family).dataset.name
            if study.tasks[family].cases(recipe.eval.split):
                raise DataError(
                    f"tasks.{family}: all user profiles of {name} name held-out items, so there is no user to "
                    "evaluate; create profiles from training interactions only",
                    kind="empty",
                    at=name,
                    column=f"tasks.{family}",
                )
            raise DataError(
                f"tasks.{family}: the {recipe.eval.split} split of {name} has no cases; hold out more interactions "
                "(data.split), or evaluate another split (eval.split)",
                kind="empty",
                at=name,
                column="eval.split",
            )
        if study.tasks[family].calibrates and not study.cases(family, "valid"):
            raise DataError(
                f"tasks.{family}.calibrate: {study.task_data(family).dataset.name} has no validation split, which "
                "calibration needs; set the key to none, or hold out validation interactions (data.split.valid, or a "
                "validation file of a given split)",
                kind="empty",
                column=f"tasks.{family}.calibrate",
            )
    return study


def _check_slices(study: Study) -> None:
    known = sorted({name for table in study.tables for name in user_attributes(table.dataset)})
    for name in study.recipe.eval.slices:
        if name not in known:
            there = (
                f"the attributes are {', '.join(map(format_value, known))}" if known else "the data has no attributes"
            )
            raise RecipeError(
                f"eval.slices: no user has an attribute {format_value(name)}{did_you_mean(name, known)}; {there}. For "
                "your own table, set data.columns.user_fields",
                kind="unknown-name",
                column="eval.slices",
            )


def ensemble_weight_users(recipe: Recipe, family: str, data: SplitDataset) -> frozenset[str]:
    """Return the validation users reserved to fit the ensemble weights of a task; see `EnsembleUsers`."""
    kind, section = family_of(family), recipe.eval.fusion
    if not section.controls or not (kind.ranks_for_users or kind.answer in (Rating, Probability)):
        return frozenset()
    return frozenset(split_validation_users(data, section.reserved)[1].valid["user_id"].unique().to_list())


def _evaluated_users(recipe: Recipe, data: SplitDataset) -> frozenset[str] | None:
    """Return the users that are evaluated with candidate sets; None for all.

    A run may evaluate hundreds of users out of millions, and only their sets are drawn.
    """
    ranking = {name: item for name, item in recipe.tasks.present().items() if family_of(name).ranks_for_users}
    most = max(section.users or recipe.eval.users for section in ranking.values())
    apart = ensemble_weight_users(recipe, next(iter(ranking)), data) if recipe.eval.split == "valid" else frozenset()
    result = data.holdouts(recipe.eval.split).first_users(most + 1, but=apart | set(leaking_users(profile_leaks(data))))
    return None if len(result) <= most else frozenset(result[:most])


def build_candidate_sets(
    recipe: Recipe, data: SplitDataset, split: SplitName, users: frozenset[str] | None = None
) -> CandidateSets | None:
    """Draw or retrieve the candidate sets of some or all users of a split; None if the whole catalogue is ranked."""
    section = recipe.eval.candidates
    if section.kind == "catalogue":
        return None
    if section.kind == "retrieved":
        return retrieve_candidates(
            data, split, section, seed=recipe.seed, finder=ensemble_retriever(recipe), users=users
        )
    return sample_candidates(data, split, section, seed=recipe.seed, users=users)


def ensemble_retriever(recipe: Recipe) -> EnsembleRetriever | None:
    """Return the ensemble of baselines that retrieves candidates; None if a single baseline does."""
    if recipe.eval.candidates.retriever != ENSEMBLE_RETRIEVER_NAME:
        return None
    from llmrec.ensembles.retrieving import EnsembleRetriever

    family = next(name for name in recipe.tasks.present() if family_of(name).ranks_for_users)
    baselines = recipe.tasks.present()[family].baselines
    return EnsembleRetriever(baselines, recipe.eval.fusion.reserved, recipe.seed)


def _build_tasks(study: Study, seed: int) -> dict[str, Task]:
    return {
        family: build_task(study, family, section, study.templates[family], seed)
        for family, section in study.recipe.tasks.present().items()
    }


def build_task(study: Study, family: str, section: TaskSection, templates: Mapping[str, Template], seed: int) -> Task:
    """Build a task on the data of a study, with the given settings and templates."""
    used = study.task_data(family)
    inputs = TaskInputs(
        data=used,
        templates=templates,
        seed=seed,
        candidates=study.sets(family),
        shot_choice=study.recipe.eval.shots.choice,
        index=study.codes(family),
        vectors=lazy_item_vectors(used.dataset.items, study.recipe.encoder, used),
        lists=_retrieved_candidates(study.recipe, family, used, seed),
        held=study.held,
    )
    if study.held is not None and family_of(family).candidates != "items" and family in study.recipe.trained():
        check_codes_without_titles(
            family, select_task_templates(family, section, templates, study.codes(family), reviews=True).train
        )
    kind, preference = family_of(family).task, study.recipe.train.preference
    if preference is None or family not in study.recipe.trained():
        return kind(section, inputs)
    hard = hard_negative_source(study.recipe, family, used, seed, lambda: kind(section, inputs))
    return kind(section, replace(inputs, preference=preference, hard=hard))


def _retrieved_candidates(recipe: Recipe, family: str, data: SplitDataset, seed: int) -> RetrievedCandidates | None:
    """Return the retrieved candidates of a task's training examples; None if candidates are drawn at random."""
    section = recipe.eval.candidates
    if not family_of(family).lists or section.kind != "retrieved":
        return None
    return RetrievedCandidates(data, section, seed, ensemble_retriever(recipe))


def lazy_item_vectors(items: Mapping[str, Item], encoder: str, data: SplitDataset) -> ItemVectors:
    """Return the text vectors of items; the text encoder is loaded on first use, after `check_encoder_split`."""

    def embed(entries: Sequence[Item]) -> NDArray[np.floating]:
        fields = dict.fromkeys(name for item in entries for name in item.fields)
        return item_vectors(entries, tuple(fields), text_embedder_for_split(encoder, data))

    return ItemVectors(items, embed)


def load_tables(recipe: Recipe, data: SplitDataset | None = None) -> tuple[SplitDataset, SplitDataset | None]:
    """Return the main data set and, if the recipe has one, the second data set.

    If the two share pairs, each excludes those that the other holds out: all tasks have one held-out set. ``data`` are
    the main data if already loaded; if they hold nothing out, the reviews hold nothing out either.
    """
    texts = recipe.data.texts if data is None else None  # data passed by the caller already has its texts
    with name_searched_folders(recipe):
        data, reviews = data or _load_without_texts(recipe.data, recipe.seed), None
        if recipe.reviews is not None:
            reviews = _load_without_texts(recipe.reviews, recipe.seed, holds_out=data.measures)
            data, reviews = data.without(reviews.held_out), reviews.without(data.held_out)
            reviews = with_stored_texts(reviews, recipe.reviews.texts, data.held_out)
        return with_stored_texts(data, texts, reviews.held_out if reviews is not None else frozenset()), reviews


def load_split(section: DataSection, seed: int) -> SplitDataset:
    """Load and split the data of a recipe section."""
    return with_stored_texts(_load_without_texts(section, seed), section.texts)


def _load_without_texts(section: DataSection, seed: int, *, holds_out: bool = True) -> SplitDataset:
    loaded = load_data(section, seed=seed)
    return (
        split_dataset(loaded, section.split, seed=seed)
        if holds_out
        else split_without_test(loaded, seed=seed, ties=section.split.ties)
    )


def _alignment_items(recipe: Recipe, data: SplitDataset) -> tuple[HeldItems | None, CandidateSets | None]:
    section = recipe.tasks.alignment
    if section is None:
        return None, None
    held = select_held_items(data.dataset.items, section.held_out, seed=recipe.seed)
    return held, sample_held_candidates(held, recipe.eval.split, count=recipe.eval.candidates.count, seed=recipe.seed)


def _check_data(family: str, data: SplitDataset, recipe: Recipe) -> None:
    rows, kind = data.dataset.interactions, family_of(family)
    if kind.lacking and kind.column and rows[kind.column].null_count() == len(rows):
        where = "reviews" if kind.second_table and recipe.reviews else "data"
        raise DataError(
            f"tasks.{family} {kind.lacking.format(data=data.dataset.name, where=where)}",
            kind="missing-column",
            at=data.dataset.name,
            column=kind.column,
        )
    sets = recipe.eval.candidates
    if kind.ranks_for_users and sets.kind != "catalogue" and len(data.dataset.items) < sets.count:
        raise DataError(
            f"{data.dataset.name} has {len(data.dataset.items)} items, fewer than eval.candidates.count={sets.count}; "
            "lower this key",
            kind="too-few",
            at=data.dataset.name,
            column="eval.candidates.count",
        )


def encoder_of(study: Study, base: str, tokenizer: Any = None) -> Encoder:
    """Return the tokenizer of a base model, loaded by default, with the tokens of the item index, without weights."""
    section = study.recipe.model
    tokenizer = load_tokenizer(base, section) if tokenizer is None else tokenizer
    if study.index is not None and study.index.vocabulary:
        add_item_tokens(tokenizer, study.index.vocabulary)
    return Encoder(tokenizer, max_length=section.max_length)


def resolve_run_folder(recipe: Recipe, out: Path | None) -> Path:
    """Return the run folder: ``out``, or ``runs/<name>`` under the working folder."""
    return out if out is not None else Path("runs") / recipe.name


# --------------------------------------------------------------------------- profiles that leak


@dataclass(frozen=True)
class ProfileLeak:
    """A field of a user's profile that mentions a held-out item of this user."""

    user_id: str
    field: str
    item_id: str


def profile_leaks(data: SplitDataset) -> tuple[ProfileLeak, ...]:
    """Return the profile fields shown in prompts that mention a held-out item of their user."""
    profiles = data.dataset.users
    held = held_out_titles(data, profiles)
    return tuple(
        ProfileLeak(user, name, item)
        for user, titles in held.items()
        for name, text in profiles[user].items()
        for title, item in titles.items()
        if mentions_title(text, title)
    )


def leaking_users(leaks: tuple[ProfileLeak, ...]) -> tuple[str, ...]:
    """Return the users with leaking profiles."""
    return tuple(dict.fromkeys(leak.user_id for leak in leaks))


def leak_warning(data: SplitDataset, leaks: tuple[ProfileLeak, ...]) -> str:
    """Return a warning about users excluded because of their profiles; empty if there are none."""
    count, first = len(leaking_users(leaks)), leaks[0] if leaks else None
    if first is None:
        return ""
    whose = "1 user is" if count == 1 else f"{count:,} users are"
    return (
        f"{whose} excluded from the evaluation, of {len(data.dataset.users):,} with a profile in {data.dataset.name}: "
        f"the profile contains a held-out item of the user, such as item {first.item_id} in the field "
        f"{first.field!r} of user {first.user_id}"
    )
