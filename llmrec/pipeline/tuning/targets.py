"""What the targets of a recipe's training rows are: tokens, classes of a rating head, labels, or lists."""

from __future__ import annotations

from collections.abc import Iterator

from llmrec.backends.encode import Encoder
from llmrec.errors import RecipeError
from llmrec.models.soft_prompt import METHODS, TIED, SoftPrompt
from llmrec.pipeline.study import Study
from llmrec.tasks.family import family_of
from llmrec.tasks.rating import RatingTask, learned_only
from llmrec.tasks.rows import Listwise
from llmrec.train.batches import Classes, Labels
from llmrec.train.listwise import common
from llmrec.types import Probability, Rating, Request


def classes_of(study: Study, encoder: Encoder, *, paired: bool = False) -> Classes | None:
    """Return what puts classes in place of target tokens, where the recipe trains a rating head.

    Raises:
        RecipeError: If the model is an encoder-decoder.
    """
    rating = study.recipe.tasks.rating
    if rating is None or rating.head is None:
        return None
    if paired:
        raise RecipeError(
            f"tasks.rating.head: {study.recipe.model.name} is an encoder-decoder, and a head reads the states of a "
            "decoder alone; drop the section and 'head' from tasks.rating.strategies, or choose another model",
            kind="unsupported",
            column="tasks.rating.head",
        )
    task = study.tasks["rating"]
    assert isinstance(task, RatingTask)
    if other := [template.id for template in task.training_templates if learned_only(template)]:
        raise RecipeError(
            f"tasks.rating.templates: {other[0]} is answered by yes or no, and tasks.rating.head learns ratings alone; "
            "leave it out, or drop the head",
            kind="contradiction",
            column="tasks.rating.templates",
        )
    return Classes(encoder, task.scale)


def listwise_of(study: Study, *, paired: bool = False) -> Listwise | None:
    """Return how training rows are learned as lists, of candidates or from preference, where the recipe says so.

    Raises:
        RecipeError: If they cannot be.
    """
    tasks, recipe = {family: study.training_tasks[family] for family in study.shares}, study.recipe
    refused = recipe.model.name if paired else None
    found = common(tasks, preference=recipe.train.preference is not None, paired=refused)
    if found is not None and recipe.train.exits:
        raise RecipeError(
            "train.exits: a loss over candidates stands after the last layer alone; set tasks.<family>.loss=answer, "
            "train.preference=null, or drop the key",
            kind="contradiction",
            column="train.exits",
        )
    if recipe.train.teacher is not None and (found is not None or paired):
        what = f"{recipe.model.name} is an encoder-decoder" if paired else "a loss over candidates compares no tokens"
        raise RecipeError(
            f"train.teacher: {what}; it teaches decoders that learn answers (tasks.<family>.loss=answer)",
            kind="contradiction",
            column="train.teacher",
        )
    return found


def labels_of(study: Study, encoder: Encoder, *, paired: bool = False) -> Labels | None:
    """Return what reads labels off training rows, where the recipe trains soft prompts.

    Raises:
        RecipeError: If the model is an encoder-decoder, or rows are no labels that soft prompts could be tied to.
    """
    train = study.recipe.train
    if train.method not in METHODS:
        return None
    tied, lists = train.method in TIED, listwise_of(study, paired=paired) is not None
    if paired or (tied and lists):
        what = f"{study.recipe.model.name} is an encoder-decoder" if paired else "a loss over candidates has no labels"
        raise RecipeError(
            f"train.method: {what}, and {train.method} trains a decoder on {'labels' if tied else 'tokens'}; set "
            "train.method=lora",
            kind="contradiction",
            column="train.method",
        )
    labels = Labels(encoder, limit=train.soft.prompts, tied=tied)
    if tied:
        family, *others = study.shares
        if others:
            raise RecipeError(
                f"train.method: {train.method} trains one family of labels, and these are {family} and "
                f"{', '.join(others)}; name one in train.only",
                kind="contradiction",
                column="train.method",
            )
        for text in _said(study, family):
            labels.add(encoder.piece(text))
    return labels


def _said(study: Study, family: str) -> Iterator[str]:
    """Yield every answer of a family whose answers are labels, whether or not a training row has it."""
    if family_of(family).answer not in (Rating, Probability):
        return
    task, anybody = study.tasks[family], Request(id="labels", user_id="")
    for template in task.training_templates:
        if not (isinstance(task, RatingTask) and learned_only(template)):
            yield from (text + template.tail for text in task.continuations(anybody, template=template.name))


def soft_prompt_of(study: Study, labels: Labels) -> SoftPrompt:
    """Return what is known of soft prompts once all training rows were read; no label is taken after that."""
    labels.closed = True
    found = tuple(labels.ids)
    return SoftPrompt(study.recipe.train.soft.prompts, found, tied=labels.tied, seed=study.training_seed)
