"""Selects the templates of a task: by name, by set, or all that suit the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmrec.errors import RecipeError, did_you_mean
from llmrec.prompts.template import Template
from llmrec.prompts.words import Words, english_words
from llmrec.recipe.schema import TaskSection
from llmrec.types import ItemCodes


@dataclass(frozen=True)
class TemplateSelection:
    """The selected templates of a task.

    Attributes:
        every: All templates of the family by name.
        train: The training templates; never an unseen one.
        evaluate: Names of the evaluation templates: the fine-tuned model's, then those of other settings.
        coded: Whether there is an index, so that templates may write codes.
        reviewed: Whether the data has reviews, so that templates may show them.
    """

    every: Mapping[str, Template]
    train: tuple[Template, ...]
    evaluate: tuple[str, ...]
    coded: bool
    reviewed: bool = False

    @property
    def asking(self) -> tuple[Template, ...]:
        """All templates for training examples and questions of the task."""
        return (*self.train, *(self.every[name] for name in self.evaluate))

    def training(self, name: str) -> list[Template]:
        """Return a template by name, or all templates of a set that can be used for training.

        Raises:
            RecipeError: As `get`; or if no template of the set is left.
        """
        members = [] if name in self.every else templates_of_set(self.every, name)
        if not members:
            return [self.get(name)]
        left = [template for template in members if template.use != "unseen" and not self.lacks(template)]
        if not left:
            lacking = "; ".join(
                sorted({self.lacks(template) or "it is reserved for evaluation" for template in members})
            )
            raise RecipeError(
                f"no template of the set {name!r} can be used for training: {lacking}", kind="unsupported"
            )
        return left

    def lacks(self, template: Template) -> str:
        """Return the variables that a template needs and the data lacks; empty if it can be used."""
        if template.writes_codes and not self.coded:
            return (
                "shows item codes, but there is no index; add an index to the recipe, such as index: {scheme: semantic}"
            )
        if template.needs and not self.reviewed:
            return (
                "shows parts of reviews, such as a headline, but the data has no reviews; use a source with reviews, "
                "such as amazon-reviews"
            )
        return ""

    def words(self, name: str) -> Words:
        """Return the words in the language of a template."""
        result = self.every.get(name.rpartition("/")[2])
        return english_words() if result is None else result.words

    def get(self, name: str) -> Template:
        """Return a template by its name, with or without ``family/``.

        Raises:
            RecipeError: If there is none, with the closest name; or if it uses codes and there is no index.
        """
        bare = name.rpartition("/")[2]
        if bare not in self.every:
            known = ", ".join(self.every)
            raise RecipeError(
                f"unknown template {name!r}{did_you_mean(bare, self.every)}; known: {known}. Add your own templates "
                "with the recipe key prompts",
                kind="unknown-name",
            )
        result = self.every[bare]
        if lacking := self.lacks(result):
            raise RecipeError(
                f"template {result.id} {lacking}, or choose another template", kind="unsupported", at=result.id
            )
        return result


def check_chat_template(template: Template) -> None:
    """Reject a list template of a family whose templates have one answer.

    Raises:
        RecipeError: If it is a list.
    """
    if template.shape == "list":
        raise RecipeError(
            f"template {template.id}: {template.family} templates have one answer; use shape: chat",
            kind="unsupported",
            at=template.id,
            column="shape",
        )


def templates_of_set(templates: Mapping[str, Template], name: str) -> list[Template]:
    """Return the templates of a set; templates not used in training are last."""
    return [template for template in templates.values() if name in template.sets]


def select_task_templates(
    family: str,
    section: TaskSection,
    templates: Mapping[str, Template],
    index: ItemCodes | None = None,
    *,
    reviews: bool = False,
) -> TemplateSelection:
    """Select the templates of a recipe section; by default, with an item index, templates with item codes.

    Of these, templates that also show titles are used only if named or without alternatives. A list of bare codes is
    used only if named, since it supports only codes of item tokens. ``reviews`` enables templates that show reviews.

    Raises:
        RecipeError: If a name is unknown, a template for evaluation is used for training, one uses codes without an
            index, one needs reviews and there are none, or none is left.
    """
    everything = TemplateSelection(templates, (), (), index is not None, reviews)
    named = [template for name in section.templates for template in everything.training(name)]
    for template in named:
        if template.use == "unseen":
            raise RecipeError(
                f"tasks.{family}.templates: {template.id} is reserved for evaluation with unseen templates; use it in "
                "eval_templates instead",
                kind="contradiction",
                at=template.id,
                column=f"tasks.{family}.templates",
            )
    seen = [t for t in templates.values() if t.use == "seen" and not t.bare and (reviews or not t.needs)]
    coded = [template for template in seen if template.writes_codes]
    coded = [template for template in coded if not template.writes_titles] or coded
    plain = [template for template in seen if not template.writes_codes]
    train = tuple(named or (coded if index is not None and coded else plain))
    if not train:
        raise RecipeError(
            f"tasks.{family}: there is no training template; add a template to prompts/{family}",
            kind="missing-file",
            column=f"tasks.{family}",
        )
    evaluate = tuple(everything.get(name).name for name in section.eval_templates) or (train[0].name,)
    evaluate += tuple(everything.get(name).name for name in section.untuned_templates)
    evaluate = tuple(dict.fromkeys(evaluate))
    return TemplateSelection(templates, train, evaluate, index is not None, reviews)
