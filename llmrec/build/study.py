"""Recipe -> data, candidate sets and tasks: everything that needs no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmrec.backends.encode import Encoder
from llmrec.backends.models import load_tokenizer
from llmrec.backends.vocabulary import add_item_tokens
from llmrec.build.indexing import build_index
from llmrec.data.candidates import CandidateSets, draw
from llmrec.data.sources import load
from llmrec.data.split import SplitDataset, split
from llmrec.errors import DataError
from llmrec.index.index import ItemIndex
from llmrec.prompts import Template, load_templates
from llmrec.recipe import DataSection, Recipe, TaskSection
from llmrec.registry import TASKS, check_names, lookup
from llmrec.tasks.held_items import HeldItems, draw_held, hold_out
from llmrec.types import Case, Task

RANKING = ("sequential", "direct")
ITEM_ANSWERS = (*RANKING, "alignment")
"""Families whose answer is an item; `RANKING` ranks items for users."""


@dataclass(frozen=True)
class Study:
    """A recipe's data and tasks, built once and shared by every stage.

    Attributes:
        recipe: The whole recipe.
        data: Main data; its held-out pairs are held out by every task.
        reviews: The second table, where the recipe names one.
        candidates: Stored candidate sets of the evaluated split, for ranking tasks; None where the catalogue is ranked.
        index: Codes of the items, where the recipe has an index.
        tasks: Chosen families by name.
        templates: All templates of the chosen families, ``family -> name -> template``.
        held: Items whose code and text no training row may show together; None without the alignment task.
        aligned: Stored candidate sets of the questions about them.
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

    def section(self, family: str) -> TaskSection:
        """Return a family's recipe section."""
        return self.recipe.tasks.present()[family]

    def task_data(self, family: str) -> SplitDataset:
        """Return the data that a family reads."""
        return self.reviews if family == "explanation" and self.reviews is not None else self.data

    def sets(self, family: str) -> CandidateSets | None:
        """Return the stored candidate sets that a family ranks."""
        return self.aligned if family == "alignment" else self.candidates if family in RANKING else None

    def cases(self, family: str) -> list[Case]:
        """Return the evaluated cases: the first ``users`` ones in seeded order."""
        section = self.section(family)
        return self.tasks[family].cases(self.recipe.eval.split)[: section.users or self.recipe.eval.users]

    def eval_templates(self, family: str) -> tuple[Template, ...]:
        """Return the templates that evaluation uses; by default the first training template."""
        return tuple(self.templates[family][name] for name in self.tasks[family].eval_templates)


def build_study(recipe: Recipe, data: SplitDataset | None = None) -> Study:
    """Load, split and check everything that a recipe names.

    Args:
        recipe: The recipe.
        data: The main data where it is at hand already, in place of what the recipe's section names.

    Raises:
        DataError: If the data does not carry what a task needs.
        RecipeError: If a template, strategy or baseline does not exist or does not fit its family.
    """
    families = recipe.tasks.present()
    for family, section in families.items():
        check_names(family, section.strategies, section.baselines)
    data = data or _data(recipe.data, recipe.seed)
    reviews = _data(recipe.reviews, recipe.seed) if recipe.reviews else None
    if reviews is not None:
        # One held-out set for all tasks: where the two tables share pairs, each keeps out what the other holds out.
        data, reviews = data.without(reviews.held_out), reviews.without(data.held_out)
    templates = {family: load_templates(family) for family in families}
    candidates = None
    if recipe.eval.candidates.kind != "catalogue" and any(family in RANKING for family in families):
        candidates = draw(data, recipe.eval.split, recipe.eval.candidates, seed=recipe.seed)
    held, aligned = _aligned(recipe, data)
    index = build_index(recipe.index, data, seed=recipe.seed) if recipe.index is not None else None
    tasks: dict[str, Task] = {}
    for family, section in families.items():
        used = reviews if family == "explanation" and reviews is not None else data
        _check_data(family, used, recipe)
        tasks[family] = lookup(TASKS, family, "task")(
            used,
            section,
            templates[family],
            seed=recipe.seed,
            candidates=aligned if family == "alignment" else candidates if family in RANKING else None,
            shot_choice=recipe.eval.shots.choice,
            # The second table has items of its own, which the index does not hold.
            index=index if used is data else None,
        )
    study = Study(recipe, data, reviews, candidates, index, tasks, templates, held, aligned)
    for family in families:
        if not study.cases(family):
            name = study.task_data(family).dataset.name
            raise DataError(
                f"tasks.{family}: the {recipe.eval.split} split of {name} holds no case; "
                "hold out more (data.split), or evaluate another split (eval.split)"
            )
    return study


def _data(section: DataSection, seed: int) -> SplitDataset:
    return split(load(section, seed=seed), section.split, seed=seed)


def _aligned(recipe: Recipe, data: SplitDataset) -> tuple[HeldItems | None, CandidateSets | None]:
    section = recipe.tasks.alignment
    if section is None:
        return None, None
    held = hold_out(data.dataset.items, section.held_out, seed=recipe.seed)
    return held, draw_held(held, recipe.eval.split, count=recipe.eval.candidates.count, seed=recipe.seed)


def _check_data(family: str, data: SplitDataset, recipe: Recipe) -> None:
    rows = data.dataset.interactions
    where = "reviews" if family == "explanation" and recipe.reviews else "data"
    if family == "rating" and rows["rating"].null_count() == len(rows):
        raise DataError(
            f"tasks.rating needs ratings, and {data.dataset.name} has none; name the column with {where}.columns.rating"
        )
    if family == "explanation" and rows["text"].null_count() == len(rows):
        raise DataError(
            f"tasks.explanation needs texts, and {data.dataset.name} has none; name the column with "
            f"{where}.columns.text, or give a second table under `reviews:`"
        )
    sets = recipe.eval.candidates
    if family in RANKING and sets.kind != "catalogue" and len(data.dataset.items) < sets.count:
        raise DataError(
            f"{data.dataset.name} has {len(data.dataset.items)} items, fewer than eval.candidates.count="
            f"{sets.count}; lower it"
        )


def encoder_of(study: Study, base: str) -> Encoder:
    """Return the tokenizer of a base model with the tokens of the study's index, without loading weights."""
    section = study.recipe.model
    tokenizer = load_tokenizer(base, section)
    if study.index is not None and study.index.tokens:
        add_item_tokens(tokenizer, study.index.tokens)
    return Encoder(tokenizer, max_length=section.max_length)


def folder_of(recipe: Recipe, out: Path | None) -> Path:
    """Return the run folder: ``out``, or ``runs/<name>`` under the working folder."""
    return out if out is not None else Path("runs") / recipe.name
